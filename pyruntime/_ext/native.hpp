// What every binding file shares: status -> Python exception, and one bind function per core.
#pragma once

#include <pybind11/pybind11.h>

#include "pyruntime/pyruntime.h"

namespace py = pybind11;

namespace pyruntime::bindings {

// Raises the pyruntime.errors class of `status` with this thread's message; PYRT_OK does nothing.
// The GIL must be held.
void check(pyrt_status status);

// check(body()) with the GIL released meanwhile.
template <class Body>
void call(Body body) {
  pyrt_status status;
  {
    py::gil_scoped_release release;
    status = body();
  }
  check(status);
}

void bind_runtime(py::module_& m);
void bind_arena(py::module_& m);
void bind_budget(py::module_& m);
void bind_filter(py::module_& m);
void bind_gpu(py::module_& m);
void bind_kv_tiers(py::module_& m);
void bind_moe(py::module_& m);
void bind_moe_cache(py::module_& m);
void bind_ops(py::module_& m);
void bind_pool(py::module_& m);

}  // namespace pyruntime::bindings
