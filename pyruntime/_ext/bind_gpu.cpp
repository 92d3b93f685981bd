// CUDA devices, and the pool's copies on them. Device addresses and streams are plain integers.
#include "native.hpp"

namespace pyruntime::bindings {
namespace {

template <class Body>
void call(Body body) {
  pyrt_status status;
  {
    py::gil_scoped_release release;
    status = body();
  }
  check(status);
}

py::dict info() {
  pyrt_gpu_info i{};
  i.struct_size = sizeof i;
  call([&] { return pyrt_gpu_get_info(&i); });
  using namespace py::literals;
  return py::dict("num_devices"_a = i.num_devices, "driver_version"_a = i.driver_version,
                  "runtime_version"_a = i.runtime_version);
}

void pool_copy(bool gather, const py::dict& layout, uint64_t num_objects, uintptr_t indices,
               uint64_t n, uintptr_t packed, uint64_t packed_stride, uintptr_t stream) {
  pyrt_pool_device_copy copy{};
  copy.struct_size = sizeof copy;
  copy.per_unit = layout["per_unit"].cast<uint32_t>();
  copy.base = layout["base"].cast<uintptr_t>();
  copy.object_bytes = layout["object_bytes"].cast<uint64_t>();
  copy.stride = layout["stride"].cast<uint64_t>();
  copy.unit_bytes = layout["unit_bytes"].cast<uint64_t>();
  copy.num_objects = num_objects;
  copy.indices = indices;
  copy.n = n;
  copy.packed = packed;
  copy.packed_stride = packed_stride;
  call([&] {
    return gather ? pyrt_pool_gather_async(&copy, stream) : pyrt_pool_scatter_async(&copy, stream);
  });
}

}  // namespace

void bind_gpu(py::module_& m) {
  m.def("gpu_info", &info);
  m.def("gpu_register", [](uintptr_t address, size_t num_bytes) {
    call([&] { return pyrt_gpu_register(reinterpret_cast<void*>(address), num_bytes); });
  });
  m.def("gpu_unregister", [](uintptr_t address) {
    call([&] { return pyrt_gpu_unregister(reinterpret_cast<void*>(address)); });
  });
  m.def("gpu_synchronize",
        [](uintptr_t stream) { call([&] { return pyrt_gpu_synchronize(stream); }); });
  m.def("gpu_pool_copy", &pool_copy);
}

}  // namespace pyruntime::bindings
