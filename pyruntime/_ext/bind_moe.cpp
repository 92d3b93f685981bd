// Stores, the quantizer and the experts on numpy arrays; values are checked behind the C ABI.
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "moe.hpp"

namespace pyruntime::bindings {
namespace {

pyrt_moe_shape shape_of(int64_t rows, int64_t columns, const std::vector<int>& bits) {
  if (bits.empty() || bits.size() > PYRT_MOE_LEVELS) refuse("bits must have 1..4 widths");
  pyrt_moe_shape shape{rows, columns, static_cast<int32_t>(bits.size()), {}};
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i] < 0 || bits[i] > 8) refuse("bits must be in 0..8");
    shape.bits[i] = static_cast<uint8_t>(bits[i]);
  }
  return shape;
}

// Addresses of plane arrays, checked against what the shape asks for.
std::vector<uint8_t*> planes_of(const pyrt_moe_shape& shape, const std::vector<Bytes>& planes,
                                int32_t last, bool written) {
  if (static_cast<int32_t>(planes.size()) <= last) refuse("planes are missing");
  std::vector<uint8_t*> at;
  for (int32_t level = 0; level <= last; ++level) {
    const int64_t bytes = pyrt_moe_plane_bytes(&shape, level);
    at.push_back(contiguous(planes[static_cast<size_t>(level)], {bytes}, "plane", written));
  }
  return at;
}

class MoeWriter {
 public:
  MoeWriter(const std::string& path, uint32_t layers, uint32_t experts, uint32_t hidden,
            uint32_t ffn, const std::vector<std::vector<int>>& bits, const py::bytes& hash) {
    pyrt_moe_info info{};
    info.struct_size = sizeof info;
    info.num_layers = layers;
    info.num_experts = experts;
    info.hidden = hidden;
    info.ffn = ffn;
    if (bits.size() != 3) refuse("bits must have the widths of gate, up and down");
    info.levels = static_cast<uint32_t>(bits[0].size());
    for (size_t i = 0; i < 3; ++i) {
      if (bits[i].size() != bits[0].size()) refuse("bits must be as long for each matrix");
      std::memcpy(info.bits[i], shape_of(1, 1, bits[i]).bits, 4);
    }
    const std::string raw = hash;
    if (raw.size() != 32) refuse("model_hash must have 32 bytes");
    std::memcpy(info.model_hash, raw.data(), 32);
    check(pyrt_moe_writer_create(path.c_str(), &info, &writer_));
  }
  ~MoeWriter() { pyrt_moe_writer_destroy(writer_); }
  MoeWriter(const MoeWriter&) = delete;
  MoeWriter& operator=(const MoeWriter&) = delete;

  void add_plane(uint32_t layer, uint32_t expert, uint32_t level, const Bytes& data,
                 const std::array<float, 3>& unit, const std::array<float, 3>& error,
                 const std::array<float, 3>& energy) {
    pyrt_moe_extent e{};
    e.layer = layer;
    e.expert = expert;
    e.level = level;
    add(e, data, unit, error, energy);
  }
  void add_dense(uint32_t layer, uint32_t number, int64_t rows, int64_t columns,
                 const std::vector<int>& bits, const Bytes& data, float unit, float error,
                 float energy) {
    pyrt_moe_extent e{};
    e.dense = 1;
    e.layer = layer;
    e.expert = number;
    e.shape = shape_of(rows, columns, bits);
    add(e, data, {unit, 0, 0}, {error, 0, 0}, {energy, 0, 0});
  }
  void commit() {
    call([&] { return pyrt_moe_writer_commit(writer_); });
  }
  void close() {
    pyrt_moe_writer_destroy(writer_);
    writer_ = nullptr;
  }

 private:
  void add(pyrt_moe_extent e, const Bytes& data, const std::array<float, 3>& unit,
           const std::array<float, 3>& error, const std::array<float, 3>& energy) {
    std::copy(unit.begin(), unit.end(), e.unit);
    std::copy(error.begin(), error.end(), e.error);
    std::copy(energy.begin(), energy.end(), e.energy);
    const uint8_t* from = contiguous(data, {-1}, "data");
    const auto bytes = static_cast<uint64_t>(data.size());
    call([&] { return pyrt_moe_writer_add(writer_, &e, from, bytes); });
  }

  pyrt_moe_writer* writer_ = nullptr;
};

py::tuple quantize(const Floats& weights, const std::vector<int>& bits,
                   const std::optional<Floats>& importance, const std::vector<float>& gain,
                   int search, const std::vector<Bytes>& planes) {
  const float* w = contiguous(weights, {-1, -1}, "weights");
  const pyrt_moe_shape shape = shape_of(weights.shape(0), weights.shape(1), bits);
  if (gain.size() != bits.size()) refuse("gain must have a value per level");
  const auto at = planes_of(shape, planes, shape.levels - 1, true);
  const float* h = importance ? contiguous(*importance, {shape.columns}, "importance") : nullptr;
  float unit = 0, energy = 0;
  std::vector<float> error(bits.size());
  call([&] {
    return pyrt_moe_quantize(w, shape.columns, &shape, h, gain.data(), search, at.data(), &unit,
                             error.data(), &energy);
  });
  return py::make_tuple(unit, error, energy);
}

void dequantize(int64_t rows, int64_t columns, const std::vector<int>& bits,
                const std::vector<Bytes>& planes, int level, float unit, const Floats& out) {
  const pyrt_moe_shape shape = shape_of(rows, columns, bits);
  const auto at = planes_of(shape, planes, level, false);
  float* to = contiguous(out, {rows, columns}, "out", true);
  call([&] { return pyrt_moe_dequantize(&shape, at.data(), level, unit, to); });
}

void linear(int64_t rows, int64_t columns, const std::vector<int>& bits,
            const std::vector<Bytes>& planes, int level, float unit, const Floats& x,
            const Floats& out) {
  const pyrt_moe_shape shape = shape_of(rows, columns, bits);
  const auto at = planes_of(shape, planes, level, false);
  const float* from = contiguous(x, {-1, columns}, "x");
  const int64_t n = x.shape(0);
  float* to = contiguous(out, {n, rows}, "out", true);
  call([&] { return pyrt_moe_linear(&shape, at.data(), level, unit, from, n, to); });
}

// `planes` holds addresses [experts, levels], 0 where a plane is not in memory; the caller keeps
// them alive.
void ffn(int64_t hidden, int64_t inner, const std::vector<std::vector<int>>& bits,
         const Longs& planes, const Floats& units, const Floats& x, const Ints& ids,
         const Floats& weights, const std::optional<Bytes>& levels, int level, const Floats& out) {
  static_assert(sizeof(uint64_t) == sizeof(uint8_t*));
  pyrt_moe_layer layer{};
  layer.struct_size = sizeof layer;
  layer.hidden = hidden;
  layer.ffn = inner;
  if (bits.size() != 3) refuse("bits must have the widths of gate, up and down");
  layer.levels = static_cast<int32_t>(bits[0].size());
  for (size_t i = 0; i < 3; ++i) {
    if (bits[i].size() != bits[0].size()) refuse("bits must be as long for each matrix");
    std::memcpy(layer.bits[i], shape_of(1, 1, bits[i]).bits, 4);
  }
  const uint64_t* at = contiguous(planes, {-1, layer.levels}, "planes");
  layer.experts = planes.shape(0);
  layer.planes = reinterpret_cast<const uint8_t* const*>(at);
  layer.units = contiguous(units, {layer.experts, 3}, "units");
  const float* xs = contiguous(x, {-1, hidden}, "x");
  const int64_t n = x.shape(0);
  const int32_t* is = contiguous(ids, {n, -1}, "ids");
  const int64_t top_k = ids.shape(1);
  const float* ws = contiguous(weights, {n, top_k}, "weights");
  const uint8_t* ls = levels ? contiguous(*levels, {n, top_k}, "levels") : nullptr;
  float* to = contiguous(out, {n, hidden}, "out", true);
  call([&] { return pyrt_moe_ffn(&layer, xs, n, is, ws, top_k, ls, level, to); });
}

}  // namespace

void bind_moe(py::module_& m) {
  m.attr("MOE_SKIP") = static_cast<int>(PYRT_MOE_SKIP);
  m.def("moe_isa", &pyrt_moe_isa);
  m.def("moe_plane_bytes",
        [](int64_t rows, int64_t columns, const std::vector<int>& bits, int level) {
          const pyrt_moe_shape shape = shape_of(rows, columns, bits);
          return pyrt_moe_plane_bytes(&shape, level);
        });
  py::class_<MoeStore, std::shared_ptr<MoeStore>>(m, "MoeStore")
      .def(py::init<const std::string&>())
      .def("info", &MoeStore::info)
      .def("extents", &MoeStore::extents)
      .def("read", &MoeStore::read, py::arg("index"), py::arg("out").noconvert());
  py::class_<MoeWriter>(m, "MoeWriter")
      .def(py::init<const std::string&, uint32_t, uint32_t, uint32_t, uint32_t,
                    const std::vector<std::vector<int>>&, const py::bytes&>())
      .def("add_plane", &MoeWriter::add_plane)
      .def("add_dense", &MoeWriter::add_dense)
      .def("commit", &MoeWriter::commit)
      .def("close", &MoeWriter::close);
  // noconvert: an array of another dtype is refused, never copied silently.
  const auto nc = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("moe_quantize", &quantize, nc("weights"), py::arg("bits"), nc("importance").none(true),
        py::arg("gain"), py::arg("search"), nc("planes"));
  m.def("moe_dequantize", &dequantize, py::arg("rows"), py::arg("columns"), py::arg("bits"),
        nc("planes"), py::arg("level"), py::arg("unit"), nc("out"));
  m.def("moe_linear", &linear, py::arg("rows"), py::arg("columns"), py::arg("bits"), nc("planes"),
        py::arg("level"), py::arg("unit"), nc("x"), nc("out"));
  m.def("moe_ffn", &ffn, py::arg("hidden"), py::arg("inner"), py::arg("bits"), nc("planes"),
        nc("units"), nc("x"), nc("ids"), nc("weights"), nc("levels").none(true), py::arg("level"),
        nc("out"));
}

}  // namespace pyruntime::bindings
