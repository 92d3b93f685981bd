// The operators on numpy arrays: shapes and contiguity are checked here, values behind the C ABI.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "native.hpp"

namespace pyruntime::bindings {
namespace {

template <class T>
using Array = py::array_t<T, 0>;
using Floats = Array<float>;
using OptionalFloats = std::optional<Floats>;

[[noreturn]] void refuse(const std::string& message) {
  py::object error = py::module_::import("pyruntime.errors").attr("InvalidArgumentError")(message);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

// The address of a C-contiguous array of `shape` (-1: any).
template <class T>
T* contiguous(const Array<T>& array, std::initializer_list<int64_t> shape, const char* name) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  int axis = 0;
  for (const int64_t size : shape) {
    if (fits && size >= 0 && array.shape(axis) != size) fits = false;
    ++axis;
  }
  if (!fits) {
    std::string want;
    for (const int64_t size : shape) want += size < 0 ? "any, " : std::to_string(size) + ", ";
    std::string found;
    for (py::ssize_t i = 0; i < array.ndim(); ++i) found += std::to_string(array.shape(i)) + ", ";
    refuse(std::string(name) + " has shape (" + found + "); it must be (" + want + ")");
  }
  if (!(array.flags() & py::array::c_style)) {
    refuse(std::string(name) + " must be C-contiguous");
  }
  return const_cast<T*>(array.data());
}

// As above for a matrix whose rows may be further apart than they are long.
template <class T>
T* matrix(const Array<T>& array, int64_t rows, int64_t columns, int64_t* stride, const char* name) {
  if (array.ndim() != 2 || (rows >= 0 && array.shape(0) != rows) ||
      (columns >= 0 && array.shape(1) != columns)) {
    refuse(std::string(name) + " must be a matrix of the documented shape");
  }
  if (array.size() == 0) {
    *stride = array.shape(1);
    return const_cast<T*>(array.data());
  }
  constexpr auto item = static_cast<py::ssize_t>(sizeof(T));
  const bool rows_apart = array.shape(0) <= 1 || array.strides(0) >= item * array.shape(1);
  if ((array.shape(1) > 1 && array.strides(1) != item) || array.strides(0) % item != 0 ||
      !rows_apart) {
    refuse(std::string(name) + " must have contiguous rows");
  }
  *stride = array.shape(0) <= 1 ? array.shape(1) : array.strides(0) / item;
  return const_cast<T*>(array.data());
}

void writeable(const py::array& array, const char* name) {
  if (!array.writeable()) refuse(std::string(name) + " must be writeable");
}

void linear(const Floats& x, const Floats& weight, const OptionalFloats& bias, const Floats& out) {
  int64_t x_stride, weight_stride, out_stride;
  const float* xs = matrix(x, -1, -1, &x_stride, "x");
  const int64_t n = x.shape(0), k = x.shape(1);
  const float* ws = matrix(weight, -1, k, &weight_stride, "weight");
  const int64_t m = weight.shape(0);
  const float* bs = bias ? contiguous(*bias, {m}, "bias") : nullptr;
  writeable(out, "out");
  float* os = matrix(out, n, m, &out_stride, "out");
  call([=] {
    return pyrt_ops_linear(xs, n, k, x_stride, ws, m, weight_stride, bs, os, out_stride);
  });
}

void embedding(const Array<int32_t>& ids, const Floats& table, const Floats& out) {
  const int32_t* is = contiguous(ids, {-1}, "ids");
  const int64_t n = ids.shape(0);
  const float* ts = contiguous(table, {-1, -1}, "table");
  const int64_t rows = table.shape(0), d = table.shape(1);
  writeable(out, "out");
  float* os = contiguous(out, {n, d}, "out");
  call([=] { return pyrt_ops_embedding(is, n, ts, rows, d, os); });
}

void rms_norm(const Floats& x, const Floats& weight, float eps, const Floats& out) {
  const float* ws = contiguous(weight, {-1}, "weight");
  const int64_t d = weight.shape(0);
  const float* xs = contiguous(x, {-1, d}, "x");
  const int64_t n = x.shape(0);
  writeable(out, "out");
  float* os = contiguous(out, {n, d}, "out");
  call([=] { return pyrt_ops_rms_norm(xs, n, d, ws, eps, os); });
}

void add(const Floats& x, const Floats& y) {
  writeable(x, "x");
  float* xs = contiguous(x, {-1, -1}, "x");
  const float* ys = contiguous(y, {x.shape(0), x.shape(1)}, "y");
  const int64_t count = x.size();
  call([=] { return pyrt_ops_add(xs, ys, count); });
}

void clamp(const Floats& x, float limit) {
  writeable(x, "x");
  float* xs = contiguous(x, {-1, -1}, "x");
  const int64_t count = x.size();
  call([=] { return pyrt_ops_clamp(xs, count, limit); });
}

void silu_mul(const Floats& gate, const Floats& up, const Floats& out) {
  const float* gs = contiguous(gate, {-1, -1}, "gate");
  const float* us = contiguous(up, {gate.shape(0), gate.shape(1)}, "up");
  writeable(out, "out");
  float* os = contiguous(out, {gate.shape(0), gate.shape(1)}, "out");
  const int64_t count = gate.size();
  call([=] { return pyrt_ops_silu_mul(gs, us, count, os); });
}

void rope(const Floats& x, const Array<int32_t>& positions, const Floats& cos, const Floats& sin) {
  writeable(x, "x");
  float* xs = contiguous(x, {-1, -1, -1}, "x");
  const int64_t n = x.shape(0), heads = x.shape(1), d = x.shape(2);
  const int32_t* ps = contiguous(positions, {n}, "positions");
  const float* cs = contiguous(cos, {-1, -1}, "cos");
  const int64_t rows = cos.shape(0), half = cos.shape(1);
  const float* ss = contiguous(sin, {rows, half}, "sin");
  call([=] { return pyrt_ops_rope(xs, n, heads, d, ps, cs, ss, rows, half); });
}

pyrt_ops_kv_cache cache_of(const py::array& k, const py::array& v) {
  const auto type_of = [](const py::array& array) {
    if (py::isinstance<Floats>(array)) return PYRT_KV_FLOAT32;
    if (array.dtype().equal(py::dtype("float16"))) return PYRT_KV_FLOAT16;
    refuse("k_cache and v_cache must be of float32 or float16");
  };
  if (k.ndim() != 4 || v.ndim() != 4) {
    refuse("k_cache and v_cache must be [blocks, slots, kv heads, head dim]");
  }
  pyrt_ops_kv_cache cache{};
  cache.struct_size = sizeof cache;
  cache.dtype = type_of(k);
  if (type_of(v) != cache.dtype) refuse("k_cache and v_cache must have the same type");
  const py::ssize_t item = k.itemsize();
  for (int axis = 0; axis < 4; ++axis) {
    if (k.shape(axis) != v.shape(axis) || k.strides(axis) != v.strides(axis)) {
      refuse("k_cache and v_cache must have the same shape and strides");
    }
    if (k.strides(axis) % item != 0 || k.strides(axis) < 0) refuse("k_cache: unusable strides");
  }
  if (k.shape(3) > 1 && k.strides(3) != item) refuse("k_cache must be contiguous along head dim");
  cache.k = const_cast<void*>(k.data());
  cache.v = const_cast<void*>(v.data());
  cache.num_blocks = k.shape(0);
  cache.block_size = k.shape(1);
  cache.kv_heads = k.shape(2);
  cache.head_dim = k.shape(3);
  cache.block_stride = k.strides(0) / item;
  cache.slot_stride = k.strides(1) / item;
  cache.head_stride = k.strides(2) / item;
  return cache;
}

void kv_write(const py::array& k_cache, const py::array& v_cache, const Array<int64_t>& slots,
              const Floats& k, const Floats& v) {
  writeable(k_cache, "k_cache");
  writeable(v_cache, "v_cache");
  const pyrt_ops_kv_cache cache = cache_of(k_cache, v_cache);
  const int64_t* at = contiguous(slots, {-1}, "slots");
  const int64_t n = slots.shape(0);
  const float* ks = contiguous(k, {n, cache.kv_heads, cache.head_dim}, "k");
  const float* vs = contiguous(v, {n, cache.kv_heads, cache.head_dim}, "v");
  call([&] { return pyrt_ops_kv_write(&cache, at, n, ks, vs); });
}

void paged_attention(const Floats& q, const py::array& k_cache, const py::array& v_cache,
                     const Array<int32_t>& tables, const Array<int32_t>& rows,
                     const Array<int32_t>& visible, float scale, int32_t window, const Floats& out,
                     std::optional<float> alpha, const std::optional<Array<uint8_t>>& above) {
  const pyrt_ops_kv_cache cache = cache_of(k_cache, v_cache);
  pyrt_ops_attention a{};
  a.struct_size = sizeof a;
  a.q = contiguous(q, {-1, -1, cache.head_dim}, "q");
  a.n = q.shape(0);
  a.heads = static_cast<int32_t>(q.shape(1));
  a.tables = contiguous(tables, {-1, -1}, "tables");
  a.num_tables = tables.shape(0);
  a.table_stride = tables.shape(1);
  a.rows = contiguous(rows, {a.n}, "rows");
  a.visible = contiguous(visible, {a.n}, "visible");
  a.scale = scale;
  a.window = window;
  writeable(out, "out");
  a.out = contiguous(out, {a.n, a.heads, cache.head_dim}, "out");
  if (alpha && above) {
    writeable(*above, "above");
    a.alpha = *alpha;
    a.above = contiguous(*above, {a.n, -1}, "above");
    a.above_stride = above->shape(1);
  }
  call([&] { return pyrt_ops_paged_attention(&cache, &a); });
}

void router(const Floats& logits, bool sigmoid, bool normalise, const Array<int32_t>& ids,
            const Floats& weights) {
  const float* ls = contiguous(logits, {-1, -1}, "logits");
  const int64_t n = logits.shape(0), experts = logits.shape(1);
  writeable(ids, "ids");
  writeable(weights, "weights");
  int32_t* is = contiguous(ids, {n, -1}, "ids");
  const int64_t top_k = ids.shape(1);
  float* ws = contiguous(weights, {n, top_k}, "weights");
  call([=] {
    return pyrt_ops_router(ls, n, experts, top_k,
                           sigmoid ? PYRT_ROUTER_SIGMOID : PYRT_ROUTER_SOFTMAX, normalise, is, ws);
  });
}

void moe_ffn(const Floats& x, const Array<int32_t>& ids, const Floats& weights, const Floats& gate,
             const Floats& up, const Floats& down, const Floats& out) {
  const float* xs = contiguous(x, {-1, -1}, "x");
  const int64_t n = x.shape(0), d = x.shape(1);
  const int32_t* is = contiguous(ids, {n, -1}, "ids");
  const int64_t top_k = ids.shape(1);
  const float* ws = contiguous(weights, {n, top_k}, "weights");
  const float* gs = contiguous(gate, {-1, -1, d}, "gate");
  const int64_t experts = gate.shape(0), f = gate.shape(1);
  const float* us = contiguous(up, {experts, f, d}, "up");
  const float* ds = contiguous(down, {experts, d, f}, "down");
  writeable(out, "out");
  float* os = contiguous(out, {n, d}, "out");
  call([=] { return pyrt_ops_moe_ffn(xs, n, d, is, ws, top_k, gs, us, ds, experts, f, os); });
}

void sample(const Floats& logits, const Array<uint8_t>& sampling,
            const std::optional<Array<int64_t>>& bias_offsets,
            const std::optional<Array<int32_t>>& bias_ids, const OptionalFloats& bias_values,
            const std::optional<Array<int64_t>>& token_offsets,
            const std::optional<Array<int32_t>>& token_ids,
            const std::optional<Array<int64_t>>& num_prompt, const Array<int32_t>& tokens,
            const Floats& logprobs, const std::optional<Array<int32_t>>& top_ids,
            const OptionalFloats& top_logprobs, const Array<uint8_t>& status) {
  writeable(logits, "logits");
  float* ls = contiguous(logits, {-1, -1}, "logits");
  const int64_t n = logits.shape(0), vocab = logits.shape(1);
  const auto* ss = reinterpret_cast<const pyrt_ops_sampling*>(
      contiguous(sampling, {n * static_cast<int64_t>(sizeof(pyrt_ops_sampling))}, "sampling"));
  const auto given = [](const auto& array, int64_t size, const char* name) {
    return array ? contiguous(*array, {size}, name) : nullptr;
  };
  const int64_t* bo = given(bias_offsets, n + 1, "bias_offsets");
  if (bo != nullptr &&
      (!bias_ids || !bias_values || bias_ids->size() < bo[n] || bias_values->size() < bo[n])) {
    refuse("bias_ids and bias_values must hold bias_offsets[-1] entries");
  }
  const int64_t* to = given(token_offsets, n + 1, "token_offsets");
  if (to != nullptr && (!token_ids || token_ids->size() < to[n])) {
    refuse("token_ids must hold token_offsets[-1] entries");
  }
  const int32_t* bi = given(bias_ids, -1, "bias_ids");
  const float* bv = given(bias_values, -1, "bias_values");
  const int32_t* ti = given(token_ids, -1, "token_ids");
  const int64_t* np = given(num_prompt, n, "num_prompt");
  int32_t* out = contiguous(tokens, {n}, "tokens");
  float* lp = contiguous(logprobs, {n}, "logprobs");
  int32_t* xi = top_ids ? contiguous(*top_ids, {n, PYRT_MAX_LOGPROBS}, "top_ids") : nullptr;
  float* xl =
      top_logprobs ? contiguous(*top_logprobs, {n, PYRT_MAX_LOGPROBS}, "top_logprobs") : nullptr;
  uint8_t* st = contiguous(status, {n}, "status");
  call([=] {
    return pyrt_ops_sample(ls, n, vocab, ss, bo, bi, bv, to, ti, np, out, lp, xi, xl, st);
  });
}

class StopFlag {
 public:
  StopFlag() { check(pyrt_stop_create(&stop_)); }
  ~StopFlag() { pyrt_stop_destroy(stop_); }
  StopFlag(const StopFlag&) = delete;
  StopFlag& operator=(const StopFlag&) = delete;
  void set() { pyrt_stop_set(stop_, 1); }
  void clear() { pyrt_stop_set(stop_, 0); }
  bool is_set() const { return pyrt_stop_is_set(stop_) != 0; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(stop_); }

 private:
  pyrt_stop* stop_ = nullptr;
};

}  // namespace

void bind_ops(py::module_& m) {
  m.attr("MAX_LOGPROBS") = static_cast<int>(PYRT_MAX_LOGPROBS);
  m.attr("SAMPLING_BYTES") = sizeof(pyrt_ops_sampling);
  py::class_<StopFlag>(m, "StopFlag")
      .def(py::init<>())
      .def("set", &StopFlag::set)
      .def("clear", &StopFlag::clear)
      .def("is_set", &StopFlag::is_set)
      .def_property_readonly("address", &StopFlag::address);
  // noconvert: an array of another dtype is refused, never copied silently.
  const auto nc = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("ops_linear", &linear, nc("x"), nc("weight"), nc("bias").none(true), nc("out"));
  m.def("ops_embedding", &embedding, nc("ids"), nc("table"), nc("out"));
  m.def("ops_rms_norm", &rms_norm, nc("x"), nc("weight"), py::arg("eps"), nc("out"));
  m.def("ops_add", &add, nc("x"), nc("y"));
  m.def("ops_clamp", &clamp, nc("x"), py::arg("limit"));
  m.def("ops_silu_mul", &silu_mul, nc("gate"), nc("up"), nc("out"));
  m.def("ops_rope", &rope, nc("x"), nc("positions"), nc("cos"), nc("sin"));
  m.def("ops_kv_write", &kv_write, nc("k_cache"), nc("v_cache"), nc("slots"), nc("k"), nc("v"));
  m.def("ops_paged_attention", &paged_attention, nc("q"), nc("k_cache"), nc("v_cache"),
        nc("tables"), nc("rows"), nc("visible"), py::arg("scale"), py::arg("window"), nc("out"),
        py::arg("alpha").none(true), nc("above").none(true));
  m.def("ops_router", &router, nc("logits"), py::arg("sigmoid"), py::arg("normalise"), nc("ids"),
        nc("weights"));
  m.def("ops_moe_ffn", &moe_ffn, nc("x"), nc("ids"), nc("weights"), nc("gate"), nc("up"),
        nc("down"), nc("out"));
  m.def("ops_sample", &sample, nc("logits"), nc("sampling"), nc("bias_offsets").none(true),
        nc("bias_ids").none(true), nc("bias_values").none(true), nc("token_offsets").none(true),
        nc("token_ids").none(true), nc("num_prompt").none(true), nc("tokens"), nc("logprobs"),
        nc("top_ids").none(true), nc("top_logprobs").none(true), nc("status"));
}

}  // namespace pyruntime::bindings
