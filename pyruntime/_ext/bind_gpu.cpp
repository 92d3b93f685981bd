// CUDA devices, and the pool's copies on them. Device addresses and streams are plain integers.
#include "native.hpp"

namespace pyruntime::bindings {
namespace {

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

pyrt_kv_layout kv_layout(const py::tuple& fields) {
  return {fields[0].cast<uintptr_t>(), fields[1].cast<uint64_t>(), fields[2].cast<uint64_t>(),
          fields[3].cast<uint64_t>(), fields[4].cast<uint64_t>()};
}

void kv_copy(const py::tuple& from, const py::tuple& to, uint32_t num_layers, uint32_t num_parts,
             uint64_t block_bytes, uintptr_t runs, uint64_t num_runs, uint64_t num_blocks,
             uintptr_t stream) {
  pyrt_kv_device_copy copy{};
  copy.struct_size = sizeof copy;
  copy.num_layers = num_layers;
  copy.num_parts = num_parts;
  copy.from = kv_layout(from);
  copy.to = kv_layout(to);
  copy.block_bytes = block_bytes;
  copy.runs = runs;
  copy.num_runs = num_runs;
  copy.num_blocks = num_blocks;
  call([&] { return pyrt_kv_copy_async(&copy, stream); });
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
  m.def("gpu_reachable", [](uintptr_t address) {
    int32_t reachable = 0;
    call([&] { return pyrt_gpu_reachable(reinterpret_cast<void*>(address), &reachable); });
    return reachable != 0;
  });
  m.def("gpu_pool_copy", &pool_copy);
  m.def("gpu_kv_copy", &kv_copy);
}

}  // namespace pyruntime::bindings
