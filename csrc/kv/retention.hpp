// Retention of programs that call tools: pins with a deadline, and how long a deadline pays.
//
// A program that calls a tool leaves the batch and comes back with everything it had and a little
// more. Until then its published blocks may be pinned (Continuum, arXiv 2511.02230): a pin is a
// sequence that holds them (BlockPool::fork, published only), so eviction needs to know nothing,
// and no list of leaves is ever looked through.
//
//   deadline   pins hang in a hashed timing wheel; `tick` ends those whose time is over, O(1) each.
//              The clock is the caller's and only goes forward.
//   pressure   a step that does not fit ends the pins of the programs that arrived last, as few as
//              make it fit, in the same transaction (as does a sequence that is swapped in): a step
//              that does not fit without any pin leaves all of them.
//   cap        all pins together hold at most a share of the blocks (0.6); a pin beyond it ends
//              those of later programs, or is refused.
//
// The time to live of a pin is what maximises
//
//   P(tau) * (T * eta + reload) - tau
//
// over tau = 0 and every recorded duration of the tool: P is the share of its last 1000 calls that
// took at most tau, T the mean wait for being admitted again, eta how well the number of turns done
// foretells those left (1: fixed, 0: memoryless), reload the time to compute or load the content.
// A tool with 100 calls or fewer is taken to be like all tools together, and those, when they are
// as few, to be exponential: tau = m * ln(benefit / m). The rule that the paper's code was released
// with is here too: 2 s for tools whose mean is at most 2 s, else none.
#pragma once

#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kv/batch.hpp"
#include "kv/block_pool.hpp"

namespace pyruntime::kv {

// Durations of a tool's latest calls, in order of time and of length.
class Durations {
 public:
  static constexpr size_t kWindow = 1000;
  static constexpr size_t kFew = 100;

  void add(double seconds);
  size_t size() const noexcept { return sorted_.size(); }
  double mean() const noexcept;
  // argmax of P(tau) * benefit - tau; the least of several.
  double best(double benefit) const noexcept;

 private:
  std::vector<double> ring_, sorted_;
  size_t next_ = 0;
};

class ToolTimes {
 public:
  static constexpr size_t kMaxTools = 4096;  // others count among all tools only

  void observe(const std::string& tool, double seconds);
  // A program ended after so many turns.
  void ended(uint32_t turns) noexcept;
  // -Corr(turns done, turns left) over all turns of all programs that ended, 0..1; 1 before any.
  double memoryfulness() const noexcept;
  double suggest(const std::string& tool, double wait, double eta, double reload,
                 double unknown_mean) const;
  double fixed_rule(const std::string& tool) const;

 private:
  std::unordered_map<std::string, Durations> tools_;
  Durations all_;
  double n_ = 0, x_ = 0, y_ = 0, xx_ = 0, yy_ = 0, xy_ = 0;
};

class Pins {
 public:
  explicit Pins(BlockPool& pool);

  // Keeps what the sequence has published until `deadline`; 0 when the cap does not allow it.
  uint64_t pin(SeqHandle seq, int64_t deadline_ns, uint64_t arrival);
  void unpin(uint64_t pin);  // throws PYRT_ESTATE for one that is over
  bool holds(uint64_t pin) const noexcept;
  uint32_t tick(int64_t now_ns) noexcept;  // pins that ended
  void set_cap(double share);
  size_t size() const noexcept { return order_.size(); }
  uint64_t blocks() const noexcept { return blocks_; }

  // As the pool's and the batch's, ending pins where that makes the step fit.
  bool step(const StepOps& ops, StepResult& result, bool dry);
  bool advance(Batch& batch, const int32_t* tokens, StepResult& result);
  void unpark(SeqHandle seq, StepResult& result, std::vector<Eviction>* evicted);

  void check() const;  // throws PYRT_ECORRUPT
  uint64_t hash() const noexcept;

  struct {
    Counter made, expired, ended, pressed, refused;
  } stats;

 private:
  static constexpr uint32_t kSlots = 4096;
  static constexpr int kTickBits = 20;  // about a millisecond

  struct Pin {
    SeqHandle seq;
    int64_t deadline;
    uint64_t arrival;
    uint32_t blocks;
    uint32_t generation;  // odd while it is one
    uint32_t slot;        // of the wheel
    uint32_t prev, next;  // in it, or (next) of the free ones; index + 1
  };

  uint32_t index_of(uint64_t pin) const noexcept;  // or kNone
  static uint32_t slot_of(int64_t deadline) noexcept {
    return static_cast<uint32_t>(static_cast<uint64_t>(deadline) >> kTickBits) % kSlots;
  }
  void forget(uint32_t index) noexcept;  // whose sequence has ended
  void end(uint32_t index) noexcept;
  // Sequences of the `n` pins of the latest arrivals, behind `frees`.
  std::span<const SeqHandle> with_latest(std::span<const SeqHandle> frees, size_t n);
  void forget_latest(size_t n) noexcept;
  // How many pins, the latest first, give so many blocks of each group; more than there are if all
  // do not.
  size_t pins_for(const int64_t* need, StepResult& result);

  BlockPool& pool_;
  double share_ = 0.6;
  uint64_t blocks_ = 0;
  int64_t now_ = INT64_MIN;
  std::vector<Pin> pins_;
  uint32_t free_ = 0;  // index + 1
  std::vector<uint32_t> wheel_;
  std::set<std::pair<uint64_t, uint32_t>> order_;  // arrival, index
  std::vector<SeqHandle> frees_;
};

}  // namespace pyruntime::kv
