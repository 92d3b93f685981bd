// The pool beside its peers, in one process: every round runs every contender once per workload, so
// that a ratio of two contenders compares neighbours in time. Prints JSON: nanoseconds per object
// got and put, by workload, contender and round.
//
//   pool_pairs ROUNDS SCALE PAGES LARGE [NAME=LIBRARY:malloc:free ...]
//
// SCALE divides the operations of a round; PAGES is 4k or thp; LARGE 1 adds the pool of 512 MiB.
// One thread: CPU time of the thread. Two threads, pinned to the first two cores allowed: wall
// time. DPDK, where it was compiled in (PAIR_DPDK), is inlined into its loops; everything else is
// called through a library, as its users call it, and once more with our single calls inlined.
// malloc has no bulk call: a loop is what users write.
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "pyruntime/pool_cache.hpp"
#include "pyruntime/pyruntime.h"

#ifdef PAIR_DPDK
#include <rte_eal.h>
#include <rte_lcore.h>
#include <rte_mempool.h>
#include <rte_version.h>
#endif

namespace {

constexpr size_t kObject = 2048;
constexpr size_t kObjects = 16384;
constexpr size_t kLargeObjects = 262144;
constexpr size_t kBulk = 32;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "pool_pairs: %s (%s)\n", what, pyrt_last_error());
  std::exit(1);
}

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

struct Library {
  pyrt_pool* pool = nullptr;
  void* get() const { return pyrt_pool_get(pool); }
  void put(void* object) const { pyrt_pool_put(pool, object); }
  bool get_bulk(void** out, size_t n) const { return pyrt_pool_get_bulk(pool, out, n) == PYRT_OK; }
  void put_bulk(void** objects, size_t n) const { pyrt_pool_put_bulk(pool, objects, n); }
};

struct Inlined {
  pyruntime::PoolCache* cache = nullptr;
  void* get() const { return cache->get(); }
  void put(void* object) const { cache->put(object); }
  bool get_bulk(void** out, size_t n) const { return cache->get_bulk(out, n) == PYRT_OK; }
  void put_bulk(void** objects, size_t n) const { cache->put_bulk(objects, n); }
};

// What has no bulk calls of its own.
template <class Single>
struct Looped : Single {
  using Single::Single;
  bool get_bulk(void** out, size_t n) {
    for (size_t i = 0; i < n; ++i) out[i] = Single::get();
    return true;
  }
  void put_bulk(void** objects, size_t n) {
    for (size_t i = 0; i < n; ++i) Single::put(objects[i]);
  }
};

struct Malloc {
  void* (*allocate)(size_t) = nullptr;
  void (*release)(void*) = nullptr;
  void* get() { return allocate(kObject); }
  void put(void* object) { release(object); }
};

struct Pmr {
  std::shared_ptr<std::pmr::synchronized_pool_resource> resource =
      std::make_shared<std::pmr::synchronized_pool_resource>();
  void* get() { return resource->allocate(kObject); }
  void put(void* object) { resource->deallocate(object, kObject); }
};

// A free list under a mutex, as most hand-written pools are; its bulk calls lock once.
struct Locked {
  struct State {
    std::mutex mutex;
    std::vector<void*> free;
    std::unique_ptr<char[]> memory{new char[kObjects * kObject]};
    State() {
      for (size_t i = 0; i < kObjects; ++i) free.push_back(memory.get() + i * kObject);
    }
  };
  std::shared_ptr<State> state = std::make_shared<State>();
  void* get() {
    void* object;
    get_bulk(&object, 1);
    return object;
  }
  void put(void* object) { put_bulk(&object, 1); }
  bool get_bulk(void** out, size_t n) {
    const std::scoped_lock lock(state->mutex);
    std::memcpy(out, state->free.data() + state->free.size() - n, n * sizeof *out);
    state->free.resize(state->free.size() - n);
    return true;
  }
  void put_bulk(void** objects, size_t n) {
    const std::scoped_lock lock(state->mutex);
    state->free.insert(state->free.end(), objects, objects + n);
  }
};

#ifdef PAIR_DPDK
struct Dpdk {
  rte_mempool* pool = nullptr;
  void* get() const {
    void* object = nullptr;
    rte_mempool_get(pool, &object);
    return object;
  }
  void put(void* object) const { rte_mempool_put(pool, object); }
  bool get_bulk(void** out, size_t n) const {
    return rte_mempool_get_bulk(pool, out, static_cast<unsigned>(n)) == 0;
  }
  void put_bulk(void** objects, size_t n) const {
    rte_mempool_put_bulk(pool, objects, static_cast<unsigned>(n));
  }
};

bool has_dpdk = true;  // false when it gets no memory

Dpdk dpdk(const char* name, const char* ops, size_t objects, unsigned cache) {
  Dpdk d;
  d.pool = rte_mempool_create_empty(name, static_cast<unsigned>(objects), kObject, cache, 0, 0, 0);
  if (d.pool == nullptr || rte_mempool_set_ops_byname(d.pool, ops, nullptr) != 0 ||
      rte_mempool_populate_default(d.pool) < 0) {
    has_dpdk = false;
  }
  return d;
}
#endif

// DPDK pins the main thread, so what was allowed is read before.
cpu_set_t allowed;

// DPDK gives a thread without an identity no cache.
void begin_thread(int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && seen++ == core) CPU_SET(cpu, &one);
  }
  if (CPU_COUNT(&one) == 1) pthread_setaffinity_np(pthread_self(), sizeof one, &one);
#ifdef PAIR_DPDK
  if (has_dpdk && rte_thread_register() != 0) die("DPDK registers no thread");
#endif
}

void end_thread() {
#ifdef PAIR_DPDK
  if (has_dpdk) rte_thread_unregister();
#endif
}

// Touches the object, as its user would.
inline void touch(void* object) { *static_cast<volatile uint64_t*>(object) = 1; }

template <class C>
double hot(C& c, size_t ops) {
  const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
  for (size_t i = 0; i < ops; ++i) {
    void* const object = c.get();
    touch(object);
    c.put(object);
  }
  return (seconds(CLOCK_THREAD_CPUTIME_ID) - start) / static_cast<double>(ops);
}

template <class C>
double window(C& c, size_t ops) {
  void* held[64];
  for (void*& object : held) object = c.get();
  const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
  for (size_t i = 0; i < ops; ++i) {
    void*& place = held[i % 64];
    c.put(place);
    place = c.get();
    touch(place);
  }
  const double took = seconds(CLOCK_THREAD_CPUTIME_ID) - start;
  for (void* object : held) c.put(object);
  return took / static_cast<double>(ops);
}

template <class C>
void bursts(C& c, size_t burst, size_t times) {
  std::vector<void*> held(burst);
  for (size_t t = 0; t < times; ++t) {
    for (size_t i = 0; i < burst; i += kBulk) {
      if (!c.get_bulk(held.data() + i, kBulk)) die("a pool is exhausted");
    }
    for (size_t i = 0; i < burst; i += kBulk) c.put_bulk(held.data() + i, kBulk);
  }
}

template <class C>
double burst(C& c, size_t size, size_t ops) {
  bursts(c, size, 1);
  const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
  bursts(c, size, ops / size);
  return (seconds(CLOCK_THREAD_CPUTIME_ID) - start) / static_cast<double>(ops / size * size);
}

// Runs both at once, from a common start, on threads that live for all rounds.
class Pair {
 public:
  Pair() {
    for (int i = 0; i < 2; ++i) {
      threads_.emplace_back([this, i] {
        begin_thread(i);
        for (uint32_t seen = 0;;) {
          round_.wait(seen);
          seen = round_;
          if (!work_[i]) break;
          ++ready_;
          while (ready_ < 2) {
          }
          work_[i]();
          if (--busy_ == 0) busy_.notify_one();
        }
        end_thread();
      });
    }
  }
  ~Pair() {
    work_[0] = work_[1] = nullptr;
    ++round_;
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  double run(std::function<void()> first, std::function<void()> second) {
    work_[0] = std::move(first);
    work_[1] = std::move(second);
    ready_ = 0;
    busy_ = 2;
    const double start = seconds(CLOCK_MONOTONIC);
    ++round_;
    round_.notify_all();
    for (int left = busy_; left != 0; left = busy_) busy_.wait(left);
    return seconds(CLOCK_MONOTONIC) - start;
  }

 private:
  std::function<void()> work_[2];
  std::atomic<uint32_t> round_{0};
  std::atomic<int> ready_{0};
  std::atomic<int> busy_{0};
  std::vector<std::thread> threads_;
};

template <class C>
double two(Pair& pair, C& c, size_t ops) {
  const auto work = [&] { bursts(c, 1024, ops / 1024); };
  return pair.run(work, work) / static_cast<double>(ops / 1024 * 1024);
}

// One producer, one consumer, batches of kBulk in a ring of 64.
struct Ring {
  static constexpr size_t kSlots = 64;
  void* slots[kSlots][kBulk];
  alignas(128) std::atomic<size_t> head{0};
  alignas(128) std::atomic<size_t> tail{0};
};

// get and put are called on a batch at either end; without them it is the ring's own cost.
template <class Get, class Put>
double hand_over(Pair& pair, Get&& get, Put&& put, size_t ops) {
  const auto ring = std::make_unique<Ring>();
  const size_t batches = ops / kBulk;
  const auto produce = [&] {
    for (size_t i = 0; i < batches; ++i) {
      while (i - ring->tail.load(std::memory_order_acquire) == Ring::kSlots) {
      }
      void** batch = ring->slots[i % Ring::kSlots];
      get(batch);
      for (size_t k = 0; k < kBulk; ++k) touch(batch[k]);
      ring->head.store(i + 1, std::memory_order_release);
    }
  };
  const auto consume = [&] {
    for (size_t i = 0; i < batches; ++i) {
      while (ring->head.load(std::memory_order_acquire) == i) {
      }
      void** batch = ring->slots[i % Ring::kSlots];
      for (size_t k = 0; k < kBulk; ++k) touch(batch[k]);
      put(batch);
      ring->tail.store(i + 1, std::memory_order_release);
    }
  };
  return pair.run(produce, consume) / static_cast<double>(batches * kBulk);
}

template <class C>
double producer_consumer(Pair& pair, C& c, size_t ops) {
  return hand_over(
      pair,
      [&](void** batch) {
        while (!c.get_bulk(batch, kBulk)) {
        }
      },
      [&](void** batch) { c.put_bulk(batch, kBulk); }, ops);
}

struct Runner {
  Pair pair;
  size_t scale;
  std::map<std::string, std::map<std::string, std::vector<double>>> results;

  void add(const char* workload, const std::string& name, double value) {
    results[workload][name].push_back(value * 1e9);
  }
  template <class C>
  void one_thread(const std::string& name, C& c, size_t slow) {
    const size_t ops = 1'000'000 / scale / slow;
    add("hot", name, hot(c, ops));
    add("window 64", name, window(c, ops));
    add("bulk 32", name, burst(c, 32, 4 * ops));
    add("burst 1024", name, burst(c, 1024, 4 * ops));
  }
  template <class C>
  void all(const std::string& name, C& c, size_t slow) {
    const size_t ops = 1'000'000 / scale / slow;
    one_thread(name, c, slow);
    add("two threads, burst 1024", name, two(pair, c, 4 * ops));
    add("producer and consumer", name, producer_consumer(pair, c, ops));
  }
};

pyrt_pool* make_pool(size_t objects, bool thp) {
  pyrt_pool_options options;
  pyrt_pool_options_init(&options);
  options.object_bytes = kObject;
  options.capacity = objects;
  options.pages = thp ? PYRT_PAGES_THP : PYRT_PAGES_4K;
  options.prefault = PYRT_PREFAULT_SYNC;
  pyrt_pool* pool = nullptr;
  if (pyrt_pool_create(&options, &pool) != PYRT_OK) die("no pool");
  return pool;
}

// Nanoseconds of single gets by quantile, those of the clock's own call included; bursts of 1024
// out and back, so that the depot takes part.
struct Tail {
  double median, p9999, most;
};
Tail acquire_tail(pyrt_pool* pool, size_t n) {
  std::vector<double> taken;
  std::array<void*, 1024> objects;
  while (taken.size() < n) {
    for (void*& object : objects) {
      const double begin = seconds(CLOCK_MONOTONIC);
      object = pyrt_pool_get(pool);
      taken.push_back((seconds(CLOCK_MONOTONIC) - begin) * 1e9);
    }
    for (void* object : objects) pyrt_pool_put(pool, object);
  }
  std::sort(taken.begin(), taken.end());
  return {taken[taken.size() / 2], taken[taken.size() - 1 - taken.size() / 10'000], taken.back()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) die("arguments: ROUNDS SCALE PAGES LARGE [NAME=LIBRARY:malloc:free ...]");
  sched_getaffinity(0, sizeof allowed, &allowed);
  const int rounds = std::atoi(argv[1]);
  const bool thp = std::string(argv[3]) == "thp";
  const bool large = std::string(argv[4]) == "1";
#ifdef PAIR_DPDK
  std::vector<std::string> eal{"pool_pairs",  "--in-memory", "--no-pci", "--no-telemetry",
                               "--log-level", "lib.eal:3",   "-l",       "0"};
  if (!thp) eal.insert(eal.end(), {"--no-huge", "-m", large ? "1500" : "300"});
  std::vector<char*> eal_argv;
  for (std::string& word : eal) eal_argv.push_back(word.data());
  has_dpdk = rte_eal_init(static_cast<int>(eal_argv.size()), eal_argv.data()) >= 0;
  Dpdk rings[2], stack, large_ring;
  if (has_dpdk) {
    rings[0] = dpdk("c512", "ring_mp_mc", kObjects, 512);
    rings[1] = dpdk("c256", "ring_mp_mc", kObjects, 256);
    stack = dpdk("stack", "lf_stack", kObjects, 512);
    if (large) large_ring = dpdk("large", "ring_mp_mc", kLargeObjects, 512);
  }
#endif
  std::vector<std::pair<std::string, Looped<Malloc>>> allocators;
  for (int i = 5; i < argc; ++i) {
    std::string word = argv[i];
    const auto take = [&](char end) {
      const size_t at = word.find(end);
      const std::string part = word.substr(0, at);
      word = at == std::string::npos ? "" : word.substr(at + 1);
      return part;
    };
    const std::string name = take('='), path = take(':'), allocate = take(':'), release = word;
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) die(dlerror());
    Looped<Malloc> m;
    m.allocate = reinterpret_cast<void* (*)(size_t)>(dlsym(library, allocate.c_str()));
    m.release = reinterpret_cast<void (*)(void*)>(dlsym(library, release.c_str()));
    if (m.allocate == nullptr || m.release == nullptr) die("a library lacks malloc or free");
    allocators.emplace_back(name, m);
  }
  Looped<Malloc> glibc;
  glibc.allocate = [](size_t bytes) {
    void* object = std::malloc(bytes);
    asm volatile("" : "+r"(object));  // or the pair is optimised away
    return object;
  };
  glibc.release = [](void* object) { std::free(object); };
  allocators.emplace_back("glibc", glibc);
  Looped<Pmr> pmr;
  Locked locked;
  Library ours{make_pool(kObjects, thp)};
  pyruntime::PoolCache cache(ours.pool);
  Inlined inlined{&cache};
  Library ours_large{large ? make_pool(kLargeObjects, thp) : nullptr};
  Runner r;
  r.scale = static_cast<size_t>(std::atoi(argv[2]));
  begin_thread(0);
  std::vector<std::array<char, kObject>> fixed(kBulk);
  for (int round = 0; round < rounds; ++round) {
    r.all("pyruntime", ours, 1);
    r.one_thread("pyruntime inlined", inlined, 1);
#ifdef PAIR_DPDK
    if (has_dpdk) {
      r.all("DPDK ring c=512", rings[0], 1);
      r.all("DPDK ring c=256", rings[1], 1);
      r.all("DPDK lf_stack", stack, 1);
    }
#endif
    for (auto& [name, allocator] : allocators) r.all(name, allocator, 10);
    r.all("std::pmr::synchronized_pool", pmr, 10);
    r.all("mutex pool", locked, 10);
    const auto fill = [&](void** batch) {
      for (size_t k = 0; k < kBulk; ++k) batch[k] = fixed[k].data();
    };
    const size_t ops = 1'000'000 / r.scale;
    r.add("producer and consumer", "ring alone", hand_over(r.pair, fill, [](void**) {}, ops));
    if (large) {
      r.add("producer and consumer, 512 MiB", "pyruntime",
            producer_consumer(r.pair, ours_large, ops));
#ifdef PAIR_DPDK
      if (has_dpdk) {
        r.add("producer and consumer, 512 MiB", "DPDK ring c=512",
              producer_consumer(r.pair, large_ring, ops));
      }
#endif
    }
  }
  const Tail tail = acquire_tail(ours.pool, 2'000'000 / r.scale);
  std::printf("{\"acquire_ns\": {\"median\": %.0f, \"p99.99\": %.0f, \"max\": %.0f}, ", tail.median,
              tail.p9999, tail.most);
  std::printf("\"dpdk\": ");
#ifdef PAIR_DPDK
  std::printf("\"%s%s\"", rte_version(), has_dpdk ? "" : ": no memory, set vm.nr_hugepages");
#else
  std::printf("null");
#endif
  pyrt_pool_statistics s{};
  s.struct_size = sizeof s;
  pyrt_pool_get_statistics(ours.pool, &s);
  std::printf(", \"huge_bytes\": %llu, \"committed_bytes\": %llu, \"ns\": {",
              static_cast<unsigned long long>(s.huge_bytes),
              static_cast<unsigned long long>(s.committed_bytes));
  const char* comma = "";
  for (const auto& [workload, contenders] : r.results) {
    std::printf("%s\"%s\": {", comma, workload.c_str());
    comma = "";
    for (const auto& [name, values] : contenders) {
      std::printf("%s\"%s\": [", comma, name.c_str());
      comma = "";
      for (const double value : values) {
        std::printf("%s%.4f", comma, value);
        comma = ", ";
      }
      std::printf("]");
      comma = ", ";
    }
    std::printf("}");
    comma = ", ";
  }
  std::printf("}}\n");
  std::fflush(stdout);
  std::_Exit(0);  // peers that were loaded have destructors of their own ideas
}
