// Bad input at every entry of moe.h; see support/abuse.hpp.
#include <unistd.h>

#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

struct State {
  State() {
    path = (std::filesystem::temp_directory_path() / ("pyrt-abuse-moe-" + std::to_string(getpid())))
               .string();
    info.struct_size = sizeof info;
    info.num_layers = info.num_experts = 1;
    info.hidden = info.ffn = 16;
    info.levels = 1;
    for (auto& bits : info.bits) bits[0] = 8;
    data.resize(3 * static_cast<size_t>(pyrt_moe_plane_bytes(&shape, 0)));
    EXPECT_EQ(pyrt_moe_writer_create((path + ".w").c_str(), &info, &writer), PYRT_OK);
    pyrt_moe_writer* other = nullptr;
    EXPECT_EQ(pyrt_moe_writer_create(path.c_str(), &info, &other), PYRT_OK);
    EXPECT_EQ(pyrt_moe_writer_add(other, &extent, data.data(), data.size()), PYRT_OK);
    EXPECT_EQ(pyrt_moe_writer_commit(other), PYRT_OK);
    pyrt_moe_writer_destroy(other);
    EXPECT_EQ(pyrt_moe_store_open(path.c_str(), &store), PYRT_OK);
    planes[0] = data.data();
    experts[0] = data.data();
    layer.struct_size = sizeof layer;
    layer.levels = 1;
    layer.hidden = layer.ffn = 16;
    layer.experts = 1;
    for (auto& bits : layer.bits) bits[0] = 8;
    layer.planes = experts;
    layer.units = units;
  }
  ~State() {
    pyrt_moe_writer_destroy(writer);
    pyrt_moe_store_close(store);
    std::filesystem::remove(path);
  }
  std::string path;
  pyrt_moe_shape shape{16, 16, 1, {8}};
  pyrt_moe_info info{};
  pyrt_moe_extent extent{};
  pyrt_moe_layer layer{};
  pyrt_moe_writer* writer = nullptr;
  pyrt_moe_store* store = nullptr;
  std::vector<uint8_t> data;
  uint8_t* planes[4] = {};
  const uint8_t* experts[4] = {};
  float units[3] = {1, 1, 1};
  float x[256] = {}, out[256] = {}, unit = 0, error[4] = {}, energy = 0;
  int32_t ids[4] = {};
};

std::vector<Row> store_rows(State& s) {
  return {
      {"pyrt_moe_isa", "a name", [] { return ok_if(pyrt_moe_isa()[0] != 0); }, PYRT_OK},
      {"pyrt_moe_plane_bytes", "null", [] { return ok_if(pyrt_moe_plane_bytes(nullptr, 0) == 0); },
       PYRT_OK},
      {"pyrt_moe_plane_bytes", "a level outside",
       [&] {
         return ok_if(pyrt_moe_plane_bytes(&s.shape, 1) == 0 &&
                      pyrt_moe_plane_bytes(&s.shape, -1) == 0);
       },
       PYRT_OK},
      {"pyrt_moe_plane_bytes", "no shape",
       [] {
         const pyrt_moe_shape wide{16, 16, 5, {8}}, odd{16, 16, 1, {3}}, huge{kHuge, 1, 1, {8}},
             deep{16, 16, 2, {8, 16}}, none{0, 16, 1, {8}};
         bool zero = true;
         for (const auto* shape : {&wide, &odd, &huge, &deep, &none}) {
           zero = zero && pyrt_moe_plane_bytes(shape, 0) == 0;
         }
         return ok_if(zero);
       },
       PYRT_OK},
      {"pyrt_moe_store_open", "null path", [&] { return pyrt_moe_store_open(nullptr, &s.store); }},
      {"pyrt_moe_store_open", "null out",
       [&] { return pyrt_moe_store_open(s.path.c_str(), nullptr); }},
      {"pyrt_moe_store_open", "no file",
       [&] { return pyrt_moe_store_open((s.path + "-none").c_str(), &s.store); }, PYRT_ENOENT},
      {"pyrt_moe_store_open", "an empty path", [&] { return pyrt_moe_store_open("", &s.store); },
       PYRT_ENOENT},
      {"pyrt_moe_store_close", "null",
       [] {
         pyrt_moe_store_close(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_moe_store_info", "null", [&] { return pyrt_moe_store_info(nullptr, &s.info); }},
      {"pyrt_moe_store_info", "null out", [&] { return pyrt_moe_store_info(s.store, nullptr); }},
      {"pyrt_moe_store_info", "struct_size",
       [&] {
         pyrt_moe_info info{};
         info.struct_size = 4;
         return pyrt_moe_store_info(s.store, &info);
       }},
      {"pyrt_moe_store_extents", "null",
       [&] { return pyrt_moe_store_extents(nullptr, &s.extent, 1); }},
      {"pyrt_moe_store_extents", "null out",
       [&] { return pyrt_moe_store_extents(s.store, nullptr, 1); }},
      {"pyrt_moe_store_extents", "another number",
       [&] { return pyrt_moe_store_extents(s.store, &s.extent, 2); }},
      {"pyrt_moe_store_read", "null",
       [&] { return pyrt_moe_store_read(nullptr, 0, s.data.data(), s.data.size()); }},
      {"pyrt_moe_store_read", "null out",
       [&] { return pyrt_moe_store_read(s.store, 0, nullptr, s.data.size()); }},
      {"pyrt_moe_store_read", "outside",
       [&] { return pyrt_moe_store_read(s.store, 1, s.data.data(), s.data.size()); }},
      {"pyrt_moe_store_read", "another length",
       [&] { return pyrt_moe_store_read(s.store, 0, s.data.data(), 1); }},
      {"pyrt_moe_store_read", "right",
       [&] { return pyrt_moe_store_read(s.store, 0, s.data.data(), s.data.size()); }, PYRT_OK},
  };
}

std::vector<Row> writer_rows(State& s) {
  const auto create = [&s](auto change) {
    return [&s, change] {
      pyrt_moe_info info = s.info;
      change(info);
      pyrt_moe_writer* writer = nullptr;
      const pyrt_status status = pyrt_moe_writer_create((s.path + "-x").c_str(), &info, &writer);
      EXPECT_EQ(writer, nullptr);
      return status;
    };
  };
  const auto add = [&s](auto change) {
    return [&s, change] {
      pyrt_moe_extent extent = s.extent;
      size_t bytes = s.data.size();
      change(extent, bytes);
      return pyrt_moe_writer_add(s.writer, &extent, s.data.data(), bytes);
    };
  };
  using I = pyrt_moe_info;
  using E = pyrt_moe_extent;
  return {
      {"pyrt_moe_writer_create", "null path",
       [&] { return pyrt_moe_writer_create(nullptr, &s.info, &s.writer); }},
      {"pyrt_moe_writer_create", "null info",
       [&] { return pyrt_moe_writer_create(s.path.c_str(), nullptr, &s.writer); }},
      {"pyrt_moe_writer_create", "null out",
       [&] { return pyrt_moe_writer_create(s.path.c_str(), &s.info, nullptr); }},
      {"pyrt_moe_writer_create", "struct_size", create([](I& i) { i.struct_size = 0; })},
      {"pyrt_moe_writer_create", "no layers", create([](I& i) { i.num_layers = 0; })},
      {"pyrt_moe_writer_create", "huge", create([](I& i) { i.num_experts = UINT32_MAX; })},
      {"pyrt_moe_writer_create", "huge hidden", create([](I& i) { i.hidden = UINT32_MAX; })},
      {"pyrt_moe_writer_create", "levels", create([](I& i) { i.levels = UINT32_MAX; })},
      {"pyrt_moe_writer_create", "widths", create([](I& i) { i.bits[2][0] = 5; })},
      {"pyrt_moe_writer_create", "no folder",
       [&] {
         pyrt_moe_writer* writer = nullptr;
         return pyrt_moe_writer_create("/nonexistent/a.mxs", &s.info, &writer);
       },
       PYRT_EIO},
      {"pyrt_moe_writer_destroy", "null",
       [] {
         pyrt_moe_writer_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_moe_writer_add", "null",
       [&] { return pyrt_moe_writer_add(nullptr, &s.extent, s.data.data(), s.data.size()); }},
      {"pyrt_moe_writer_add", "null extent",
       [&] { return pyrt_moe_writer_add(s.writer, nullptr, s.data.data(), s.data.size()); }},
      {"pyrt_moe_writer_add", "null data",
       [&] { return pyrt_moe_writer_add(s.writer, &s.extent, nullptr, s.data.size()); }},
      {"pyrt_moe_writer_add", "layer", add([](E& e, size_t&) { e.layer = 1; })},
      {"pyrt_moe_writer_add", "expert", add([](E& e, size_t&) { e.expert = UINT32_MAX; })},
      {"pyrt_moe_writer_add", "level", add([](E& e, size_t&) { e.level = UINT32_MAX; })},
      {"pyrt_moe_writer_add", "bytes", add([](E&, size_t& bytes) { bytes = kHugeSize; })},
      {"pyrt_moe_writer_add", "no dense shape", add([](E& e, size_t&) { e.dense = 1; })},
      {"pyrt_moe_writer_commit", "null", [] { return pyrt_moe_writer_commit(nullptr); }},
  };
}

std::vector<Row> arithmetic_rows(State& s) {
  const auto quantize = [&s](auto change) {
    return [&s, change] {
      pyrt_moe_shape shape = s.shape;
      int64_t stride = 16;
      int32_t search = 1;
      float gain[4] = {}, importance[16] = {};
      change(shape, stride, search, gain, importance);
      return pyrt_moe_quantize(s.x, stride, &shape, importance, gain, search, s.planes, &s.unit,
                               s.error, &s.energy);
    };
  };
  const auto ffn = [&s](auto change, int64_t n, int64_t top_k, int32_t id, int32_t level) {
    return [&s, change, n, top_k, id, level] {
      pyrt_moe_layer layer = s.layer;
      change(layer);
      s.ids[0] = id;
      return pyrt_moe_ffn(&layer, s.x, n, s.ids, s.x, top_k, nullptr, level, s.out);
    };
  };
  using S = pyrt_moe_shape;
  using L = pyrt_moe_layer;
  const auto same = [](L&) {};
  uint8_t* none[1] = {};
  return {
      {"pyrt_moe_quantize", "null weights",
       [&] {
         return pyrt_moe_quantize(nullptr, 16, &s.shape, nullptr, nullptr, 1, s.planes, &s.unit,
                                  s.error, &s.energy);
       }},
      {"pyrt_moe_quantize", "null shape",
       [&] {
         return pyrt_moe_quantize(s.x, 16, nullptr, nullptr, nullptr, 1, s.planes, &s.unit, s.error,
                                  &s.energy);
       }},
      {"pyrt_moe_quantize", "null planes",
       [&] {
         return pyrt_moe_quantize(s.x, 16, &s.shape, nullptr, nullptr, 1, nullptr, &s.unit, s.error,
                                  &s.energy);
       }},
      {"pyrt_moe_quantize", "null plane",
       [&, none] {
         return pyrt_moe_quantize(s.x, 16, &s.shape, nullptr, nullptr, 1, none, &s.unit, s.error,
                                  &s.energy);
       }},
      {"pyrt_moe_quantize", "null unit",
       [&] {
         return pyrt_moe_quantize(s.x, 16, &s.shape, nullptr, nullptr, 1, s.planes, nullptr,
                                  s.error, &s.energy);
       }},
      {"pyrt_moe_quantize", "short rows",
       quantize([](S&, int64_t& stride, int32_t&, float*, float*) { stride = 15; })},
      {"pyrt_moe_quantize", "huge rows",
       quantize([](S& shape, int64_t&, int32_t&, float*, float*) { shape.rows = kHuge; })},
      {"pyrt_moe_quantize", "negative columns",
       quantize([](S& shape, int64_t&, int32_t&, float*, float*) { shape.columns = -1; })},
      {"pyrt_moe_quantize", "widths",
       quantize([](S& shape, int64_t&, int32_t&, float*, float*) { shape.bits[0] = 7; })},
      {"pyrt_moe_quantize", "search",
       quantize([](S&, int64_t&, int32_t& search, float*, float*) { search = 17; })},
      {"pyrt_moe_quantize", "gain",
       quantize([](S&, int64_t&, int32_t&, float* gain, float*) { gain[0] = 2; })},
      {"pyrt_moe_quantize", "importance",
       quantize([](S&, int64_t&, int32_t&, float*, float* importance) { importance[3] = -1; })},
      {"pyrt_moe_quantize", "right", quantize([](S&, int64_t&, int32_t&, float*, float*) {}),
       PYRT_OK},
      {"pyrt_moe_dequantize", "null shape",
       [&] { return pyrt_moe_dequantize(nullptr, s.planes, 0, 1, s.out); }},
      {"pyrt_moe_dequantize", "null planes",
       [&] { return pyrt_moe_dequantize(&s.shape, nullptr, 0, 1, s.out); }},
      {"pyrt_moe_dequantize", "level",
       [&] { return pyrt_moe_dequantize(&s.shape, s.planes, 1, 1, s.out); }},
      {"pyrt_moe_dequantize", "null out",
       [&] { return pyrt_moe_dequantize(&s.shape, s.planes, 0, 1, nullptr); }},
      {"pyrt_moe_linear", "null x",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, nullptr, 1, s.out); }},
      {"pyrt_moe_linear", "null out",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, s.x, 1, nullptr); }},
      {"pyrt_moe_linear", "negative n",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, s.x, -1, s.out); }},
      {"pyrt_moe_linear", "huge n",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, s.x, kHuge, s.out); }},
      {"pyrt_moe_linear", "misaligned",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, misaligned(s.x), 1, s.out); }},
      {"pyrt_moe_linear", "level",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, -1, 1, s.x, 1, s.out); }},
      {"pyrt_moe_linear", "nothing",
       [&] { return pyrt_moe_linear(&s.shape, s.planes, 0, 1, nullptr, 0, nullptr); }, PYRT_OK},
      {"pyrt_moe_ffn", "null layer",
       [&] { return pyrt_moe_ffn(nullptr, s.x, 1, s.ids, s.x, 1, nullptr, 0, s.out); }},
      {"pyrt_moe_ffn", "null x",
       [&] { return pyrt_moe_ffn(&s.layer, nullptr, 1, s.ids, s.x, 1, nullptr, 0, s.out); }},
      {"pyrt_moe_ffn", "null out",
       [&] { return pyrt_moe_ffn(&s.layer, s.x, 1, s.ids, s.x, 1, nullptr, 0, nullptr); }},
      {"pyrt_moe_ffn", "struct_size", ffn([](L& l) { l.struct_size = 3; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "null planes", ffn([](L& l) { l.planes = nullptr; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "null units", ffn([](L& l) { l.units = nullptr; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "experts", ffn([](L& l) { l.experts = kHuge; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "hidden", ffn([](L& l) { l.hidden = -1; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "levels", ffn([](L& l) { l.levels = 5; }, 1, 1, 0, 0)},
      {"pyrt_moe_ffn", "negative n", ffn(same, -1, 1, 0, 0)},
      {"pyrt_moe_ffn", "huge n", ffn(same, kHuge, 1, 0, 0)},
      {"pyrt_moe_ffn", "top_k", ffn(same, 1, 0, 0, 0)},
      {"pyrt_moe_ffn", "id", ffn(same, 1, 1, 1, 0)},
      {"pyrt_moe_ffn", "negative id", ffn(same, 1, 1, -2, 0)},
      {"pyrt_moe_ffn", "level", ffn(same, 1, 1, 0, 1)},
      {"pyrt_moe_ffn", "right", ffn(same, 1, 1, 0, 0), PYRT_OK},
  };
}

TEST(AbuseMoe, EveryFunction) {
  State state;
  std::vector<Row> all = store_rows(state);
  for (const auto& rows : {writer_rows(state), arithmetic_rows(state)}) {
    all.insert(all.end(), rows.begin(), rows.end());
  }
  run(all);
  expect_covered("moe.h", all);
}

}  // namespace
