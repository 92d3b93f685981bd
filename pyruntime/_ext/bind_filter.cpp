// The cuckoo filter on numpy arrays of uint64 keys, and on strings by their hash.
#include <pybind11/numpy.h>

#include <string>

#include "budget.hpp"

namespace pyruntime::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Keys = Array<uint64_t>;

// A table in device memory; addresses are checked behind the C ABI.
class FilterDevice {
 public:
  explicit FilterDevice(const pyrt_filter* filter) {
    device_.struct_size = sizeof device_;
    check(pyrt_filter_device_layout(filter, &device_));
  }
  py::tuple sizes() const {
    return py::make_tuple(device_.words_bytes, device_.num_segments * sizeof(uint32_t),
                          3 * sizeof(uint64_t));
  }
  void place(uintptr_t words, uintptr_t epochs, uintptr_t counters) {
    device_.words = words;
    device_.epochs = epochs;
    device_.counters = counters;
  }
  void insert(uintptr_t keys, uint64_t n, uintptr_t status, uintptr_t scratch, uintptr_t stream) {
    call([&] {
      return pyrt_filter_device_insert_async(&device_, keys, n, status, scratch, stream);
    });
  }
  void contains(uintptr_t keys, uint64_t n, uintptr_t out, uintptr_t stream) {
    call([&] { return pyrt_filter_device_contains_async(&device_, keys, n, out, stream); });
  }
  void remove(uintptr_t keys, uint64_t n, uintptr_t status, uintptr_t stream) {
    call([&] { return pyrt_filter_device_remove_async(&device_, keys, n, status, stream); });
  }

 private:
  pyrt_filter_device device_{};
};

class Filter {
 public:
  Filter(uint64_t capacity, uint32_t bits, uint32_t slots, uint64_t seed) {
    pyrt_filter_options o{};
    o.struct_size = sizeof o;
    o.bits = bits;
    o.capacity = capacity;
    o.seed = seed;
    o.slots = slots;
    check(pyrt_filter_create(&o, &filter_));
  }
  explicit Filter(pyrt_filter* filter) : filter_(filter) {}
  ~Filter() { pyrt_filter_destroy(filter_); }
  Filter(const Filter&) = delete;
  Filter& operator=(const Filter&) = delete;

  uint64_t insert(const Keys& keys, bool unique, Array<uint8_t>& status) {
    const auto [at, n, marks] = three(keys, status);
    uint64_t stored = 0;
    call([&, at = at, n = n, marks = marks] {
      return pyrt_filter_insert(filter_, at, n, unique, marks, &stored);
    });
    return stored;
  }
  uint64_t remove(const Keys& keys, Array<uint8_t>& status) {
    const auto [at, n, marks] = three(keys, status);
    uint64_t removed = 0;
    call([&, at = at, n = n, marks = marks] {
      return pyrt_filter_remove(filter_, at, n, marks, &removed);
    });
    return removed;
  }
  py::array contains(const Keys& keys) const {
    const auto n = keys.size();
    py::array_t<bool> out(n);
    static_assert(sizeof(bool) == 1);
    auto* to = reinterpret_cast<uint8_t*>(out.mutable_data());
    const uint64_t* at = keys.data();
    call([&] { return pyrt_filter_contains(filter_, at, static_cast<uint64_t>(n), to, nullptr); });
    return out;
  }
  bool contains_one(uint64_t key) const {
    uint8_t found = 0;
    check(pyrt_filter_contains(filter_, &key, 1, &found, nullptr));
    return found != 0;
  }
  py::array count(const Keys& keys) const {
    const auto n = keys.size();
    Array<uint32_t> out(n);
    uint32_t* to = out.mutable_data();
    const uint64_t* at = keys.data();
    call([&] { return pyrt_filter_count(filter_, at, static_cast<uint64_t>(n), to); });
    return out;
  }
  Keys hash_strings(const py::bytes& data, const Array<int64_t>& offsets) const {
    if (offsets.ndim() != 1 || offsets.size() < 1) throw py::value_error("offsets are missing");
    const std::string_view text = data;
    const auto n = offsets.size() - 1;
    Keys keys(n);
    uint64_t* to = keys.mutable_data();
    const int64_t* at = offsets.data();
    call([&] {
      return pyrt_filter_hash_strings(filter_, text.data(), text.size(), at,
                                      static_cast<uint64_t>(n), to);
    });
    return keys;
  }
  FilterDevice device() const { return FilterDevice(filter_); }
  void read_words(Array<uint8_t>& out) const {
    uint8_t* to = out.mutable_data();
    const auto bytes = static_cast<uint64_t>(out.size());
    call([&] { return pyrt_filter_read_words(filter_, to, bytes); });
  }
  void write_words(const Array<uint8_t>& words) {
    const uint8_t* from = words.data();
    const auto bytes = static_cast<uint64_t>(words.size());
    call([&] { return pyrt_filter_write_words(filter_, from, bytes); });
  }
  void grow(uint32_t seen) {
    call([&] { return pyrt_filter_grow(filter_, seen); });
  }
  void clear() {
    call([&] { return pyrt_filter_clear(filter_); });
  }
  void verify() const {
    call([&] { return pyrt_filter_check(filter_); });
  }
  py::dict info() const {
    pyrt_filter_info i{};
    i.struct_size = sizeof i;
    check(pyrt_filter_get_info(filter_, &i));
    using namespace py::literals;
    return py::dict("bits"_a = i.bits, "slots"_a = i.slots, "buckets"_a = i.buckets,
                    "capacity"_a = i.capacity, "occupied"_a = i.occupied,
                    "num_slots"_a = i.num_slots, "bytes"_a = i.bytes, "seed"_a = i.seed,
                    "num_segments"_a = i.num_segments, "moves"_a = i.moves, "retries"_a = i.retries,
                    "max_path"_a = i.max_path, "expected_fpr"_a = i.expected_fpr,
                    "num_generations"_a = i.num_generations);
  }
  py::bytes save(uint32_t key_kind) const {
    for (;;) {
      const uint64_t bytes = pyrt_filter_file_bytes(filter_);
      py::bytes out(nullptr, bytes);
      char* to = PyBytes_AS_STRING(out.ptr());
      bool grown = false;
      call([&] {
        const pyrt_status status = pyrt_filter_save(filter_, to, bytes, key_kind);
        grown = status != PYRT_OK && pyrt_filter_file_bytes(filter_) != bytes;
        return grown ? PYRT_OK : status;
      });
      if (!grown) return out;
    }
  }
  static py::tuple load(const py::buffer& data) {
    const py::buffer_info given = data.request();
    if (given.ndim != 1 || given.strides[0] != given.itemsize) {
      throw py::value_error("data must be contiguous bytes");
    }
    const auto bytes = static_cast<uint64_t>(given.size * given.itemsize);
    static const char nothing = 0;
    const void* at = bytes == 0 ? &nothing : given.ptr;
    pyrt_filter* filter = nullptr;
    uint32_t kind = 0;
    call([&] { return pyrt_filter_load(at, bytes, &filter, &kind); });
    return py::make_tuple(std::make_unique<Filter>(filter), kind);
  }
  static py::tuple open_map(const std::string& path, bool verify) {
    pyrt_filter* filter = nullptr;
    uint32_t kind = 0;
    call([&] { return pyrt_filter_open_map(path.c_str(), verify, &filter, &kind); });
    return py::make_tuple(std::make_unique<Filter>(filter), kind);
  }

 private:
  static std::tuple<const uint64_t*, uint64_t, uint8_t*> three(const Keys& keys,
                                                               Array<uint8_t>& status) {
    if (status.size() != keys.size()) throw py::value_error("status must be as long as keys");
    return {keys.data(), static_cast<uint64_t>(keys.size()), status.mutable_data()};
  }

  pyrt_filter* filter_ = nullptr;
};

}  // namespace

void bind_filter(py::module_& m) {
  const auto nc = [](const char* name) { return py::arg(name).noconvert(); };
  py::class_<FilterDevice>(m, "FilterDevice")
      .def("sizes", &FilterDevice::sizes)
      .def("place", &FilterDevice::place, py::arg("words"), py::arg("epochs"), py::arg("counters"))
      .def("insert", &FilterDevice::insert, py::arg("keys"), py::arg("n"), py::arg("status"),
           py::arg("scratch"), py::arg("stream"))
      .def("contains", &FilterDevice::contains, py::arg("keys"), py::arg("n"), py::arg("out"),
           py::arg("stream"))
      .def("remove", &FilterDevice::remove, py::arg("keys"), py::arg("n"), py::arg("status"),
           py::arg("stream"));
  py::class_<Filter>(m, "Filter")
      .def(py::init<uint64_t, uint32_t, uint32_t, uint64_t>(), py::arg("capacity"), py::arg("bits"),
           py::arg("slots"), py::arg("seed"))
      .def("insert", &Filter::insert, nc("keys"), py::arg("unique"), nc("status"))
      .def("remove", &Filter::remove, nc("keys"), nc("status"))
      .def("contains", &Filter::contains, nc("keys"))
      .def("contains_one", &Filter::contains_one, py::arg("key"))
      .def("count", &Filter::count, nc("keys"))
      .def("hash_strings", &Filter::hash_strings, py::arg("data"), nc("offsets"))
      .def("device", &Filter::device)
      .def("read_words", &Filter::read_words, nc("out"))
      .def("write_words", &Filter::write_words, nc("words"))
      .def("grow", &Filter::grow, py::arg("seen"))
      .def("clear", &Filter::clear)
      .def("verify", &Filter::verify)
      .def("info", &Filter::info)
      .def("save", &Filter::save, py::arg("key_kind"))
      .def_static("load", &Filter::load, py::arg("data"))
      .def_static("open_map", &Filter::open_map, py::arg("path"), py::arg("verify"));
}

}  // namespace pyruntime::bindings
