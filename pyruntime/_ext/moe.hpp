// What the bindings of stores and of the cache share: arrays as the C ABI wants them, and stores.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "budget.hpp"

namespace pyruntime::bindings {

using Floats = py::array_t<float, 0>;
using Bytes = py::array_t<uint8_t, 0>;
using Ints = py::array_t<int32_t, 0>;
using Longs = py::array_t<uint64_t, 0>;

[[noreturn]] inline void refuse(const std::string& message) {
  py::object error = py::module_::import("pyruntime.errors").attr("InvalidArgumentError")(message);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

// The address of a C-contiguous array of `shape` (-1: any).
template <class Array>
auto contiguous(const Array& array, std::initializer_list<int64_t> shape, const char* name,
                bool written = false) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  int axis = 0;
  for (const int64_t size : shape) {
    if (fits && size >= 0 && array.shape(axis) != size) fits = false;
    ++axis;
  }
  if (!fits) refuse(std::string(name) + " has not the documented shape");
  if (!(array.flags() & py::array::c_style)) {
    refuse(std::string(name) + " must be C-contiguous");
  }
  if (written && !array.writeable()) refuse(std::string(name) + " must be writeable");
  using T = std::remove_const_t<std::remove_pointer_t<decltype(array.data())>>;
  return const_cast<T*>(array.data());
}

inline std::vector<int> bits_of(const uint8_t* bits, int32_t levels) {
  return std::vector<int>(bits, bits + levels);
}

inline py::dict extent_dict(const pyrt_moe_extent& e) {
  py::dict d;
  d["dense"] = e.dense != 0;
  d["layer"] = e.layer;
  d["expert"] = e.expert;
  d["level"] = e.level;
  d["offset"] = e.offset;
  d["bytes"] = e.bytes;
  d["crc"] = e.crc;
  d["rows"] = e.shape.rows;
  d["columns"] = e.shape.columns;
  d["bits"] = bits_of(e.shape.bits, e.shape.levels);
  const auto three = [](const float* v) { return std::vector<float>(v, v + 3); };
  d["unit"] = three(e.unit);
  d["error"] = three(e.error);
  d["energy"] = three(e.energy);
  return d;
}

class MoeStore {
 public:
  explicit MoeStore(const std::string& path) {
    call([&] { return pyrt_moe_store_open(path.c_str(), &store_); });
  }
  ~MoeStore() { pyrt_moe_store_close(store_); }
  MoeStore(const MoeStore&) = delete;
  MoeStore& operator=(const MoeStore&) = delete;

  py::dict info() const {
    pyrt_moe_info info{};
    info.struct_size = sizeof info;
    check(pyrt_moe_store_info(store_, &info));
    py::dict d;
    d["num_layers"] = info.num_layers;
    d["num_experts"] = info.num_experts;
    d["hidden"] = info.hidden;
    d["ffn"] = info.ffn;
    std::vector<std::vector<int>> bits;
    for (const auto& row : info.bits) bits.push_back(bits_of(row, static_cast<int>(info.levels)));
    d["bits"] = bits;
    d["model_hash"] = py::bytes(reinterpret_cast<const char*>(info.model_hash), 32);
    d["file_bytes"] = info.file_bytes;
    return d;
  }
  py::list extents() const {
    pyrt_moe_info info{};
    info.struct_size = sizeof info;
    check(pyrt_moe_store_info(store_, &info));
    std::vector<pyrt_moe_extent> all(info.num_extents);
    check(pyrt_moe_store_extents(store_, all.data(), all.size()));
    py::list out;
    for (const auto& e : all) out.append(extent_dict(e));
    return out;
  }
  void read(uint64_t index, const Bytes& out) const {
    uint8_t* to = contiguous(out, {-1}, "out", true);
    const auto bytes = static_cast<uint64_t>(out.size());
    call([&] { return pyrt_moe_store_read(store_, index, to, bytes); });
  }

  pyrt_moe_store* handle() const { return store_; }

 private:
  pyrt_moe_store* store_ = nullptr;
};

}  // namespace pyruntime::bindings
