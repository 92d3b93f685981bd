// The pool's set-up and inspection; the hot calls are in _fast.pyx.
#include <algorithm>

#include "native.hpp"

namespace pyruntime::bindings {
namespace {

class Pool {
 public:
  Pool(uint64_t object_bytes, uint64_t capacity, uint64_t max_capacity, uint64_t align,
       uint32_t cache_objects, uint32_t pages, uint32_t prefault, uint32_t check_level,
       uint32_t fork, int32_t node) {
    pyrt_pool_options options;
    pyrt_pool_options_init(&options);
    options.object_bytes = object_bytes;
    options.capacity = capacity;
    options.max_capacity = max_capacity;
    options.align = align;
    options.cache_objects = cache_objects;
    options.pages = pages;
    options.prefault = prefault;
    options.check = check_level;
    options.fork = fork;
    options.node = node;
    call([&] { return pyrt_pool_create(&options, &pool_); });
  }
  ~Pool() { pyrt_pool_destroy(pool_, 1); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(pool_); }

  void destroy(bool force) {
    call([&] { return pyrt_pool_destroy(pool_, force); });
    pool_ = nullptr;
  }

  py::dict layout() const {
    pyrt_pool_layout l;
    l.struct_size = sizeof l;
    check(pyrt_pool_get_layout(pool_, &l));
    using namespace py::literals;
    return py::dict("base"_a = reinterpret_cast<uintptr_t>(l.base), "per_unit"_a = l.per_unit,
                    "object_bytes"_a = l.object_bytes, "stride"_a = l.stride,
                    "unit_bytes"_a = l.unit_bytes, "committed_bytes"_a = l.committed_bytes,
                    "max_capacity"_a = l.max_capacity);
  }

  py::dict statistics() const {
    pyrt_pool_statistics s;
    s.struct_size = sizeof s;
    call([&] { return pyrt_pool_get_statistics(pool_, &s); });
    using namespace py::literals;
    return py::dict("num_caches"_a = s.num_caches, "capacity"_a = s.capacity, "in_use"_a = s.in_use,
                    "cached"_a = s.cached, "depot"_a = s.depot, "gets"_a = s.gets,
                    "puts"_a = s.puts, "refills"_a = s.refills, "spills"_a = s.spills,
                    "failures"_a = s.failures, "steals"_a = s.steals, "grows"_a = s.grows,
                    "trims"_a = s.trims, "fallbacks"_a = s.fallbacks, "overwrites"_a = s.overwrites,
                    "lost_in_fork"_a = s.lost_in_fork, "committed_bytes"_a = s.committed_bytes,
                    "huge_bytes"_a = s.huge_bytes);
  }

  void prefault() {
    call([&] { return pyrt_pool_prefault(pool_); });
  }
  void flush_thread() {
    call([&] { return pyrt_pool_flush_thread(pool_); });
  }
  void verify() {
    call([&] { return pyrt_pool_check(pool_); });
  }
  uint64_t trim() {
    uint64_t released = 0;
    call([&] { return pyrt_pool_trim(pool_, &released); });
    return released;
  }

 private:
  pyrt_pool* pool_ = nullptr;
};

py::list nodes() {
  int32_t found[64];
  const uint32_t n = std::min<uint32_t>(pyrt_nodes(found, 64), 64);
  py::list out;
  for (uint32_t i = 0; i < n; ++i) out.append(found[i]);
  return out;
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("nodes", nodes);
  m.def("current_node", pyrt_current_node);
  py::class_<Pool>(m, "Pool")
      .def(py::init<uint64_t, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t, uint32_t, uint32_t,
                    uint32_t, int32_t>(),
           py::arg("object_bytes"), py::arg("capacity"), py::arg("max_capacity"), py::arg("align"),
           py::arg("cache_objects"), py::arg("pages"), py::arg("prefault"), py::arg("check"),
           py::arg("fork"), py::arg("node"))
      .def_property_readonly("address", &Pool::address)
      .def("destroy", &Pool::destroy, py::arg("force"))
      .def("layout", &Pool::layout)
      .def("statistics", &Pool::statistics)
      .def("prefault", &Pool::prefault)
      .def("flush_thread", &Pool::flush_thread)
      .def("verify", &Pool::verify)
      .def("trim", &Pool::trim);
}

}  // namespace pyruntime::bindings
