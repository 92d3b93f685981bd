#include "native.hpp"

namespace pyruntime::bindings {

void check(pyrt_status status) {
  if (status == PYRT_OK) return;
  // errors='replace': a message may quote bytes the caller passed in.
  py::object message = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      pyrt_last_error(), static_cast<Py_ssize_t>(strlen(pyrt_last_error())), "replace"));
  py::object error = py::module_::import("pyruntime.errors").attr("from_status")(status, message);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

void bind_runtime(py::module_& m) {
  m.attr("ABI_VERSION") = PYRT_ABI_VERSION;
  m.def("abi_version", &pyrt_abi_version);
  m.def("version", &pyrt_version);
  m.def("simd_level", &pyrt_simd_level);
  m.def("simd_detected", &pyrt_simd_detected);
  m.def("threads_size", &pyrt_threads_size);
  m.def("threads_resize", [](int32_t size) {
    pyrt_status status;
    {
      py::gil_scoped_release release;
      status = pyrt_threads_resize(size);
    }
    check(status);
  });
}

}  // namespace pyruntime::bindings

PYBIND11_MODULE(_native, m) {
  m.doc() = "pybind11 binding of the pyruntime C ABI.";
  pyruntime::bindings::bind_runtime(m);
  pyruntime::bindings::bind_arena(m);
  pyruntime::bindings::bind_budget(m);
  pyruntime::bindings::bind_filter(m);
  pyruntime::bindings::bind_gpu(m);
  pyruntime::bindings::bind_kv_tiers(m);
  pyruntime::bindings::bind_moe(m);
  pyruntime::bindings::bind_moe_cache(m);
  pyruntime::bindings::bind_ops(m);
  pyruntime::bindings::bind_pool(m);
}
