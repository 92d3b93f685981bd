// Every interleaving of a few threads on the depot's stack, by explicit exploration of its states.
//
// The stack's atomic type is a template parameter; here each of its operations is a step that the
// explorer schedules. A thread's program is deterministic given what it read, so a thread's state
// is its history of results: a step runs the program again from the start, feeds it its history,
// lets one new operation touch the shared words, and leaves before the next one. States already
// seen are not explored again. What is explored is sequentially consistent execution only: weaker
// orders are ThreadSanitizer's subject (stress_pool.cpp).
//
// Property: a magazine is never handed out while somebody owns it, and at the end each is owned
// once or in the stack once. With a 2-bit tag four operations bring a head back and the explorer
// must find the double hand-out; at full width it must find none.
#include <gtest/gtest.h>

#include <csetjmp>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

#include "pool/depot.hpp"

namespace {

using pyruntime::pool::TaggedStack;

constexpr int kPop = 0;
constexpr int kPushSpare = -1;

// What a step may change: snapshots of it are the explorer's states.
struct World {
  std::vector<uint64_t> words;                   // the atomics
  std::vector<int> owner;                        // by magazine: thread, or -1 while in the stack
  std::vector<std::vector<uint64_t>> histories;  // by thread
  std::vector<bool> finished;
  bool violated = false;
};

// The machine the model's atomics run on: one step of one thread at a time.
struct Machine {
  World* world = nullptr;
  size_t thread = 0;
  size_t cursor = 0;     // into the thread's history
  bool stepped = false;  // its one new operation is done
  std::jmp_buf leave;

  std::vector<uint64_t>& history() { return world->histories[thread]; }
};
Machine machine;

// One scheduled operation. Frames that longjmp skips hold nothing to destroy.
template <class Body>
uint64_t operation(Body body) {
  auto& history = machine.history();
  if (machine.cursor < history.size()) return history[machine.cursor++];
  if (machine.stepped) std::longjmp(machine.leave, 1);
  machine.stepped = true;
  history.push_back(body(machine.world->words));
  return history[machine.cursor++];
}

// Bookkeeping between operations: part of the step before it, and done once.
template <class Body>
void note(Body body) {
  auto& history = machine.history();
  if (machine.cursor == history.size()) {
    body(*machine.world);
    history.push_back(~uint64_t{0});
  }
  ++machine.cursor;
}

template <class T>
class ModelAtomic {
 public:
  explicit ModelAtomic(size_t word) : word_(word) {}

  T load(std::memory_order) const {
    return static_cast<T>(operation([this](auto& words) { return words[word_]; }));
  }
  void store(T value, std::memory_order) {
    operation([&](auto& words) { return words[word_] = value; });
  }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order, std::memory_order) {
    const T found = static_cast<T>(operation([&](auto& words) {
      const uint64_t before = words[word_];
      if (before == expected) words[word_] = desired;
      return before;
    }));
    if (found == expected) return true;
    expected = found;
    return false;
  }

 private:
  size_t word_;
};

// Word 0 is the head (TaggedStack constructs it with 0), word i the link of magazine i.
template <unsigned TagBits>
class Model {
 public:
  using Stack = TaggedStack<ModelAtomic, TagBits>;
  using Program = std::vector<int>;  // kPop, kPushSpare, or n: push what the n-th pop gave

  // `stacked` magazines lie in the stack, 1 on top; thread t also owns magazine stacked + 1 + t if
  // `spares`.
  Model(uint32_t stacked, bool spares, std::vector<Program> programs)
      : stacked_(stacked), programs_(std::move(programs)) {
    const size_t magazines = stacked + (spares ? programs_.size() : 0);
    for (size_t i = 0; i <= magazines; ++i) links_.emplace_back(i);
    start_.words.resize(magazines + 1);
    start_.owner.assign(magazines + 1, -1);
    start_.histories.resize(programs_.size());
    start_.finished.resize(programs_.size());
    start_.words[0] = stacked == 0 ? 0 : 1;
    for (uint32_t i = 1; i <= stacked; ++i) start_.words[i] = i == stacked ? 0 : i + 1;
    for (size_t t = 0; spares && t < programs_.size(); ++t) {
      start_.owner[stacked + 1 + t] = static_cast<int>(t);
    }
  }

  // True when some interleaving violates the property.
  bool explore() {
    seen_.clear();
    std::vector<World> pending{start_};
    while (!pending.empty()) {
      const World world = std::move(pending.back());
      pending.pop_back();
      bool running = false;
      for (size_t t = 0; t < programs_.size(); ++t) {
        if (world.finished[t]) continue;
        running = true;
        World next = world;
        step(next, t);
        if (next.violated) return true;
        if (seen_.insert(name_of(next)).second) pending.push_back(std::move(next));
      }
      if (!running && !consistent(world)) return true;
    }
    return false;
  }
  size_t num_states() const { return seen_.size(); }

 private:
  void step(World& world, size_t thread) {
    machine.world = &world;
    machine.thread = thread;
    machine.cursor = 0;
    machine.stepped = false;
    if (setjmp(machine.leave) == 0) {
      run(thread);
      world.finished[thread] = true;
    }
  }

  void run(size_t thread) {
    uint32_t popped[8] = {};
    size_t count = 0;
    const auto link = [this](uint32_t i) -> ModelAtomic<uint32_t>& { return links_[i]; };
    for (const int action : programs_[thread]) {
      if (action == kPop) {
        const uint32_t got = stack_.pop(link);
        note([&](World& world) {
          if (got == 0) return;
          world.violated |= world.owner[got] != -1;
          world.owner[got] = static_cast<int>(thread);
        });
        popped[count++] = got;
        continue;
      }
      const auto given = action == kPushSpare ? stacked_ + 1 + static_cast<uint32_t>(thread)
                                              : popped[static_cast<size_t>(action) - 1];
      if (given == 0) continue;
      note([&](World& world) { world.owner[given] = -1; });
      stack_.push(given, link);
    }
  }

  bool consistent(const World& world) const {
    std::vector<bool> in_stack(world.owner.size());
    for (uint64_t at = world.words[0] & Stack::kIndexMask; at != 0; at = world.words[at]) {
      if (in_stack[at]) return false;
      in_stack[at] = true;
    }
    for (size_t i = 1; i < world.owner.size(); ++i) {
      if (in_stack[i] != (world.owner[i] == -1)) return false;
    }
    return true;
  }

  static std::string name_of(const World& world) {
    std::string name;
    const auto add = [&](const std::vector<uint64_t>& values) {
      const uint64_t size = values.size();
      name.append(reinterpret_cast<const char*>(&size), sizeof size);
      name.append(reinterpret_cast<const char*>(values.data()), size * sizeof(uint64_t));
    };
    add(world.words);
    for (const auto& history : world.histories) add(history);
    return name;
  }

  uint32_t stacked_;
  std::vector<Program> programs_;
  Stack stack_;
  std::vector<ModelAtomic<uint32_t>> links_;
  World start_;
  std::unordered_set<std::string> seen_;
};

// One thread pops while another brings the same top back with what was under it taken away: two
// pops and two pushes, which is what a 2-bit tag cannot tell from nothing.
const std::vector<std::vector<int>> kAba{{kPop}, {kPop, kPop, kPushSpare, 1}};

TEST(DepotModel, FindsThePlantedAbaWithATwoBitTag) {
  Model<2> model(2, true, kAba);
  EXPECT_TRUE(model.explore());
}

TEST(DepotModel, FullWidthHasNoAba) {
  Model<40> model(2, true, kAba);
  EXPECT_FALSE(model.explore());
  EXPECT_GT(model.num_states(), 100u);
}

TEST(DepotModel, ThreeThreadsExchangeMagazines) {
  Model<40> model(2, false, {{kPop, 1}, {kPop, 1}, {kPop, 1}});
  EXPECT_FALSE(model.explore());
  EXPECT_GT(model.num_states(), 1000u);
}

TEST(DepotModel, ThreeThreadsWithFewerMagazinesThanThreads) {
  Model<40> model(0, true, {{kPushSpare, kPop}, {kPop, 1}, {kPop}});
  EXPECT_FALSE(model.explore());
}

TEST(DepotModel, TwoThreadsAnyOrderOfPopsAndPushes) {
  Model<40> model(3, true, {{kPop, kPop, 1, kPushSpare}, {kPop, kPushSpare, kPop, 2}});
  EXPECT_FALSE(model.explore());
}

}  // namespace
