// The shim's scheduler. Compiled without sanitizer instrumentation (its bookkeeping would be
// noise); it talks to the sanitizers through their interfaces, which are weak: absent in a plain
// build.
#include "cuda/shim/cuda_host.hpp"

#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) || defined(PYRT_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber(void);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack_save,
                                                          const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack_save,
                                                           const void** old_bottom,
                                                           size_t* old_size);
}

namespace pyruntime::shim {
namespace {

// Room for a sanitizer's report, which runs on the stack of the thread at fault.
constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kNoSync = 1;  // switching fibers orders nothing

std::atomic<uint64_t> schedule_seed{0};

// One stack's point of execution. Written out for x86-64: swapcontext makes two system calls, and
// AddressSanitizer's interceptor of it warns and wipes the stack's poison.
#if defined(__x86_64__) && !defined(PYRT_SHIM_UCONTEXT)
extern "C" void pyrt_shim_switch(void** save, void* load);
__asm__(R"(
  .text
  .hidden pyrt_shim_switch
  .type pyrt_shim_switch, @function
pyrt_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size pyrt_shim_switch, . - pyrt_shim_switch
)");

class Context {
 public:
  void start_at(void (*entry)(), char* stack, size_t bytes) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // no return address: entry never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(const Context& other) { pyrt_shim_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void start_at(void (*entry)(), char* stack, size_t bytes) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(const Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#endif

// ThreadSanitizer's contexts of fibers cost half a millisecond each, so they are kept for the next
// launch. A launch takes and returns them as a whole: one that moved between the workers of a
// launch would order their blocks.
class TsanFibers {
 public:
  std::vector<void*> take(size_t n) {
    lock();
    const size_t kept = std::min(n, free_.size());
    std::vector<void*> taken(free_.end() - static_cast<ptrdiff_t>(kept), free_.end());
    free_.resize(free_.size() - kept);
    lock_.clear(std::memory_order_release);
    while (taken.size() < n) taken.push_back(__tsan_create_fiber(0));
    return taken;
  }
  void give_back(const std::vector<void*>& fibers) {
    lock();
    free_.insert(free_.end(), fibers.begin(), fibers.end());
    lock_.clear(std::memory_order_release);
  }

 private:
  // Not a mutex, which ThreadSanitizer would take for an order between launching threads.
  void lock() {
    while (lock_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  std::atomic_flag lock_;
  std::vector<void*> free_;
};

enum class State : uint8_t { ready, at_block_barrier, in_warp_op, done };

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  State state = State::done;
  uint3 index{};
  unsigned linear = 0;
  unsigned block_result = 0;
  uint32_t mask = 0;
  WarpOp op{};
  WarpValues values{};
};

// Runs the blocks of one OS thread.
class Worker {
 public:
  Worker(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
         void* const* tsan_fibers);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run_block(uint64_t index);
  void fiber_main();

  void suspend();
  unsigned block_barrier(int value);
  const WarpValues& warp_exchange(uint32_t mask, WarpOp op, uint64_t value);
  void* shared() const { return shared_.get(); }
  const Fiber& current() const { return *current_; }

 private:
  void resume(Fiber& fiber);
  void switch_out(Fiber& fiber, bool for_good);
  void finish_block_barrier_if_full();
  bool finish_warp_op_if_full(unsigned warp, uint32_t mask);
  void order(Fiber* const* fibers, size_t n);
  [[noreturn]] void stuck() const;
  [[noreturn]] void give_up(const char* what) const;

  void (*body_)(void*);
  void* context_;
  std::unique_ptr<unsigned char[]> shared_;  // of the exact size, so that ASan guards its end
  unsigned num_threads_;
  std::unique_ptr<Fiber[]> fibers_;
  std::vector<Fiber*> order_of_turns_;
  char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  size_t stack_stride_ = 0;

  Context scheduler_;
  void* scheduler_tsan_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;

  Fiber* current_ = nullptr;
  bool stopping_ = false;
  unsigned running_ = 0;
  unsigned at_barrier_ = 0;
  unsigned barrier_votes_ = 0;
  uint64_t random_;
  char blocks_in_turn_ = 0;  // its address stands for "the previous block of this worker ended"
};

thread_local Worker* worker = nullptr;

void fiber_entry() { worker->fiber_main(); }

void* tsan_switch(void* fiber) {
  void* before = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, kNoSync);
  return before;
}

Worker::Worker(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
               void* const* tsan_fibers)
    : body_(body),
      context_(context),
      shared_(shared_bytes == 0 ? nullptr : new unsigned char[shared_bytes]),
      num_threads_(block.x * block.y * block.z),
      fibers_(new Fiber[num_threads_]),
      random_(schedule_seed.load(std::memory_order_relaxed)) {
  worker = this;
  blockDim = block;
  gridDim = grid;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  stack_stride_ = kStackBytes + page;
  stacks_bytes_ = stack_stride_ * num_threads_;
  void* memory = mmap(nullptr, stacks_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) give_up("no memory for the stacks of a block");
  stacks_ = static_cast<char*>(memory);
  if (__tsan_get_current_fiber != nullptr) scheduler_tsan_ = __tsan_get_current_fiber();
  for (unsigned i = 0; i < num_threads_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.linear = i;
    fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    fiber.stack = stacks_ + i * stack_stride_ + page;
    mprotect(fiber.stack - page, page, PROT_NONE);
    if (scheduler_tsan_ != nullptr) fiber.tsan = tsan_fibers[i];
    fiber.context.start_at(fiber_entry, fiber.stack, kStackBytes);
    order_of_turns_.push_back(&fiber);
  }
  if (scheduler_tsan_ != nullptr) __tsan_release(&blocks_in_turn_);  // what led to this launch
}

Worker::~Worker() {
  stopping_ = true;
  for (unsigned i = 0; i < num_threads_; ++i) resume(fibers_[i]);
  if (scheduler_tsan_ != nullptr) __tsan_acquire(&blocks_in_turn_);
  munmap(stacks_, stacks_bytes_);
  worker = nullptr;
}

void Worker::run_block(uint64_t index) {
  blockIdx = {static_cast<unsigned>(index % gridDim.x),
              static_cast<unsigned>(index / gridDim.x % gridDim.y),
              static_cast<unsigned>(index / gridDim.x / gridDim.y)};
  running_ = num_threads_;
  at_barrier_ = barrier_votes_ = 0;
  for (unsigned i = 0; i < num_threads_; ++i) {
    fibers_[i].state = State::ready;
    if (scheduler_tsan_ == nullptr) continue;
    tsan_switch(fibers_[i].tsan);
    __tsan_acquire(&blocks_in_turn_);
  }
  if (scheduler_tsan_ != nullptr) tsan_switch(scheduler_tsan_);
  while (running_ != 0) {
    if (random_ != 0) {
      for (size_t i = order_of_turns_.size(); i > 1; --i) {
        random_ = random_ * 6364136223846793005u + 1442695040888963407u;
        std::swap(order_of_turns_[i - 1], order_of_turns_[(random_ >> 33) % i]);
      }
    }
    bool progress = false;
    for (Fiber* fiber : order_of_turns_) {
      if (fiber->state != State::ready) continue;
      progress = true;
      resume(*fiber);
    }
    if (!progress && running_ != 0) stuck();
  }
  if (scheduler_tsan_ != nullptr) {
    for (unsigned i = 0; i < num_threads_; ++i) {
      tsan_switch(fibers_[i].tsan);
      __tsan_release(&blocks_in_turn_);
    }
    tsan_switch(scheduler_tsan_);
  }
}

void Worker::resume(Fiber& fiber) {
  current_ = &fiber;
  threadIdx = fiber.index;
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack, kStackBytes);
  }
  if (scheduler_tsan_ != nullptr) tsan_switch(fiber.tsan);
  scheduler_.switch_to(fiber.context);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
  }
}

void Worker::switch_out(Fiber& fiber, bool for_good) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
  }
  if (scheduler_tsan_ != nullptr) tsan_switch(scheduler_tsan_);
  fiber.context.switch_to(scheduler_);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }
}

void Worker::suspend() { switch_out(*current_, false); }

void Worker::fiber_main() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
  }
  Fiber& self = *current_;
  while (!stopping_) {
    body_(context_);
    self.state = State::done;
    --running_;
    finish_block_barrier_if_full();
    const unsigned warp = self.linear / 32;
    const unsigned end = std::min(num_threads_, warp * 32 + 32);
    for (unsigned i = warp * 32; i < end; ++i) {
      if (fibers_[i].state == State::in_warp_op) finish_warp_op_if_full(warp, fibers_[i].mask);
    }
    switch_out(self, false);
  }
  switch_out(self, true);
  std::abort();  // not reached: a stopped fiber is never resumed
}

unsigned Worker::block_barrier(int value) {
  Fiber& self = *current_;
  self.state = State::at_block_barrier;
  ++at_barrier_;
  barrier_votes_ += value != 0;
  finish_block_barrier_if_full();
  if (self.state != State::ready) suspend();
  return self.block_result;
}

void Worker::finish_block_barrier_if_full() {
  if (at_barrier_ == 0 || at_barrier_ != running_) return;
  std::vector<Fiber*> waiting;
  for (unsigned i = 0; i < num_threads_; ++i) {
    if (fibers_[i].state != State::at_block_barrier) continue;
    fibers_[i].state = State::ready;
    fibers_[i].block_result = barrier_votes_;
    waiting.push_back(&fibers_[i]);
  }
  at_barrier_ = barrier_votes_ = 0;
  order(waiting.data(), waiting.size());
}

const WarpValues& Worker::warp_exchange(uint32_t mask, WarpOp op, uint64_t value) {
  Fiber& self = *current_;
  const unsigned lane = self.linear % 32;
  if (!(mask >> lane & 1)) give_up("a lane is not in the mask of its own warp operation");
  self.state = State::in_warp_op;
  self.mask = mask;
  self.op = op;
  self.values.value[lane] = value;
  if (!finish_warp_op_if_full(self.linear / 32, mask)) suspend();
  return self.values;
}

bool Worker::finish_warp_op_if_full(unsigned warp, uint32_t mask) {
  Fiber* taking_part[32];
  unsigned n = 0;
  const unsigned first = warp * 32, end = std::min(num_threads_, first + 32);
  for (unsigned i = first; i < end; ++i) {
    Fiber& fiber = fibers_[i];
    if (!(mask >> (i - first) & 1) || fiber.state == State::done) continue;
    if (fiber.state != State::in_warp_op || fiber.mask != mask) return false;
    taking_part[n++] = &fiber;
  }
  WarpValues all;
  std::fill(std::begin(all.value), std::end(all.value), kPoison);
  all.lanes = 0;
  for (unsigned i = 0; i < n; ++i) {
    if (taking_part[i]->op != taking_part[0]->op) {
      give_up("lanes of one mask meet in different warp operations");
    }
    const unsigned lane = taking_part[i]->linear % 32;
    all.value[lane] = taking_part[i]->values.value[lane];
    all.lanes |= 1u << lane;
  }
  for (unsigned i = 0; i < n; ++i) {
    taking_part[i]->values = all;
    taking_part[i]->state = State::ready;
  }
  if (taking_part[0]->op == WarpOp::sync) order(taking_part, n);
  return true;
}

// Everything these fibers did so far happens before what any of them does next. A sync object of
// its own, because an old one would also order what others released into it.
void Worker::order(Fiber* const* fibers, size_t n) {
  if (scheduler_tsan_ == nullptr) return;
  void* meeting = std::malloc(1);
  void* here = __tsan_get_current_fiber();
  for (size_t i = 0; i < n; ++i) {
    tsan_switch(fibers[i]->tsan);
    __tsan_release(meeting);
  }
  for (size_t i = 0; i < n; ++i) {
    tsan_switch(fibers[i]->tsan);
    __tsan_acquire(meeting);
  }
  tsan_switch(here);
  std::free(meeting);
}

void Worker::stuck() const {
  std::fprintf(
      stderr,
      "cuda shim: block (%u, %u, %u) cannot go on: of %u threads %u returned, %u wait at a "
      "block barrier\n",
      blockIdx.x, blockIdx.y, blockIdx.z, num_threads_, num_threads_ - running_, at_barrier_);
  for (unsigned i = 0; i < num_threads_; ++i) {
    if (fibers_[i].state != State::in_warp_op) continue;
    std::fprintf(stderr, "cuda shim: thread %u waits in a warp operation with mask 0x%08x\n", i,
                 fibers_[i].mask);
  }
  std::abort();
}

void Worker::give_up(const char* what) const {
  std::fprintf(stderr, "cuda shim: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

Worker& running_worker(const char* what) {
  if (worker == nullptr) {
    std::fprintf(stderr, "cuda shim: %s outside of a kernel\n", what);
    std::abort();
  }
  return *worker;
}

}  // namespace

void set_schedule(uint64_t seed) noexcept { schedule_seed.store(seed, std::memory_order_relaxed); }

int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > 48 << 10) {
    return kInvalidConfiguration;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t workers = std::min<uint64_t>(blocks, kWorkers);
  static TsanFibers kept_fibers;
  std::vector<void*> tsan_fibers;
  if (__tsan_create_fiber != nullptr) tsan_fibers = kept_fibers.take(workers * threads);
  std::vector<std::thread> os_threads;
  for (uint64_t w = 0; w < workers; ++w) {
    os_threads.emplace_back([=, &tsan_fibers] {
      Worker mine(grid, block, shared_bytes, body, context, tsan_fibers.data() + w * threads);
      for (uint64_t index = w; index < blocks; index += workers) mine.run_block(index);
    });
  }
  for (std::thread& thread : os_threads) thread.join();
  kept_fibers.give_back(tsan_fibers);
  return 0;
}

void* dynamic_shared() noexcept { return running_worker("dynamic shared memory").shared(); }

void yield() {
  std::this_thread::yield();  // what it waits for may be a block of another worker
  running_worker("dev::pause").suspend();
}

unsigned block_barrier(int value) { return running_worker("a block barrier").block_barrier(value); }

const WarpValues& warp_exchange(uint32_t mask, WarpOp op, uint64_t value) {
  return running_worker("a warp operation").warp_exchange(mask, op, value);
}

unsigned lane() noexcept { return running_worker("a lane number").current().linear % 32; }

}  // namespace pyruntime::shim
