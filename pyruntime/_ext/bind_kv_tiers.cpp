// Names of KV content, as bytes.
#include <pybind11/numpy.h>

#include "native.hpp"

namespace pyruntime::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Array<uint8_t> export_keys(const py::bytes& secret, const py::bytes& space,
                           const Array<int32_t>& tokens, uint32_t block_size) {
  const std::string_view secret_bytes = secret;
  const std::string_view space_bytes = space;
  const auto n = static_cast<uint64_t>(tokens.size());
  Array<uint8_t> keys({static_cast<py::ssize_t>(block_size == 0 ? 0 : n / block_size),
                       static_cast<py::ssize_t>(PYRT_KV_EXPORT_KEY_BYTES)});
  const int32_t* at = tokens.data();
  uint8_t* out = keys.mutable_data();
  pyrt_status status;
  {
    py::gil_scoped_release release;
    status = pyrt_kv_export_keys(secret_bytes.data(), secret_bytes.size(), space_bytes.data(),
                                 space_bytes.size(), at, n, block_size, out);
  }
  check(status);
  return keys;
}

}  // namespace

void bind_kv_tiers(py::module_& m) {
  m.def("kv_export_keys", &export_keys, py::arg("secret"), py::arg("space"),
        py::arg("tokens").noconvert(), py::arg("block_size"));
}

}  // namespace pyruntime::bindings
