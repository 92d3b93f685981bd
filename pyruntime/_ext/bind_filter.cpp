// The cuckoo filter on numpy arrays of uint64 keys, and on strings by their hash.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "arrow_keys.hpp"
#include "budget.hpp"

namespace pyruntime::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Keys = Array<uint64_t>;

// Appends a code point as UTF-8; false for what is none.
bool append_utf8(std::string& text, uint32_t c) {
  const auto tail = [&](unsigned shift) {
    text.push_back(static_cast<char>(0x80U | (c >> shift & 0x3fU)));
  };
  if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return false;
  if (c < 0x80) {
    text.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    text.push_back(static_cast<char>(0xc0U | c >> 6));
    tail(0);
  } else if (c < 0x10000) {
    text.push_back(static_cast<char>(0xe0U | c >> 12));
    tail(6);
    tail(0);
  } else {
    text.push_back(static_cast<char>(0xf0U | c >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
  return true;
}

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
  py::dict layout() const {
    using namespace py::literals;
    return py::dict("bits"_a = device_.bits, "slots"_a = device_.slots,
                    "threshold"_a = device_.threshold, "buckets"_a = device_.buckets,
                    "num_segments"_a = device_.num_segments, "seed"_a = device_.seed,
                    "words"_a = device_.words, "epochs"_a = device_.epochs,
                    "counters"_a = device_.counters);
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
  void contains_into(const Keys& keys, Array<uint8_t>& out) const {
    const auto [at, n, to] = three(keys, out);
    call(
        [&, at = at, n = n, to = to] { return pyrt_filter_contains(filter_, at, n, to, nullptr); });
  }
  void contains_bits(const Keys& keys, Array<uint8_t>& out) const {
    if (out.size() != (keys.size() + 7) / 8) throw py::value_error("out must have a bit per key");
    uint8_t* to = out.mutable_data();
    const auto n = static_cast<uint64_t>(keys.size());
    const uint64_t* at = keys.data();
    call([&] { return pyrt_filter_contains_bits(filter_, at, n, to, nullptr); });
  }
  bool contains_one(uint64_t key) const {
    uint8_t found = 0;
    check(pyrt_filter_contains(filter_, &key, 1, &found, nullptr));
    return found != 0;
  }
  void count(const Keys& keys, Array<uint32_t>& out) const {
    if (out.size() != keys.size()) throw py::value_error("out must be as long as keys");
    uint32_t* to = out.mutable_data();
    const auto n = static_cast<uint64_t>(keys.size());
    const uint64_t* at = keys.data();
    call([&] { return pyrt_filter_count(filter_, at, n, to); });
  }
  void merge(const Filter& other) {
    call([&] { return pyrt_filter_merge(filter_, other.filter_); });
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
  // Keys of a numpy array of fixed-width strings, dtype S or (native) U: bytes behind the last that
  // is not 0 do not count, text counts as UTF-8.
  Keys hash_fixed(const py::array& strings) const {
    const char kind = strings.dtype().kind();
    if ((kind != 'S' && kind != 'U') || strings.ndim() != 1 ||
        (strings.flags() & py::array::c_style) == 0) {
      throw py::value_error("strings must be one contiguous axis of dtype S or U");
    }
    const auto n = strings.size();
    const auto width = static_cast<size_t>(strings.itemsize());
    const auto* from = static_cast<const char*>(strings.data());
    Keys keys(n);
    uint64_t* to = keys.mutable_data();
    call([&] {
      constexpr py::ssize_t kStrings = 1 << 14;  // at a time
      std::string text;
      std::vector<int64_t> offsets;
      for (py::ssize_t begin = 0; begin < n; begin += kStrings) {
        const auto here = std::min(kStrings, n - begin);
        text.clear();
        offsets.assign(1, 0);
        for (const char* at = from + static_cast<size_t>(begin) * width;
             offsets.size() <= static_cast<size_t>(here); at += width) {
          if (kind == 'S') {
            size_t length = width;
            while (length > 0 && at[length - 1] == 0) --length;
            text.append(at, length);
          } else {
            size_t length = width / 4;
            uint32_t c = 0;
            const auto read = [&](size_t i) { std::memcpy(&c, at + 4 * i, 4); };
            for (; length > 0 && (read(length - 1), c == 0); --length) {
            }
            for (size_t i = 0; i < length; ++i) {
              read(i);
              if (!append_utf8(text, c)) throw py::value_error("a key has no UTF-8");
            }
          }
          offsets.push_back(static_cast<int64_t>(text.size()));
        }
        const pyrt_status status =
            pyrt_filter_hash_strings(filter_, text.data(), text.size(), offsets.data(),
                                     static_cast<uint64_t>(here), to + begin);
        if (status != PYRT_OK) return status;
      }
      return pyrt_status{PYRT_OK};
    });
    return keys;
  }
  py::tuple hash_arrow(const py::capsule& schema, const py::capsule& array) const {
    return arrow_array_keys(filter_, schema, array);
  }
  py::tuple hash_arrow_stream(const py::capsule& stream) const {
    return arrow_stream_keys(filter_, stream);
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(filter_); }
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
  uint32_t compact() {
    uint32_t dropped = 0;
    call([&] { return pyrt_filter_compact(filter_, &dropped); });
    return dropped;
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
      .def("layout", &FilterDevice::layout)
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
      .def("contains_into", &Filter::contains_into, nc("keys"), nc("out"))
      .def("contains_bits", &Filter::contains_bits, nc("keys"), nc("out"))
      .def("contains_one", &Filter::contains_one, py::arg("key"))
      .def("count", &Filter::count, nc("keys"), nc("out"))
      .def("merge", &Filter::merge, py::arg("other"))
      .def("hash_fixed", &Filter::hash_fixed, py::arg("strings"))
      .def("hash_arrow", &Filter::hash_arrow, py::arg("schema"), py::arg("array"))
      .def("hash_arrow_stream", &Filter::hash_arrow_stream, py::arg("stream"))
      .def("hash_strings", &Filter::hash_strings, py::arg("data"), nc("offsets"))
      .def_property_readonly("address", &Filter::address)
      .def("device", &Filter::device)
      .def("read_words", &Filter::read_words, nc("out"))
      .def("write_words", &Filter::write_words, nc("words"))
      .def("grow", &Filter::grow, py::arg("seen"))
      .def("compact", &Filter::compact)
      .def("clear", &Filter::clear)
      .def("verify", &Filter::verify)
      .def("info", &Filter::info)
      .def("save", &Filter::save, py::arg("key_kind"))
      .def_static("load", &Filter::load, py::arg("data"))
      .def_static("open_map", &Filter::open_map, py::arg("path"), py::arg("verify"));
}

}  // namespace pyruntime::bindings
