// A budget as bindings share it, and a Python callable as a reclaim callback.
#pragma once

#include <memory>

#include "native.hpp"

namespace pyruntime::bindings {

// Runs `body` without the GIL: it may wait for callbacks that need it.
class Budget {
 public:
  explicit Budget(uint64_t limit_bytes) { check(pyrt_budget_create(limit_bytes, &budget_)); }
  ~Budget() { pyrt_budget_destroy(budget_); }  // clients keep it alive, so there are none
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

  pyrt_budget* handle() const { return budget_; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(budget_); }

  py::dict statistics() const {
    pyrt_budget_statistics s;
    s.struct_size = sizeof s;
    call([&] { return pyrt_budget_get_statistics(budget_, &s); });
    using namespace py::literals;
    return py::dict("num_clients"_a = s.num_clients, "limit_bytes"_a = s.limit_bytes,
                    "available_bytes"_a = s.available_bytes, "reserves"_a = s.reserves,
                    "failures"_a = s.failures, "reclaims"_a = s.reclaims);
  }

 private:
  pyrt_budget* budget_ = nullptr;
};

// `callable` is a py::object. What it raises is reported and counts as nothing freed.
inline uint64_t run_reclaim(void* callable, uint64_t bytes) {
  py::gil_scoped_acquire gil;
  const py::object reclaim = *static_cast<py::object*>(callable);
  try {
    return reclaim(bytes).cast<uint64_t>();
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable(reclaim);
  } catch (const py::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "a reclaim callback returns the bytes it freed, an int");
    PyErr_WriteUnraisable(reclaim.ptr());
  }
  return 0;
}

}  // namespace pyruntime::bindings
