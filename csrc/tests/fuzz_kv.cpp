// The block pool's C ABI driven by bytes: options, then one call per opcode with arguments that are
// mostly right. After each call the pool's own check must hold, and a refused call must have left
// the state as it was.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "support/fuzz_input.hpp"

namespace {

using pyruntime::fuzz::Input;
using pyruntime::fuzz::must;

struct Live {
  uint64_t seq;
  std::vector<int32_t> tokens;
};

class Fuzzer {
 public:
  explicit Fuzzer(Input& in) : in_(in) {
    pyrt_kv_options o;
    pyrt_kv_options_init(&o);
    if (in.below(8) == 0) any(o);
    o.block_size = 1 + in.below(5);
    o.num_groups = 1 + in.below(2);
    for (uint32_t g = 0; g < o.num_groups; ++g) {
      o.num_blocks[g] = 1 + in.below(40);
      o.window[g] = in.below(3) == 0 ? in.below(20) : 0;
    }
    o.num_layers = 1 + in.below(2);
    o.max_seqs = 1 + in.below(8);
    o.run_blocks = 1 + in.below(20);
    o.event_capacity = in.below(30);
    o.sharing = in.below(6) != 0;
    o.seed = 1;
    const double cap = in_.below(4) / 3.0;
    must(pyrt_kv_create(&o, &pool_) == PYRT_OK, "create");
    must(pyrt_kv_pin_cap(pool_, cap) == PYRT_OK, "cap");
    groups_ = o.num_groups;
    layers_ = o.num_layers;
  }
  ~Fuzzer() { pyrt_kv_destroy(pool_); }

  void call() {
    uint64_t before = 0, after = 0;
    must(pyrt_kv_state_hash(pool_, &before) == PYRT_OK, "hash");
    const pyrt_status status = one();
    must(pyrt_kv_check(pool_) == PYRT_OK, "the pool's own check");
    must(pyrt_kv_state_hash(pool_, &after) == PYRT_OK, "hash");
    must(status == PYRT_OK || before == after || partial_, "a refused call left something");
    must(status == PYRT_OK || status == PYRT_EINVAL || status == PYRT_EFULL ||
             status == PYRT_ESTATE || status == PYRT_ENOENT || status == PYRT_ENOMEM ||
             status == PYRT_EUNSUPPORTED,
         "an undocumented status");
  }

 private:
  // Any options at all: made, or refused for a documented reason.
  void any(pyrt_kv_options& o) {
    pyrt_kv_options wild = o;
    auto* words = reinterpret_cast<uint8_t*>(&wild);
    for (int i = 0; i < 6; ++i) {
      const size_t at = in_.take(1) % offsetof(pyrt_kv_options, secret);
      words[at] = static_cast<uint8_t>(in_.take(1));
    }
    wild.struct_size = std::min<uint32_t>(wild.struct_size, sizeof wild);
    wild.event_capacity %= 1000;
    pyrt_kv* pool = nullptr;
    const pyrt_status status = pyrt_kv_create(&wild, &pool);
    must(status == PYRT_OK || status == PYRT_EINVAL || status == PYRT_ENOMEM, "create");
    pyrt_kv_destroy(pool);
  }

  uint64_t pick() {
    if (in_.below(16) == 0) return in_.take(8);
    return live_.empty() ? 0 : live_[in_.below(255) % live_.size()].seq;
  }
  Live* find(uint64_t seq) {
    for (Live& each : live_) {
      if (each.seq == seq) return &each;
    }
    return nullptr;
  }
  uint32_t held(uint64_t seq) {
    pyrt_kv_seq_info info{};
    info.struct_size = sizeof info;
    return pyrt_kv_seq_get_info(pool_, seq, &info) == PYRT_OK ? info.held : 0;
  }
  std::vector<int32_t> prompt() {
    std::vector<int32_t> tokens(1 + in_.below(60));
    const auto a = static_cast<int32_t>(in_.below(2)), b = static_cast<int32_t>(in_.below(2));
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = i % 16 < 8 ? a : b;
    return tokens;
  }
  void forget(uint64_t seq) {
    live_.erase(std::remove_if(live_.begin(), live_.end(),
                               [&](const Live& each) { return each.seq == seq; }),
                live_.end());
  }

  pyrt_status one() {
    partial_ = false;
    switch (in_.below(16)) {
      case 0: {
        uint64_t seq;
        const pyrt_status status = pyrt_kv_seq_open(pool_, in_.below(3), &seq);
        if (status == PYRT_OK) live_.push_back({seq, {}});
        return status;
      }
      case 1: {
        const uint64_t seq = pick();
        const auto tokens = prompt();
        const pyrt_status status =
            pyrt_kv_seq_admit(pool_, seq, tokens.data(), static_cast<uint32_t>(tokens.size()),
                              in_.below(80), nullptr);
        if (status == PYRT_OK) find(seq)->tokens = tokens;
        return status;
      }
      case 2: {
        const uint64_t seq = pick();
        const pyrt_status status = pyrt_kv_seq_free(pool_, &seq, 1);
        if (status == PYRT_OK) forget(seq);
        return status;
      }
      case 3:
        return pyrt_kv_seq_trim(pool_, pick(), in_.below(64));
      case 4: {
        const uint64_t seq = pick();
        Live* each = find(seq);
        uint32_t most = held(seq);
        if (in_.below(16) == 0) ++most;
        const bool told = each != nullptr && in_.below(5) != 0;
        if (told) each->tokens.resize(std::max<size_t>(each->tokens.size(), most), 1);
        return pyrt_kv_seq_commit(pool_, seq, most, layers_ - (in_.below(8) == 0),
                                  told ? each->tokens.data() : nullptr,
                                  told ? static_cast<uint32_t>(each->tokens.size()) : 0);
      }
      case 5:
        return step();
      case 6:
        return step();
      case 7: {
        uint64_t child;
        const uint64_t seq = pick();
        const pyrt_status status = pyrt_kv_seq_fork(pool_, seq, in_.below(2) != 0, &child);
        if (status == PYRT_OK) live_.push_back({child, find(seq)->tokens});
        return status;
      }
      case 8: {
        uint64_t keep[2] = {in_.take(8), in_.take(4)};
        const pyrt_kv_move* moves;
        size_t n;
        uint32_t left;
        const uint64_t seq = pick();
        const uint32_t tokens = std::min(held(seq), 128u);
        return pyrt_kv_seq_mask(pool_, seq, keep, tokens, in_.below(2) != 0, &moves, &n, &left);
      }
      case 9:
        return in_.below(2) != 0 ? pyrt_kv_seq_park(pool_, pick())
                                 : pyrt_kv_seq_unpark(pool_, pick());
      case 10: {
        uint32_t block = in_.below(45);
        const uint32_t group = in_.below(3), call = in_.below(3);
        if (call == 0) return pyrt_kv_take_blocks(pool_, group, &block, 1);
        return call == 1 ? pyrt_kv_pin_blocks(pool_, group, &block, 1)
                         : pyrt_kv_unpin_blocks(pool_, group, &block, 1);
      }
      case 11:
        if (in_.below(8) == 0) return pyrt_kv_clear(pool_);
        return pyrt_kv_seq_plan(pool_, pick(), in_.below(64), in_.below(4));
      case 12:
        return batch();
      case 13:
        return retention();
      case 14: {
        now_ += static_cast<int64_t>(in_.take(2)) << in_.below(24);
        return pyrt_kv_tick(pool_, now_, nullptr);
      }
      default: {
        pyrt_kv_event events[8];
        size_t n;
        uint64_t next, lost;
        return pyrt_kv_events(pool_, in_.below(255), events, 8, &n, &next, &lost);
      }
    }
  }

  pyrt_status step() {
    std::vector<uint64_t> frees;
    std::vector<pyrt_kv_growth> trims, grows;
    std::vector<pyrt_kv_admission> admissions;
    std::vector<std::vector<int32_t>> prompts;
    for (uint32_t n = in_.below(3); n > 0; --n) frees.push_back(pick());
    for (uint32_t n = in_.below(3); n > 0; --n) trims.push_back({pick(), in_.below(50), 0});
    for (uint32_t n = in_.below(4); n > 0; --n) {
      const uint64_t seq = pick();
      grows.push_back({seq, held(seq) + in_.below(16), 0});
    }
    for (uint32_t n = in_.below(3); n > 0; --n) prompts.push_back(prompt());
    for (const auto& tokens : prompts) {
      const auto n = static_cast<uint32_t>(tokens.size());
      admissions.push_back({tokens.data(), 0, n, 0, in_.below(n + 2), in_.below(99), 0, 0});
    }
    pyrt_kv_ops ops{};
    ops.struct_size = sizeof ops;
    ops.flags = in_.below(16);
    ops.frees = frees.data();
    ops.num_frees = frees.size();
    ops.trims = trims.data();
    ops.num_trims = trims.size();
    ops.grows = grows.data();
    ops.num_grows = grows.size();
    ops.admissions = admissions.data();
    ops.num_admissions = admissions.size();
    pyrt_kv_result result{};
    result.struct_size = sizeof result;
    if (in_.below(4) == 0) pyrt_kv_fail_at(pool_, in_.below(10));
    const pyrt_status status = pyrt_kv_step(pool_, &ops, &result);
    pyrt_kv_fail_at(pool_, -1);
    if ((ops.flags & PYRT_KV_DRY) != 0) return status;
    partial_ = status == PYRT_EFULL && (ops.flags & PYRT_KV_PREFIX) != 0;
    if (status != PYRT_OK && !partial_) return status;
    for (const uint64_t seq : frees) forget(seq);
    for (uint32_t i = 0; i < result.num_admitted; ++i) {
      must(admissions[i].cached < std::max(1u, admissions[i].num_tokens), "cached too many");
      live_.push_back({admissions[i].seq, prompts[i]});
    }
    return status;
  }

  pyrt_status retention() {
    const uint64_t any = in_.below(8) == 0 ? in_.take(8) : 0;
    switch (in_.below(5)) {
      case 0: {
        double seconds;
        pyrt_kv_ttl ttl{sizeof ttl, in_.below(3), 1.0, in_.below(2) - 0.5, 2.0, 1.0};
        return pyrt_kv_ttl_suggest(pool_, "tool", in_.below(5), &ttl, &seconds);
      }
      case 1:
        return in_.below(2) != 0 ? pyrt_kv_ttl_observe(pool_, "tool", in_.below(5), in_.below(9))
                                 : pyrt_kv_ttl_ended(pool_, in_.below(9));
      case 2:
        if (pins_.empty() || any != 0) return pyrt_kv_unpin(pool_, any);
        return pyrt_kv_unpin(pool_, pins_[in_.below(255) % pins_.size()]);
      default: {
        const int64_t deadline = now_ + (static_cast<int64_t>(in_.take(2)) << in_.below(24));
        const pyrt_status status =
            pyrt_kv_pin(pool_, pick(), deadline, in_.below(9), &pins_.emplace_back());
        if (status != PYRT_OK) pins_.pop_back();
        return status;
      }
    }
  }

  pyrt_status batch() {
    std::vector<uint64_t> seqs;
    for (uint32_t n = in_.below(4); n > 0; --n) seqs.push_back(pick());
    std::vector<int32_t> table(seqs.size() * 64), slots(seqs.size()), lengths(seqs.size());
    int32_t *tables[2] = {table.data(), nullptr}, *slot[2] = {slots.data(), nullptr};
    pyrt_kv_batch* made = nullptr;
    const pyrt_status status = pyrt_kv_batch_create(pool_, seqs.data(), seqs.size(), tables, 64,
                                                    slot, lengths.data(), &made);
    partial_ = true;  // making a batch marks its rows
    if (status != PYRT_OK) return status;
    const std::vector<int32_t> tokens(seqs.size(), 1);
    for (uint32_t n = in_.below(20); n > 0; --n) {
      const pyrt_status advanced =
          pyrt_kv_batch_advance(made, tokens.data(), tokens.size(), nullptr);
      must(advanced == PYRT_OK || advanced == PYRT_EFULL || advanced == PYRT_EINVAL, "advance");
      must(pyrt_kv_check(pool_) == PYRT_OK, "the pool's own check after a step of a batch");
    }
    pyrt_kv_batch_destroy(made);
    return PYRT_OK;
  }

  Input& in_;
  pyrt_kv* pool_ = nullptr;
  uint32_t groups_ = 1, layers_ = 1;
  std::vector<Live> live_;
  std::vector<uint64_t> pins_;
  int64_t now_ = 0;
  bool partial_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  Fuzzer fuzzer(in);
  while (!in.empty()) fuzzer.call();
  return 0;
}
