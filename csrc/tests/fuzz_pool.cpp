// The pool's C ABI driven by bytes: a header of options, then one call per opcode. A model of the
// objects that are out says what each call must return; the pool's own check says whether its state
// still adds up.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "support/fuzz_input.hpp"

namespace {

using pyruntime::fuzz::Input;
using pyruntime::fuzz::must;

// Any options at all: the pool is made or the reason is one of the documented ones.
pyrt_pool* any_options(Input& in, const uint64_t small) {
  pyrt_pool_options options;
  pyrt_pool_options_init(&options);
  options.struct_size =
      static_cast<uint32_t>(in.take(1)) % 2 ? sizeof options : static_cast<uint32_t>(in.take(4));
  options.struct_size = std::min<uint32_t>(options.struct_size, sizeof options);
  options.pages = static_cast<uint32_t>(in.take(1));
  options.prefault = static_cast<uint32_t>(in.take(1));
  options.check = static_cast<uint32_t>(in.take(1));
  options.fork = static_cast<uint32_t>(in.take(1));
  options.node = static_cast<int32_t>(in.take(4));
  options.object_bytes = in.take(8);
  options.align = in.take(8);
  options.capacity = in.take(8);
  options.max_capacity = in.take(8);
  options.cache_objects = static_cast<uint32_t>(in.take(4));
  // What is valid must not take the machine's memory.
  if (options.capacity > small || options.object_bytes > small) options.prefault = 99;
  pyrt_pool* pool = nullptr;
  const pyrt_status status = pyrt_pool_create(&options, &pool);
  must(status == PYRT_OK || status == PYRT_EINVAL || status == PYRT_ENOMEM, "create: status");
  must((status == PYRT_OK) == (pool != nullptr), "create: out pointer");
  return pool;
}

pyrt_pool* sound_options(Input& in) {
  pyrt_pool_options options;
  pyrt_pool_options_init(&options);
  options.object_bytes = 1 + in.take(2) % 3000;
  options.align = in.take(1) % 2 ? 0 : uint64_t{1} << in.take(1) % 8;
  options.capacity = 1 + in.take(2) % 700;
  options.max_capacity = options.capacity + in.take(2) % 3000;
  options.cache_objects = in.take(1) % 2 ? 0 : 2 + static_cast<uint32_t>(in.take(1));
  options.check = PYRT_CHECK_STATE;
  options.pages = static_cast<uint32_t>(in.take(1)) % 4;
  pyrt_pool* pool = nullptr;
  must(pyrt_pool_create(&options, &pool) == PYRT_OK, "create with sound options");
  return pool;
}

class Session {
 public:
  Session(pyrt_pool* pool, Input& in) : pool_(pool), in_(in) {
    layout_.struct_size = sizeof layout_;
    must(pyrt_pool_get_layout(pool_, &layout_) == PYRT_OK, "layout");
  }

  void run() {
    while (!in_.empty()) step();
    must(pyrt_pool_check(pool_) == PYRT_OK, "check at the end");
    pyrt_pool_statistics statistics;
    statistics.struct_size = sizeof statistics;
    must(pyrt_pool_get_statistics(pool_, &statistics) == PYRT_OK, "statistics");
    must(statistics.in_use == out_.size(), "in_use is the model's");
    if (!out_.empty()) must(pyrt_pool_destroy(pool_, 0) == PYRT_ESTATE, "destroy while out");
    must(pyrt_pool_put_bulk(pool_, out_.data(), out_.size()) == PYRT_OK, "put the rest");
    must(pyrt_pool_destroy(pool_, 0) == PYRT_OK, "destroy");
  }

 private:
  bool is_out(const void* object) const {
    return std::find(out_.begin(), out_.end(), object) != out_.end();
  }
  void* some_out() { return out_.empty() ? nullptr : out_[in_.take(2) % out_.size()]; }
  void forget(const void* object) { out_.erase(std::find(out_.begin(), out_.end(), object)); }

  void took(void* object) {
    must(object != nullptr && !is_out(object), "handed out twice");
    const int64_t index = pyrt_pool_index_of(pool_, object);
    must(index >= 0 && static_cast<uint64_t>(index) < layout_.max_capacity, "index of an object");
    must(pyrt_pool_ptr_of(pool_, static_cast<uint64_t>(index)) == object, "index and address");
    std::memset(object, 0x5a, layout_.object_bytes);
    out_.push_back(object);
  }

  void step() {
    switch (in_.take(1) % 10) {
      case 0: {
        void* object = pyrt_pool_get(pool_);
        must((object == nullptr) == (out_.size() == layout_.max_capacity), "get until exhausted");
        if (object != nullptr) took(object);
        break;
      }
      case 1: {
        void* object = some_out();
        if (object == nullptr) break;
        must(pyrt_pool_put(pool_, object) == PYRT_OK, "put");
        must(pyrt_pool_put(pool_, object) == PYRT_ESTATE, "put twice");
        forget(object);
        break;
      }
      case 2: {  // an address near, at or far from an object
        const auto address = reinterpret_cast<uintptr_t>(layout_.base) + in_.take(8);
        auto* object = reinterpret_cast<void*>(address);
        const bool valid = is_out(object);
        const pyrt_status status = pyrt_pool_put(pool_, object);
        must(valid ? status == PYRT_OK : status == PYRT_EINVAL || status == PYRT_ESTATE,
             "put of any address");
        if (valid) forget(object);
        must(pyrt_pool_index_of(pool_, object) >= -1, "index_of any address");
        break;
      }
      case 3: {
        std::vector<void*> objects(in_.take(2) % 1200);
        const pyrt_status status = pyrt_pool_get_bulk(pool_, objects.data(), objects.size());
        const bool fits = out_.size() + objects.size() <= layout_.max_capacity;
        must(status == (fits ? PYRT_OK : PYRT_EFULL), "get_bulk");
        if (fits) {
          for (void* object : objects) took(object);
        }
        break;
      }
      case 4: {  // the newest ones, perhaps with a stranger or a double among them
        const size_t n = std::min<size_t>(in_.take(2), out_.size());
        std::vector<void*> objects(out_.end() - static_cast<ptrdiff_t>(n), out_.end());
        const uint64_t spoil = in_.take(1) % 4;
        if (spoil == 1 && n > 0) objects.push_back(objects[0]);
        if (spoil == 2) objects.push_back(reinterpret_cast<void*>(in_.take(8) | 1u << 31));
        const pyrt_status status = pyrt_pool_put_bulk(pool_, objects.data(), objects.size());
        if (objects.size() == n) {
          must(status == PYRT_OK, "put_bulk");
          out_.resize(out_.size() - n);
        } else {
          must(status == PYRT_EINVAL || status == PYRT_ESTATE, "put_bulk with a bad object");
        }
        break;
      }
      case 5: {
        std::vector<uint32_t> indices(in_.take(1));
        if (pyrt_pool_get_indices(pool_, indices.data(), indices.size()) != PYRT_OK) break;
        for (const uint32_t index : indices) took(pyrt_pool_ptr_of(pool_, index));
        break;
      }
      case 6: {
        const auto index = static_cast<uint32_t>(in_.take(4));
        void* object = pyrt_pool_ptr_of(pool_, index);
        const bool valid = object != nullptr && is_out(object);
        const pyrt_status status = pyrt_pool_put_indices(pool_, &index, 1);
        must((status == PYRT_OK) == valid, "put_indices");
        if (valid) forget(object);
        break;
      }
      case 7:
        must(pyrt_pool_trim(pool_, nullptr) == PYRT_OK, "trim");
        break;
      case 8:
        must(pyrt_pool_flush_thread(pool_) == PYRT_OK, "flush_thread");
        break;
      case 9:
        must(pyrt_pool_check(pool_) == PYRT_OK, "check");
        break;
    }
  }

  pyrt_pool* pool_;
  Input& in_;
  pyrt_pool_layout layout_{};
  std::vector<void*> out_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  if (in.take(1) % 4 == 0) {
    must(pyrt_pool_destroy(any_options(in, 1 << 16), 0) == PYRT_OK, "destroy an empty pool");
    return 0;
  }
  Session(sound_options(in), in).run();
  return 0;
}
