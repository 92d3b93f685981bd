// The arena: slab classes on huge pages. A block's object returns when the block is deallocated, so
// what holds its buffer keeps it out.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "budget.hpp"
#include "native.hpp"

namespace pyruntime::bindings {
namespace {

class Arena {
 public:
  Arena(std::shared_ptr<Budget> budget, uint64_t reserve_bytes, std::vector<uint64_t> classes,
        uint32_t pages, int32_t node, const std::string& name, int32_t priority, py::object reclaim)
      : budget_(std::move(budget)), reclaim_(new py::object(std::move(reclaim))) {
    pyrt_arena_options options;
    pyrt_arena_options_init(&options);
    options.reserve_bytes = reserve_bytes;
    options.pages = pages;
    options.node = node;
    options.budget = budget_ == nullptr ? nullptr : budget_->handle();
    options.name = name.c_str();
    options.priority = priority;
    options.reclaim = reclaim_->is_none() ? nullptr : &run_reclaim;
    options.user = reclaim_.get();
    options.class_bytes = classes.data();
    options.num_classes = classes.size();
    check(pyrt_arena_create(&options, &arena_));
  }
  ~Arena() {
    py::gil_scoped_release release;  // a running callback needs it
    // Refused in a forked child and in its own callback: what the arena calls must stay then.
    if (pyrt_arena_destroy(arena_, 1) != PYRT_OK) (void)reclaim_.release();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  pyrt_arena* handle() const { return arena_; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(arena_); }
  void destroy() {
    call([&] { return pyrt_arena_destroy(arena_, 0); });
    arena_ = nullptr;
  }
  uint64_t trim() {
    uint64_t released = 0;
    call([&] { return pyrt_arena_trim(arena_, &released); });
    return released;
  }
  void verify() {
    call([&] { return pyrt_arena_check(arena_); });
  }
  py::dict statistics() const {
    pyrt_arena_statistics s;
    s.struct_size = sizeof s;
    call([&] { return pyrt_arena_get_statistics(arena_, &s); });
    using namespace py::literals;
    return py::dict("num_slabs"_a = s.num_slabs, "objects"_a = s.objects,
                    "in_use_bytes"_a = s.in_use_bytes, "committed_bytes"_a = s.committed_bytes,
                    "empty_bytes"_a = s.empty_bytes, "reserved_bytes"_a = s.reserved_bytes,
                    "acquires"_a = s.acquires, "releases"_a = s.releases, "failures"_a = s.failures,
                    "trimmed_bytes"_a = s.trimmed_bytes, "fallbacks"_a = s.fallbacks,
                    "huge_bytes"_a = s.huge_bytes);
  }

 private:
  std::shared_ptr<Budget> budget_;
  std::unique_ptr<py::object> reclaim_;
  pyrt_arena* arena_ = nullptr;
};

class ArenaBlock {
 public:
  ArenaBlock(std::shared_ptr<Arena> arena, uint64_t bytes)
      : arena_(std::move(arena)), bytes_(bytes) {
    call([&] { return pyrt_arena_acquire(arena_->handle(), bytes, &data_); });
  }
  ~ArenaBlock() { pyrt_arena_release(arena_->handle(), data_); }
  ArenaBlock(const ArenaBlock&) = delete;
  ArenaBlock& operator=(const ArenaBlock&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  py::buffer_info buffer() const {
    return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  std::shared_ptr<Arena> arena_;
  uint64_t bytes_;
  void* data_ = nullptr;
};

}  // namespace

void bind_arena(py::module_& m) {
  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena")
      .def(py::init<std::shared_ptr<Budget>, uint64_t, std::vector<uint64_t>, uint32_t, int32_t,
                    const std::string&, int32_t, py::object>(),
           py::arg("budget").none(true), py::arg("reserve_bytes"), py::arg("classes"),
           py::arg("pages"), py::arg("node"), py::arg("name"), py::arg("priority"),
           py::arg("reclaim"))
      .def_property_readonly("address", &Arena::address)
      .def("destroy", &Arena::destroy)
      .def("trim", &Arena::trim)
      .def("verify", &Arena::verify)
      .def("statistics", &Arena::statistics);
  py::class_<ArenaBlock>(m, "ArenaBlock", py::buffer_protocol())
      .def(py::init<std::shared_ptr<Arena>, uint64_t>(), py::arg("arena"), py::arg("bytes"))
      .def_property_readonly("address", &ArenaBlock::address)
      .def_buffer(&ArenaBlock::buffer);
}

}  // namespace pyruntime::bindings
