// Names of KV content as bytes, the swap engine, and the disk tier.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <vector>

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

class Swap {
 public:
  Swap(uint32_t workers, uint32_t queue_limit, uint64_t delay_ns, uint64_t seed) {
    pyrt_kv_swap_options options;
    pyrt_kv_swap_options_init(&options);
    options.workers = workers;
    options.queue_limit = queue_limit;
    options.delay_ns = delay_ns;
    options.seed = seed;
    check(pyrt_kv_swap_create(&options, &swap_));
  }
  ~Swap() {
    py::gil_scoped_release release;
    pyrt_kv_swap_destroy(swap_);
  }
  Swap(const Swap&) = delete;
  Swap& operator=(const Swap&) = delete;

  uint32_t add_space(const std::vector<uintptr_t>& bases, uint64_t block_stride,
                     uint64_t piece_bytes, uint32_t num_blocks) {
    const pyrt_kv_space space = {sizeof(pyrt_kv_space), num_blocks,   bases.data(),
                                 bases.size(),          block_stride, piece_bytes};
    uint32_t id = 0;
    check(pyrt_kv_swap_add_space(swap_, &space, &id));
    return id;
  }
  void remove_space(uint32_t space) { check(pyrt_kv_swap_remove_space(swap_, space)); }
  uint32_t add_fence() {
    uint32_t id = 0;
    check(pyrt_kv_swap_add_fence(swap_, &id));
    return id;
  }
  void signal(uint32_t fence, uint64_t value) { check(pyrt_kv_swap_signal(swap_, fence, value)); }

  uint64_t copy(uint32_t from, uint32_t to, const Array<uint32_t>& runs, uint32_t fence,
                uint64_t value) {
    if (runs.ndim() != 2 || runs.shape(1) != 3) {
      throw py::value_error("runs must have the shape (n, 3)");
    }
    static_assert(sizeof(pyrt_kv_swap_run) == 3 * sizeof(uint32_t));
    const auto* first = reinterpret_cast<const pyrt_kv_swap_run*>(runs.data());
    const auto n = static_cast<uint64_t>(runs.shape(0));
    uint64_t ticket = 0;
    call([&] { return pyrt_kv_swap_copy(swap_, from, to, first, n, fence, value, &ticket); });
    return ticket;
  }
  void cancel(uint64_t ticket) { check(pyrt_kv_swap_cancel(swap_, ticket)); }
  bool wait(uint64_t ticket, int64_t timeout_ns) {
    pyrt_status status;
    {
      py::gil_scoped_release release;
      status = pyrt_kv_swap_wait(swap_, ticket, timeout_ns);
    }
    if (status == PYRT_ETIMEOUT) return false;
    check(status);
    return true;
  }
  py::dict collect() {
    py::dict ended;
    for (;;) {
      pyrt_kv_completion some[64];
      uint64_t n = 0;
      check(pyrt_kv_swap_collect(swap_, some, std::size(some), &n));
      if (n == 0) return ended;
      for (uint64_t i = 0; i < n; ++i) ended[py::int_(some[i].ticket)] = some[i].status;
    }
  }
  bool busy(uint32_t space, uint32_t block, bool for_writing) {
    int32_t answer = 0;
    check(pyrt_kv_swap_busy(swap_, space, block, for_writing ? 1 : 0, &answer));
    return answer != 0;
  }
  void fail_part(int64_t n) { check(pyrt_kv_swap_fail_part(swap_, n)); }
  void verify() {
    call([&] { return pyrt_kv_swap_check(swap_); });
  }
  py::dict statistics() {
    pyrt_kv_swap_statistics s{};
    s.struct_size = sizeof s;
    check(pyrt_kv_swap_get_statistics(swap_, &s));
    using namespace py::literals;
    return py::dict("jobs"_a = s.jobs, "finished"_a = s.finished, "failed"_a = s.failed,
                    "cancelled"_a = s.cancelled, "blocks"_a = s.blocks, "bytes"_a = s.bytes,
                    "descriptors"_a = s.descriptors, "conflicts"_a = s.conflicts,
                    "copy_ns"_a = s.copy_ns, "copy_cpu_ns"_a = s.copy_cpu_ns, "waits"_a = s.waits,
                    "wait_ns"_a = s.wait_ns, "in_flight"_a = s.in_flight);
  }

 private:
  pyrt_kv_swap* swap_ = nullptr;
};

class Disk {
 public:
  Disk(const std::string& path, uint64_t item_bytes, uint64_t capacity_bytes,
       const py::bytes& fingerprint)
      : item_bytes_(item_bytes) {
    const std::string_view given = fingerprint;
    pyrt_kv_disk_options options;
    pyrt_kv_disk_options_init(&options);
    options.item_bytes = item_bytes;
    options.capacity_bytes = capacity_bytes;
    options.fingerprint = given.data();
    options.fingerprint_bytes =
        static_cast<uint32_t>(std::min<size_t>(given.size(), std::numeric_limits<uint32_t>::max()));
    call([&] { return pyrt_kv_disk_open(path.c_str(), &options, &disk_); });
  }
  ~Disk() { close(); }
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  void close() {
    py::gil_scoped_release release;
    pyrt_kv_disk_close(disk_);
    disk_ = nullptr;
  }
  uint64_t put(const Array<uint8_t>& keys, const Array<uint8_t>& data) {
    const uint64_t n = count(keys);
    if (static_cast<uint64_t>(data.size()) != n * item_bytes_) {
      throw py::value_error("data must have item_bytes bytes for each key");
    }
    const uint8_t* key = keys.data();
    const uint8_t* at = data.data();
    uint64_t stored = 0;
    call([&] { return pyrt_kv_disk_put(disk_, key, n, at, &stored); });
    return stored;
  }
  Array<uint8_t> get(const Array<uint8_t>& keys, Array<uint8_t> out) {
    const uint64_t n = count(keys);
    if (static_cast<uint64_t>(out.size()) != n * item_bytes_) {
      throw py::value_error("out must have item_bytes bytes for each key");
    }
    Array<uint8_t> found(static_cast<py::ssize_t>(n));
    const uint8_t* key = keys.data();
    uint8_t* at = out.mutable_data();
    uint8_t* answers = found.mutable_data();
    call([&] { return pyrt_kv_disk_get(disk_, key, n, at, answers); });
    return found;
  }
  uint64_t match(const Array<uint8_t>& keys) {
    const uint64_t n = count(keys);
    const uint8_t* key = keys.data();
    uint64_t there = 0;
    call([&] { return pyrt_kv_disk_match(disk_, key, n, &there); });
    return there;
  }
  void fail_io(int64_t n, uint32_t fault) { check(pyrt_kv_disk_fail_io(disk_, n, fault)); }
  void verify() {
    call([&] { return pyrt_kv_disk_check(disk_); });
  }
  py::dict statistics() {
    pyrt_kv_disk_statistics s{};
    s.struct_size = sizeof s;
    call([&] { return pyrt_kv_disk_get_statistics(disk_, &s); });
    using namespace py::literals;
    return py::dict("capacity"_a = s.capacity, "items"_a = s.items, "hits"_a = s.hits,
                    "misses"_a = s.misses, "corrupt"_a = s.corrupt, "stored"_a = s.stored,
                    "evicted"_a = s.evicted, "failures"_a = s.failures,
                    "bytes_read"_a = s.bytes_read, "bytes_written"_a = s.bytes_written,
                    "syncs"_a = s.syncs, "file_bytes"_a = s.file_bytes);
  }

 private:
  static uint64_t count(const Array<uint8_t>& keys) {
    if (keys.ndim() != 2 || keys.shape(1) != PYRT_KV_EXPORT_KEY_BYTES) {
      throw py::value_error("keys must have the shape (n, 32)");
    }
    return static_cast<uint64_t>(keys.shape(0));
  }

  pyrt_kv_disk* disk_ = nullptr;
  const uint64_t item_bytes_;
};

}  // namespace

void bind_kv_tiers(py::module_& m) {
  m.def("kv_export_keys", &export_keys, py::arg("secret"), py::arg("space"),
        py::arg("tokens").noconvert(), py::arg("block_size"));
  py::class_<Swap>(m, "KvSwap")
      .def(py::init<uint32_t, uint32_t, uint64_t, uint64_t>(), py::arg("workers"),
           py::arg("queue_limit"), py::arg("delay_ns"), py::arg("seed"))
      .def("add_space", &Swap::add_space, py::arg("bases"), py::arg("block_stride"),
           py::arg("piece_bytes"), py::arg("num_blocks"))
      .def("remove_space", &Swap::remove_space, py::arg("space"))
      .def("add_fence", &Swap::add_fence)
      .def("signal", &Swap::signal, py::arg("fence"), py::arg("value"))
      .def("copy", &Swap::copy, py::arg("source"), py::arg("target"), py::arg("runs").noconvert(),
           py::arg("fence"), py::arg("value"))
      .def("cancel", &Swap::cancel, py::arg("ticket"))
      .def("wait", &Swap::wait, py::arg("ticket"), py::arg("timeout_ns"))
      .def("collect", &Swap::collect)
      .def("busy", &Swap::busy, py::arg("space"), py::arg("block"), py::arg("for_writing"))
      .def("fail_part", &Swap::fail_part, py::arg("n"))
      .def("verify", &Swap::verify)
      .def("statistics", &Swap::statistics);
  py::class_<Disk>(m, "KvDisk")
      .def(py::init<const std::string&, uint64_t, uint64_t, const py::bytes&>(), py::arg("path"),
           py::arg("item_bytes"), py::arg("capacity_bytes"), py::arg("fingerprint"))
      .def("close", &Disk::close)
      .def("put", &Disk::put, py::arg("keys").noconvert(), py::arg("data").noconvert())
      .def("get", &Disk::get, py::arg("keys").noconvert(), py::arg("out").noconvert())
      .def("match", &Disk::match, py::arg("keys").noconvert())
      .def("fail_io", &Disk::fail_io, py::arg("n"), py::arg("fault"))
      .def("verify", &Disk::verify)
      .def("statistics", &Disk::statistics);
}

}  // namespace pyruntime::bindings
