// The expert cache on numpy arrays; values are checked behind the C ABI.
#include <array>
#include <memory>
#include <optional>

#include "moe.hpp"

namespace pyruntime::bindings {
namespace {

using Doubles = py::array_t<double, 0>;
using Counts = py::array_t<int64_t, 0>;

class MoeCache {
 public:
  MoeCache(std::shared_ptr<MoeStore> store, std::shared_ptr<Budget> budget, uint64_t limit_bytes,
           int32_t priority, uint64_t scratch_bytes, int32_t floor, int32_t threads, int32_t order,
           bool direct, bool strict, bool worth_errors)
      : store_(std::move(store)), budget_(std::move(budget)) {
    pyrt_moe_cache_options o{};
    o.struct_size = sizeof o;
    o.priority = priority;
    o.limit_bytes = limit_bytes;
    o.budget = budget_ ? budget_->handle() : nullptr;
    o.scratch_bytes = scratch_bytes;
    o.floor = floor;
    o.threads = threads;
    o.order = order;
    o.direct = direct;
    o.strict = strict;
    o.worth_errors = worth_errors;
    call([&] { return pyrt_moe_cache_create(store_->handle(), &o, &cache_); });
  }
  ~MoeCache() { close(); }
  MoeCache(const MoeCache&) = delete;
  MoeCache& operator=(const MoeCache&) = delete;

  void close() {
    py::gil_scoped_release release;
    pyrt_moe_cache_destroy(cache_);
    cache_ = nullptr;
  }

  void ffn(int64_t layer, int64_t hidden, const Floats& x, const Ints& ids, const Floats& weights,
           const std::optional<Bytes>& levels, int32_t level, const std::optional<Bytes>& floors,
           const Floats& out, const Bytes& status) {
    const float* xs = contiguous(x, {-1, hidden}, "x");
    const int64_t n = x.shape(0);
    const int32_t* is = contiguous(ids, {n, -1}, "ids");
    const int64_t k = ids.shape(1);
    const float* ws = contiguous(weights, {n, k}, "weights");
    const uint8_t* ls = levels ? contiguous(*levels, {n, k}, "levels") : nullptr;
    const uint8_t* fs = floors ? contiguous(*floors, {n, k}, "floors") : nullptr;
    float* to = contiguous(out, {n, hidden}, "out", true);
    uint8_t* marks = contiguous(status, {n}, "status", true);
    call([&] {
      return pyrt_moe_cache_ffn(cache_, layer, xs, n, is, ws, k, ls, level, fs, to, marks);
    });
  }
  void prefetch(int64_t layer, const Ints& experts, int32_t level) {
    const int32_t* es = contiguous(experts, {-1}, "experts");
    const int64_t count = experts.size();
    call([&] { return pyrt_moe_cache_prefetch(cache_, layer, es, count, level); });
  }
  uint64_t missing(int64_t layer, const Ints& experts, int32_t level) {
    const int32_t* es = contiguous(experts, {-1}, "experts");
    const int64_t count = experts.size();
    uint64_t bytes = 0;
    call([&] { return pyrt_moe_cache_missing(cache_, layer, es, count, level, &bytes); });
    return bytes;
  }
  uint64_t shrink(uint64_t bytes) {
    uint64_t used = 0;
    call([&] { return pyrt_moe_cache_shrink(cache_, bytes, &used); });
    return used;
  }
  void drain() {
    call([&] { return pyrt_moe_cache_drain(cache_); });
  }
  void verify() {
    call([&] { return pyrt_moe_cache_check(cache_); });
  }
  py::dict statistics() {
    pyrt_moe_cache_statistics s{};
    s.struct_size = sizeof s;
    call([&] { return pyrt_moe_cache_get_statistics(cache_, &s); });
    using namespace py::literals;
    const auto four = [](const uint64_t* v) { return std::vector<uint64_t>(v, v + 4); };
    py::dict d("prefetching"_a = s.prefetching, "limit_bytes"_a = s.limit_bytes,
               "capacity_bytes"_a = s.capacity_bytes, "resident_bytes"_a = s.used_bytes,
               "resident"_a = four(s.resident), "hits"_a = four(s.hits),
               "misses"_a = four(s.misses), "bytes_read"_a = s.bytes_read,
               "evictions"_a = s.evictions, "evicted_bytes"_a = s.evicted_bytes);
    d["prefetched_bytes"] = s.prefetched_bytes;
    d["prefetch_useful_bytes"] = s.prefetch_useful_bytes;
    d["prefetch_wasted_bytes"] = s.prefetch_wasted_bytes;
    d["prefetch_cancelled"] = s.prefetch_cancelled;
    d["read_errors"] = s.read_errors;
    d["checksum_errors"] = s.checksum_errors;
    d["quarantined"] = s.quarantined;
    d["failed_tokens"] = s.failed_tokens;
    d["degraded_tokens"] = s.degraded_tokens;
    d["calls"] = s.calls;
    d["waits"] = s.waits;
    d["wait_seconds"] = static_cast<double>(s.wait_nanoseconds) * 1e-9;
    d["backend"] = std::string(s.backend);
    return d;
  }

 private:
  std::shared_ptr<MoeStore> store_;
  std::shared_ptr<Budget> budget_;
  pyrt_moe_cache* cache_ = nullptr;
};

py::tuple plan(int32_t order, const Counts& counts, const Ints& resident, const Doubles& load,
               const Doubles& compute) {
  const int64_t* cs = contiguous(counts, {-1, -1}, "counts");
  const int64_t experts = counts.shape(0), levels = counts.shape(1);
  const int32_t* rs = contiguous(resident, {experts}, "resident");
  const double* ls = contiguous(load, {levels}, "load_seconds");
  const double* ms = contiguous(compute, {levels}, "compute_seconds");
  std::vector<std::array<int32_t, 2>> planes(static_cast<size_t>(experts * levels) + 1);
  int64_t count = 0;
  double makespan = 0;
  call([&] {
    return pyrt_moe_plan(order, experts, static_cast<int32_t>(levels), cs, rs, ls, ms,
                         planes.data()->data(), &count, &makespan);
  });
  planes.resize(static_cast<size_t>(count));
  return py::make_tuple(planes, makespan);
}

double makespan(const Counts& counts, const Ints& resident, const Doubles& load,
                const Doubles& compute, const Ints& planes) {
  const int64_t* cs = contiguous(counts, {-1, -1}, "counts");
  const int64_t experts = counts.shape(0), levels = counts.shape(1);
  const int32_t* rs = contiguous(resident, {experts}, "resident");
  const double* ls = contiguous(load, {levels}, "load_seconds");
  const double* ms = contiguous(compute, {levels}, "compute_seconds");
  const int32_t* ps = contiguous(planes, {-1, 2}, "planes");
  const int64_t count = planes.shape(0);
  double seconds = 0;
  call([&] {
    return pyrt_moe_makespan(experts, static_cast<int32_t>(levels), cs, rs, ls, ms, ps, count,
                             &seconds);
  });
  return seconds;
}

}  // namespace

void bind_moe_cache(py::module_& m) {
  // noconvert: an array of another dtype is refused, never copied silently.
  const auto nc = [](const char* name) { return py::arg(name).noconvert(); };
  py::class_<MoeCache>(m, "MoeCache")
      .def(py::init<std::shared_ptr<MoeStore>, std::shared_ptr<Budget>, uint64_t, int32_t, uint64_t,
                    int32_t, int32_t, int32_t, bool, bool, bool>(),
           py::arg("store"), py::arg("budget").none(true), py::arg("limit_bytes"),
           py::arg("priority"), py::arg("scratch_bytes"), py::arg("floor"), py::arg("threads"),
           py::arg("order"), py::arg("direct"), py::arg("strict"), py::arg("worth_errors"))
      .def("close", &MoeCache::close)
      .def("ffn", &MoeCache::ffn, py::arg("layer"), py::arg("hidden"), nc("x"), nc("ids"),
           nc("weights"), nc("levels").none(true), py::arg("level"), nc("floors").none(true),
           nc("out"), nc("status"))
      .def("prefetch", &MoeCache::prefetch, py::arg("layer"), nc("experts"), py::arg("level"))
      .def("missing", &MoeCache::missing, py::arg("layer"), nc("experts"), py::arg("level"))
      .def("shrink", &MoeCache::shrink, py::arg("bytes"))
      .def("drain", &MoeCache::drain)
      .def("verify", &MoeCache::verify)
      .def("statistics", &MoeCache::statistics);
  m.def("moe_plan", &plan, py::arg("order"), nc("counts"), nc("resident"), nc("load_seconds"),
        nc("compute_seconds"));
  m.def("moe_makespan", &makespan, nc("counts"), nc("resident"), nc("load_seconds"),
        nc("compute_seconds"), nc("planes"));
}

}  // namespace pyruntime::bindings
