#include "pyruntime/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "capi/error.hpp"
#include "capi/moe_store.hpp"
#include "moe/ffn.hpp"
#include "moe/quantize.hpp"
#include "moe/store.hpp"

using pyruntime::fail;
using pyruntime::capi::guard;
using pyruntime::capi::require;
using pyruntime::capi::require_array;
using pyruntime::capi::require_extents;
namespace moe = pyruntime::moe;

static_assert(PYRT_MOE_LEVELS == moe::kMaxLevels && int{PYRT_MOE_MATRICES} == int{moe::kMatrices} &&
              PYRT_MOE_SKIP == moe::kSkip);

struct pyrt_moe_writer {
  pyrt_moe_writer(const char* path, const moe::StoreInfo& info) : writer(path, info) {}
  moe::StoreWriter writer;
};

namespace {

moe::Shape shape_of(const pyrt_moe_shape* given) {
  require(given, "shape");
  moe::Shape shape{given->rows, given->columns, given->levels, {}};
  std::memcpy(shape.bits, given->bits, sizeof shape.bits);
  if (!moe::valid(shape)) {
    fail(PYRT_EINVAL,
         "shape is %lld x %lld at %d levels; sides must be in 1..%lld, levels in 1..%d, and widths "
         "rise by 2, 4 or 8 bits to at most 8",
         static_cast<long long>(given->rows), static_cast<long long>(given->columns), given->levels,
         static_cast<long long>(moe::kMaxSide), moe::kMaxLevels);
  }
  return shape;
}

void check_level(const moe::Shape& shape, int32_t level) {
  if (level < 0 || level >= shape.levels) {
    fail(PYRT_EINVAL, "level is %d; it must be in 0..%d", level, shape.levels - 1);
  }
}

template <class T>
void check_planes(const moe::Shape& shape, T* const* planes, int32_t level) {
  require(planes, "planes");
  for (int32_t l = 0; l <= level; ++l) {
    if (moe::plane_bits(shape, l) != 0) require(planes[l], "planes[level]");
  }
}

void check_struct(uint32_t size, size_t expected, const char* name) {
  if (size < expected) {
    fail(PYRT_EINVAL, "%s.struct_size is %u; it must be at least %zu", name, size, expected);
  }
}

pyrt_moe_shape given_shape(const moe::Shape& shape) {
  pyrt_moe_shape given{shape.rows, shape.columns, shape.levels, {}};
  std::memcpy(given.bits, shape.bits, sizeof given.bits);
  return given;
}

}  // namespace

extern "C" {

const char* pyrt_moe_isa(void) noexcept { return moe::kernels_name(); }

int64_t pyrt_moe_plane_bytes(const pyrt_moe_shape* shape, int32_t level) noexcept {
  if (shape == nullptr) return 0;
  moe::Shape s{shape->rows, shape->columns, shape->levels, {}};
  std::memcpy(s.bits, shape->bits, sizeof s.bits);
  return moe::valid(s) && level >= 0 && level < s.levels ? moe::plane_bytes(s, level) : 0;
}

pyrt_status pyrt_moe_store_open(const char* path, pyrt_moe_store** out) noexcept {
  return guard([&] {
    require(path, "path");
    require(out, "out");
    *out = new pyrt_moe_store(path);
  });
}

void pyrt_moe_store_close(pyrt_moe_store* store) noexcept { delete store; }

pyrt_status pyrt_moe_store_info(const pyrt_moe_store* store, pyrt_moe_info* out) noexcept {
  return guard([&] {
    require(store, "store");
    require(out, "out");
    check_struct(out->struct_size, sizeof *out, "out");
    const moe::Header& h = store->store.header();
    pyrt_moe_info info{};
    info.struct_size = out->struct_size;
    info.num_layers = h.num_layers;
    info.num_experts = h.num_experts;
    info.hidden = h.hidden;
    info.ffn = h.ffn;
    info.levels = h.levels;
    std::memcpy(info.bits, h.bits, sizeof info.bits);
    std::memcpy(info.model_hash, h.model_hash, sizeof info.model_hash);
    info.file_bytes = h.file_bytes;
    info.num_extents = h.num_records;
    *out = info;
  });
}

pyrt_status pyrt_moe_store_extents(const pyrt_moe_store* store, pyrt_moe_extent* extents,
                                   uint64_t num_extents) noexcept {
  return guard([&] {
    require(store, "store");
    const auto& records = store->store.records();
    if (num_extents != records.size()) {
      fail(PYRT_EINVAL, "num_extents is %llu; the store has %zu",
           static_cast<unsigned long long>(num_extents), records.size());
    }
    if (num_extents > 0) require(extents, "extents");
    for (size_t i = 0; i < records.size(); ++i) {
      const moe::Record& r = records[i];
      pyrt_moe_extent e{};
      e.dense = r.kind == moe::kDenseMatrix;
      e.layer = r.layer;
      e.expert = r.expert;
      e.level = r.level;
      e.offset = r.offset;
      e.bytes = r.bytes;
      e.crc = r.crc;
      if (e.dense != 0) e.shape = given_shape(moe::dense_shape(r));
      std::memcpy(e.unit, r.unit, sizeof e.unit);
      std::memcpy(e.error, r.error, sizeof e.error);
      std::memcpy(e.energy, r.energy, sizeof e.energy);
      extents[i] = e;
    }
  });
}

pyrt_status pyrt_moe_store_read(const pyrt_moe_store* store, uint64_t index, void* out,
                                uint64_t bytes) noexcept {
  return guard([&] {
    require(store, "store");
    require(out, "out");
    const auto& records = store->store.records();
    if (index >= records.size()) {
      fail(PYRT_EINVAL, "index is %llu; the store has %zu extents",
           static_cast<unsigned long long>(index), records.size());
    }
    if (bytes != records[index].bytes) {
      fail(PYRT_EINVAL, "bytes is %llu; the extent has %llu",
           static_cast<unsigned long long>(bytes),
           static_cast<unsigned long long>(records[index].bytes));
    }
    store->store.read(records[index], out);
  });
}

pyrt_status pyrt_moe_writer_create(const char* path, const pyrt_moe_info* info,
                                   pyrt_moe_writer** out) noexcept {
  return guard([&] {
    require(path, "path");
    require(info, "info");
    require(out, "out");
    check_struct(info->struct_size, sizeof *info, "info");
    moe::StoreInfo given{};
    given.num_layers = info->num_layers;
    given.num_experts = info->num_experts;
    given.hidden = info->hidden;
    given.ffn = info->ffn;
    given.levels = info->levels;
    std::memcpy(given.bits, info->bits, sizeof given.bits);
    std::memcpy(given.model_hash, info->model_hash, sizeof given.model_hash);
    *out = new pyrt_moe_writer(path, given);
  });
}

void pyrt_moe_writer_destroy(pyrt_moe_writer* writer) noexcept { delete writer; }

pyrt_status pyrt_moe_writer_add(pyrt_moe_writer* writer, const pyrt_moe_extent* extent,
                                const void* data, uint64_t bytes) noexcept {
  return guard([&] {
    require(writer, "writer");
    require(extent, "extent");
    if (bytes > 0) require(data, "data");
    moe::Quality quality;
    std::memcpy(quality.unit, extent->unit, sizeof quality.unit);
    std::memcpy(quality.error, extent->error, sizeof quality.error);
    std::memcpy(quality.energy, extent->energy, sizeof quality.energy);
    const auto size = static_cast<int64_t>(bytes);
    if (extent->dense != 0) {
      writer->writer.add_dense(extent->layer, extent->expert, shape_of(&extent->shape), data, size,
                               quality);
    } else {
      writer->writer.add_plane(extent->layer, extent->expert, static_cast<int>(extent->level), data,
                               size, quality);
    }
  });
}

pyrt_status pyrt_moe_writer_commit(pyrt_moe_writer* writer) noexcept {
  return guard([&] {
    require(writer, "writer");
    writer->writer.commit();
  });
}

pyrt_status pyrt_moe_quantize(const float* weights, int64_t stride, const pyrt_moe_shape* shape,
                              const float* importance, const float* gain, int32_t search,
                              uint8_t* const* planes, float* unit, float* error,
                              float* energy) noexcept {
  return guard([&] {
    require(weights, "weights");
    const moe::Shape s = shape_of(shape);
    check_planes(s, planes, s.levels - 1);
    require(unit, "unit");
    require(error, "error");
    require(energy, "energy");
    if (stride < s.columns) {
      fail(PYRT_EINVAL, "stride is %lld; rows have %lld columns", static_cast<long long>(stride),
           static_cast<long long>(s.columns));
    }
    if (search < 1 || search > 16) {
      fail(PYRT_EINVAL, "search is %d; it must be in 1..16", search);
    }
    moe::Quantizing options{importance, {}, search};
    for (int32_t level = 0; gain != nullptr && level < s.levels; ++level) {
      if (!(gain[level] >= 0.0f && gain[level] <= 1.0f)) {
        fail(PYRT_EINVAL, "gain[%d] is %f; it must be in 0..1", level,
             static_cast<double>(gain[level]));
      }
      options.gain[level] = gain[level];
    }
    for (int64_t i = 0; importance != nullptr && i < s.columns; ++i) {
      if (!(importance[i] >= 0.0f) || std::isinf(importance[i])) {
        fail(PYRT_EINVAL, "importance[%lld] is %f; it must be finite and not negative",
             static_cast<long long>(i), static_cast<double>(importance[i]));
      }
    }
    const moe::Quantized result = moe::quantize(weights, stride, s, options, planes);
    *unit = result.unit;
    std::memcpy(error, result.error, sizeof(float) * static_cast<size_t>(s.levels));
    *energy = result.energy;
  });
}

pyrt_status pyrt_moe_dequantize(const pyrt_moe_shape* shape, const uint8_t* const* planes,
                                int32_t level, float unit, float* out) noexcept {
  return guard([&] {
    const moe::Shape s = shape_of(shape);
    check_level(s, level);
    check_planes(s, planes, level);
    require(out, "out");
    moe::dequantize(s, planes, level, unit, out);
  });
}

pyrt_status pyrt_moe_linear(const pyrt_moe_shape* shape, const uint8_t* const* planes,
                            int32_t level, float unit, const float* x, int64_t n,
                            float* out) noexcept {
  return guard([&] {
    const moe::Shape s = shape_of(shape);
    check_level(s, level);
    check_planes(s, planes, level);
    if (n < 0) fail(PYRT_EINVAL, "n is %lld; it must not be negative", static_cast<long long>(n));
    if (n == 0) return;
    require_extents({n, std::max(s.rows, s.columns)}, "x or out");
    require_array(x, "x");
    require_array(out, "out");
    moe::linear(moe::nested(s, planes, level, unit), x, n, out);
  });
}

pyrt_status pyrt_moe_ffn(const pyrt_moe_layer* layer, const float* x, int64_t n, const int32_t* ids,
                         const float* weights, int64_t top_k, const uint8_t* levels, int32_t level,
                         float* out) noexcept {
  return guard([&] {
    require(layer, "layer");
    check_struct(layer->struct_size, sizeof *layer, "layer");
    if (n < 0 || top_k < 1 || top_k > 4096) {
      fail(PYRT_EINVAL, "n is %lld and top_k %lld; they must be at least 0, and in 1..4096",
           static_cast<long long>(n), static_cast<long long>(top_k));
    }
    if (layer->experts < 1 || layer->experts > 4096) {
      fail(PYRT_EINVAL, "layer.experts is %lld; it must be in 1..4096",
           static_cast<long long>(layer->experts));
    }
    moe::LayerExperts experts{};
    for (int i = 0; i < moe::kMatrices; ++i) {
      const bool down = i == moe::kDown;
      pyrt_moe_shape given{
          down ? layer->hidden : layer->ffn, down ? layer->ffn : layer->hidden, layer->levels, {}};
      std::memcpy(given.bits, layer->bits[i], sizeof given.bits);
      experts.shapes[i] = shape_of(&given);
    }
    experts.experts = layer->experts;
    experts.levels = layer->levels;
    experts.planes = layer->planes;
    experts.units = layer->units;
    require(layer->planes, "layer.planes");
    require(layer->units, "layer.units");
    if (n == 0) return;
    require_extents({n, top_k, std::max(layer->hidden, layer->ffn)}, "x, ids or out");
    require_array(x, "x");
    require_array(ids, "ids");
    require_array(weights, "weights");
    require_array(out, "out");
    moe::ffn(experts, {x, n, ids, weights, top_k, levels, level}, out);
  });
}

}  // extern "C"
