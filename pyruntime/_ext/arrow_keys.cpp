#include "arrow_keys.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace pyruntime::bindings {
namespace {

// The structures of the Arrow C data and stream interfaces, as their specifications have them.
struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  int64_t flags;
  int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};
struct ArrowArray {
  int64_t length;
  int64_t null_count;
  int64_t offset;
  int64_t n_buffers;
  int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};
struct ArrowArrayStream {
  int (*get_schema)(ArrowArrayStream*, ArrowSchema* out);
  int (*get_next)(ArrowArrayStream*, ArrowArray* out);
  const char* (*get_last_error)(ArrowArrayStream*);
  void (*release)(ArrowArrayStream*);
  void* private_data;
};

using Keys = py::array_t<uint64_t, py::array::c_style>;
enum Kind { kNone = 0, kIntegers = 1, kStrings = 2 };
constexpr int64_t kMostKeys = int64_t{1} << 47;  // no address space holds more
constexpr int64_t kPiece = 1 << 14;              // strings gathered at a time

[[noreturn]] void malformed(const char* what) {
  throw py::value_error(std::string("the Arrow array is malformed: ") + what);
}

template <class T>
T& from_capsule(const py::capsule& capsule, const char* name) {
  auto* found = static_cast<T*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (found == nullptr) throw py::error_already_set();
  if (found->release == nullptr) {
    throw py::value_error(std::string(name) + " has been released");
  }
  return *found;
}

// Releases what a stream gave.
template <class T>
struct Owned : T {
  Owned() : T{} {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    const py::gil_scoped_release unlocked;
    if (this->release != nullptr) this->release(this);
  }
};

std::string format_of(const ArrowSchema& schema) {
  const std::string format = schema.format == nullptr ? "" : schema.format;
  static const char* const known[] = {"u", "U", "z", "Z", "vu", "vz", "c",
                                      "C", "s", "S", "i", "I",  "l",  "L"};
  if (schema.dictionary != nullptr ||
      std::find(std::begin(known), std::end(known), format) == std::end(known)) {
    throw py::value_error("keys are an Arrow array of format '" + format +
                          "'; it must be one of strings, binaries or integers");
  }
  return format;
}

bool has_nulls(const ArrowArray& array) {
  if (array.null_count == 0) return false;
  const auto* valid = static_cast<const uint8_t*>(array.buffers[0]);
  for (int64_t i = array.offset; valid != nullptr && i < array.offset + array.length; ++i) {
    if ((valid[i / 8] >> i % 8 & 1) == 0) return true;
  }
  return false;
}

// Buffers whose size the interface does not give are taken to be as long as they have to be.
const void* buffer_of(const ArrowArray& array, int64_t index) {
  if (index >= array.n_buffers) malformed("it has too few buffers");
  const void* const buffer = array.buffers[index];
  if (buffer == nullptr) malformed("a buffer is missing");
  return buffer;
}

template <class T>
const T* values_of(const ArrowArray& array) {
  const void* const buffer = buffer_of(array, 1);
  if (reinterpret_cast<uintptr_t>(buffer) % alignof(T) != 0) malformed("a buffer is misaligned");
  return static_cast<const T*>(buffer) + array.offset;
}

template <class T>
void copy_integers(const ArrowArray& array, uint64_t* keys) {
  const T* const from = values_of<T>(array);
  for (int64_t i = 0; i < array.length; ++i) keys[i] = static_cast<uint64_t>(from[i]);
}

template <class Offset>
void hash_by_offsets(const pyrt_filter* filter, const ArrowArray& array, uint64_t* keys) {
  const Offset* const from = values_of<Offset>(array);
  const int64_t n = array.length;
  if (array.n_buffers < 3) malformed("it has too few buffers");
  const auto* const text = static_cast<const char*>(array.buffers[2]);
  call([&] {
    std::vector<int64_t> wide;
    const int64_t* offsets = nullptr;
    if constexpr (sizeof(Offset) == sizeof(int64_t)) {
      offsets = from;
    } else {
      wide.assign(from, from + n + 1);
      offsets = wide.data();
    }
    const auto bytes = static_cast<uint64_t>(std::max<int64_t>(offsets[n], 0));
    return pyrt_filter_hash_strings(filter, text, bytes, offsets, static_cast<uint64_t>(n), keys);
  });
}

// 16 bytes each: the length, and the string itself up to 12 bytes, or its first 4, its buffer and
// its place there.
struct StringView {
  int32_t length;
  char prefix[4];
  int32_t buffer;
  int32_t offset;
};

void hash_views(const pyrt_filter* filter, const ArrowArray& array, uint64_t* keys) {
  const auto* const views = values_of<StringView>(array);
  const int64_t num_data = array.n_buffers - 3;
  if (num_data < 0) malformed("it has too few buffers");
  const void* const sizes_buffer = array.buffers[array.n_buffers - 1];
  if (num_data > 0 && sizes_buffer == nullptr) malformed("the sizes of its buffers are missing");
  const auto size_of = [&](int64_t i) {
    int64_t size = 0;
    std::memcpy(&size, static_cast<const char*>(sizes_buffer) + 8 * i, sizeof size);
    return size;
  };
  call([&] {
    std::string text;
    std::vector<int64_t> offsets;
    for (int64_t begin = 0; begin < array.length; begin += kPiece) {
      const int64_t here = std::min(kPiece, array.length - begin);
      text.clear();
      offsets.assign(1, 0);
      for (int64_t i = 0; i < here; ++i) {
        const StringView& view = views[begin + i];
        if (view.length < 0) malformed("a string has a negative length");
        if (view.length <= 12) {
          text.append(view.prefix, static_cast<size_t>(view.length));
        } else {
          if (view.buffer < 0 || view.buffer >= num_data) malformed("a string is in no buffer");
          const auto* data = static_cast<const char*>(array.buffers[2 + view.buffer]);
          const int64_t size = size_of(view.buffer);
          if (data == nullptr || view.offset < 0 || view.offset > size - view.length) {
            malformed("a string is not within its buffer");
          }
          text.append(data + view.offset, static_cast<size_t>(view.length));
        }
        offsets.push_back(static_cast<int64_t>(text.size()));
      }
      const pyrt_status status =
          pyrt_filter_hash_strings(filter, text.data(), text.size(), offsets.data(),
                                   static_cast<uint64_t>(here), keys + begin);
      if (status != PYRT_OK) return status;
    }
    return pyrt_status{PYRT_OK};
  });
}

Keys keys_of(const pyrt_filter* filter, const std::string& format, const ArrowArray& array) {
  if (array.length < 0 || array.offset < 0 || array.length > kMostKeys ||
      array.offset > kMostKeys) {
    malformed("its length or offset is out of range");
  }
  Keys keys(array.length);
  if (array.length == 0) return keys;
  if (array.n_buffers < 2 || array.buffers == nullptr) malformed("it has too few buffers");
  if (has_nulls(array)) throw py::value_error("keys are an Arrow array with nulls");
  uint64_t* const to = keys.mutable_data();
  if (format == "u" || format == "z") hash_by_offsets<int32_t>(filter, array, to);
  if (format == "U" || format == "Z") hash_by_offsets<int64_t>(filter, array, to);
  if (format == "vu" || format == "vz") hash_views(filter, array, to);
  if (format == "c") copy_integers<int8_t>(array, to);
  if (format == "C") copy_integers<uint8_t>(array, to);
  if (format == "s") copy_integers<int16_t>(array, to);
  if (format == "S") copy_integers<uint16_t>(array, to);
  if (format == "i") copy_integers<int32_t>(array, to);
  if (format == "I") copy_integers<uint32_t>(array, to);
  if (format == "l") copy_integers<int64_t>(array, to);
  if (format == "L") copy_integers<uint64_t>(array, to);
  return keys;
}

Kind kind_of(const std::string& format) {
  return std::string_view("cCsSiIlL").find(format) != std::string_view::npos ? kIntegers : kStrings;
}

// Producers may wait for threads of their own that need the interpreter.
template <class Call>
void ask(ArrowArrayStream& stream, const Call& call_producer) {
  int error = 0;
  std::string reason;
  {
    const py::gil_scoped_release unlocked;
    error = call_producer();
    if (error == 0) return;
    const char* const message =
        stream.get_last_error == nullptr ? nullptr : stream.get_last_error(&stream);
    reason = message == nullptr ? std::strerror(error) : message;
  }
  throw py::value_error("the Arrow stream failed: " + reason);
}

}  // namespace

py::tuple arrow_array_keys(const pyrt_filter* filter, const py::capsule& schema,
                           const py::capsule& array) {
  const std::string format = format_of(from_capsule<ArrowSchema>(schema, "arrow_schema"));
  Keys keys = keys_of(filter, format, from_capsule<ArrowArray>(array, "arrow_array"));
  return py::make_tuple(int{keys.size() == 0 ? kNone : kind_of(format)}, keys);
}

py::tuple arrow_stream_keys(const pyrt_filter* filter, const py::capsule& capsule) {
  auto& stream = from_capsule<ArrowArrayStream>(capsule, "arrow_array_stream");
  if (stream.get_schema == nullptr || stream.get_next == nullptr) {
    throw py::value_error("the Arrow stream is malformed: a function is missing");
  }
  Owned<ArrowSchema> schema;
  ask(stream, [&] { return stream.get_schema(&stream, &schema); });
  if (schema.release == nullptr) throw py::value_error("the Arrow stream has no schema");
  const std::string format = format_of(schema);
  py::list chunks;
  bool any = false;
  for (;;) {
    Owned<ArrowArray> array;
    ask(stream, [&] { return stream.get_next(&stream, &array); });
    if (array.release == nullptr) break;  // the end
    Keys keys = keys_of(filter, format, array);
    if (keys.size() == 0) continue;
    any = true;
    chunks.append(keys);
  }
  return py::make_tuple(int{any ? kind_of(format) : kNone}, chunks);
}

}  // namespace pyruntime::bindings
