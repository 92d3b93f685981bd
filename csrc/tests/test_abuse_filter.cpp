// Bad input at every entry of filter.h; see support/abuse.hpp.
#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

struct State {
  State() {
    EXPECT_EQ(pyrt_filter_create(&options, &filter), PYRT_OK);
    EXPECT_EQ(pyrt_filter_create(&options, &grown), PYRT_OK);
    EXPECT_EQ(pyrt_filter_grow(grown, 1), PYRT_OK);
    info.struct_size = sizeof info;
    file.resize(pyrt_filter_file_bytes(filter));
    EXPECT_EQ(pyrt_filter_save(filter, file.data(), file.size(), 1), PYRT_OK);
    device.struct_size = sizeof device;
    EXPECT_EQ(pyrt_filter_device_layout(filter, &device), PYRT_OK);
    device.words = device.epochs = device.counters = 4096;  // never followed: nothing gets so far
  }
  ~State() {
    pyrt_filter_destroy(filter);
    pyrt_filter_destroy(grown);
  }
  static uintptr_t at(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
  pyrt_filter_options options{sizeof options, 16, 1000, 7, 8, 0};
  pyrt_filter *filter = nullptr, *grown = nullptr;
  pyrt_filter_info info{};
  std::vector<uint8_t> file;
  pyrt_filter_device device{};
  uint64_t keys[4] = {1, 2, 3, 4}, number = 0;
  uint32_t counts[4] = {}, kind = 0;
  uint8_t bytes[8] = {};
  int64_t offsets[5] = {0, 1, 2, 2, 4};
};

std::vector<Row> device_rows(State& s) {
  const auto call = [&s](auto change) {
    return [&s, change] {
      pyrt_filter_device d = s.device;
      change(d);
      return pyrt_filter_device_contains_async(&d, s.at(s.keys), 1, s.at(s.bytes), 0);
    };
  };
  using D = pyrt_filter_device;
  const char* contains = "pyrt_filter_device_contains_async";
  return {
      {"pyrt_filter_device_layout", "null",
       [&] { return pyrt_filter_device_layout(nullptr, &s.device); }},
      {"pyrt_filter_device_layout", "null out",
       [&] { return pyrt_filter_device_layout(s.filter, nullptr); }},
      {"pyrt_filter_read_words", "null",
       [&] { return pyrt_filter_read_words(nullptr, s.file.data(), s.device.words_bytes); }},
      {"pyrt_filter_read_words", "null out",
       [&] { return pyrt_filter_read_words(s.filter, nullptr, s.device.words_bytes); }},
      {"pyrt_filter_read_words", "bytes",
       [&] { return pyrt_filter_read_words(s.filter, s.file.data(), 8); }},
      {"pyrt_filter_write_words", "null",
       [&] { return pyrt_filter_write_words(nullptr, s.file.data(), s.device.words_bytes); }},
      {"pyrt_filter_write_words", "bytes",
       [&] { return pyrt_filter_write_words(s.filter, s.file.data(), ~0ull); }},
      {contains, "null",
       [&] {
         return pyrt_filter_device_contains_async(nullptr, s.at(s.keys), 1, s.at(s.bytes), 0);
       }},
      {contains, "struct_size", call([](D& d) { d.struct_size = 1; })},
      {contains, "bits", call([](D& d) { d.bits = 4; })},
      {contains, "odd buckets", call([](D& d) { ++d.buckets; })},
      {contains, "huge", call([](D& d) { d.num_segments = ~0ull; })},
      {contains, "bytes", call([](D& d) { --d.words_bytes; })},
      {contains, "threshold", call([](D& d) { d.threshold = 0; })},
      {contains, "null words", call([](D& d) { d.words = 0; })},
      {contains, "misaligned words", call([](D& d) { ++d.words; })},
      {contains, "null epochs", call([](D& d) { d.epochs = 0; })},
      {contains, "null counters", call([](D& d) { d.counters = 0; })},
      {contains, "null keys",
       [&] { return pyrt_filter_device_contains_async(&s.device, 0, 1, s.at(s.bytes), 0); }},
      {contains, "huge n",
       [&] {
         return pyrt_filter_device_contains_async(&s.device, s.at(s.keys), ~0ull, s.at(s.bytes), 0);
       }},
      {contains, "nothing",
       [&] { return pyrt_filter_device_contains_async(&s.device, 0, 0, 0, 0); }, PYRT_OK},
      {"pyrt_filter_device_insert_async", "null scratch",
       [&] {
         return pyrt_filter_device_insert_async(&s.device, s.at(s.keys), 1, s.at(s.bytes), 0, 0);
       }},
      {"pyrt_filter_device_insert_async", "null status",
       [&] {
         return pyrt_filter_device_insert_async(&s.device, s.at(s.keys), 1, 0, s.at(s.keys), 0);
       }},
      {"pyrt_filter_device_remove_async", "null",
       [&] { return pyrt_filter_device_remove_async(nullptr, s.at(s.keys), 1, s.at(s.bytes), 0); }},
      {"pyrt_filter_device_remove_async", "null status",
       [&] { return pyrt_filter_device_remove_async(&s.device, s.at(s.keys), 1, 0, 0); }},
  };
}

std::vector<Row> rows(State& s) {
  const auto create = [&s](auto change) {
    return [&s, change] {
      pyrt_filter_options options = s.options;
      change(options);
      pyrt_filter* filter = nullptr;
      const pyrt_status status = pyrt_filter_create(&options, &filter);
      EXPECT_EQ(filter, nullptr);
      return status;
    };
  };
  const auto hash = [&s](int64_t first, int64_t last, uint64_t bytes) {
    return [&s, first, last, bytes] {
      const int64_t offsets[] = {first, last};
      return pyrt_filter_hash_strings(s.filter, "abcd", bytes, offsets, 1, &s.number);
    };
  };
  using O = pyrt_filter_options;
  return {
      {"pyrt_filter_create", "null", [&] { return pyrt_filter_create(nullptr, &s.filter); }},
      {"pyrt_filter_create", "null out", [&] { return pyrt_filter_create(&s.options, nullptr); }},
      {"pyrt_filter_create", "struct_size", create([](O& o) { o.struct_size = 4; })},
      {"pyrt_filter_create", "no capacity", create([](O& o) { o.capacity = 0; })},
      {"pyrt_filter_create", "huge", create([](O& o) { o.capacity = ~0ull; })},
      {"pyrt_filter_create", "bits", create([](O& o) { o.bits = 12; })},
      {"pyrt_filter_create", "slots", create([](O& o) { o.slots = 4; })},
      {"pyrt_filter_destroy", "null",
       [] {
         pyrt_filter_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_filter_insert", "null",
       [&] { return pyrt_filter_insert(nullptr, s.keys, 1, 0, nullptr, nullptr); }},
      {"pyrt_filter_insert", "null keys",
       [&] { return pyrt_filter_insert(s.filter, nullptr, 1, 0, nullptr, nullptr); }},
      {"pyrt_filter_insert", "misaligned",
       [&] { return pyrt_filter_insert(s.filter, misaligned(s.keys), 1, 0, nullptr, nullptr); }},
      {"pyrt_filter_insert", "huge",
       [&] { return pyrt_filter_insert(s.filter, s.keys, kHugeSize, 0, nullptr, nullptr); }},
      {"pyrt_filter_insert", "nothing",
       [&] { return pyrt_filter_insert(s.filter, nullptr, 0, 0, nullptr, nullptr); }, PYRT_OK},
      {"pyrt_filter_contains", "null",
       [&] { return pyrt_filter_contains(nullptr, s.keys, 1, s.bytes, nullptr); }},
      {"pyrt_filter_contains", "null out",
       [&] { return pyrt_filter_contains(s.filter, s.keys, 1, nullptr, nullptr); }},
      {"pyrt_filter_contains", "right",
       [&] { return pyrt_filter_contains(s.filter, s.keys, 4, s.bytes, nullptr); }, PYRT_OK},
      {"pyrt_filter_count", "null",
       [&] { return pyrt_filter_count(nullptr, s.keys, 1, s.counts); }},
      {"pyrt_filter_count", "misaligned",
       [&] { return pyrt_filter_count(s.filter, s.keys, 1, misaligned(s.counts)); }},
      {"pyrt_filter_remove", "null",
       [&] { return pyrt_filter_remove(nullptr, s.keys, 1, nullptr, nullptr); }},
      {"pyrt_filter_remove", "absent",
       [&] { return pyrt_filter_remove(s.filter, s.keys, 4, s.bytes, &s.number); }, PYRT_OK},
      {"pyrt_filter_hash_strings", "null",
       [&] { return pyrt_filter_hash_strings(nullptr, "abcd", 4, s.offsets, 4, s.keys); }},
      {"pyrt_filter_hash_strings", "null data",
       [&] { return pyrt_filter_hash_strings(s.filter, nullptr, 4, s.offsets, 4, s.keys); }},
      {"pyrt_filter_hash_strings", "null offsets",
       [&] { return pyrt_filter_hash_strings(s.filter, "abcd", 4, nullptr, 4, s.keys); }},
      {"pyrt_filter_hash_strings", "falling", hash(3, 2, 4)},
      {"pyrt_filter_hash_strings", "outside", hash(0, 5, 4)},
      {"pyrt_filter_hash_strings", "below", hash(-1, 2, 4)},
      {"pyrt_filter_hash_strings", "right", hash(1, 4, 4), PYRT_OK},
      {"pyrt_filter_grow", "null", [] { return pyrt_filter_grow(nullptr, 0); }},
      {"pyrt_filter_grow", "has", [&] { return pyrt_filter_grow(s.grown, 1); }, PYRT_OK},
      {"pyrt_filter_device_layout", "grown",
       [&] { return pyrt_filter_device_layout(s.grown, &s.device); }, PYRT_EUNSUPPORTED},
      {"pyrt_filter_read_words", "grown",
       [&] { return pyrt_filter_read_words(s.grown, s.file.data(), s.device.words_bytes); },
       PYRT_EUNSUPPORTED},
      {"pyrt_filter_save", "grown since",
       [&] { return pyrt_filter_save(s.grown, s.file.data(), s.file.size(), 1); }},
      {"pyrt_filter_clear", "null", [] { return pyrt_filter_clear(nullptr); }},
      {"pyrt_filter_get_info", "null", [&] { return pyrt_filter_get_info(nullptr, &s.info); }},
      {"pyrt_filter_get_info", "null out", [&] { return pyrt_filter_get_info(s.filter, nullptr); }},
      {"pyrt_filter_check", "null", [] { return pyrt_filter_check(nullptr); }},
      {"pyrt_filter_file_bytes", "null", [] { return ok_if(pyrt_filter_file_bytes(nullptr) == 0); },
       PYRT_OK},
      {"pyrt_filter_save", "null",
       [&] { return pyrt_filter_save(nullptr, s.file.data(), s.file.size(), 1); }},
      {"pyrt_filter_save", "null out",
       [&] { return pyrt_filter_save(s.filter, nullptr, s.file.size(), 1); }},
      {"pyrt_filter_save", "bytes",
       [&] { return pyrt_filter_save(s.filter, s.file.data(), s.file.size() - 1, 1); }},
      {"pyrt_filter_save", "kind",
       [&] { return pyrt_filter_save(s.filter, s.file.data(), s.file.size(), 3); }},
      {"pyrt_filter_load", "null",
       [&] { return pyrt_filter_load(nullptr, 4, &s.filter, &s.kind); }},
      {"pyrt_filter_load", "null out",
       [&] { return pyrt_filter_load(s.file.data(), s.file.size(), nullptr, &s.kind); }},
      {"pyrt_filter_load", "short",
       [&] { return pyrt_filter_load(s.file.data(), 100, &s.filter, &s.kind); }, PYRT_ECORRUPT},
  };
}

std::vector<Row> map_rows(State& s) {
  const char* open = "pyrt_filter_open_map";
  return {
      {"pyrt_filter_contains1", "null", [] { return pyrt_filter_contains1(nullptr, 1); }},
      {"pyrt_filter_contains1", "absent", [&] { return pyrt_filter_contains1(s.filter, ~0ull); },
       PYRT_OK},
      {"pyrt_filter_insert1", "null", [] { return pyrt_filter_insert1(nullptr, 1); }},
      {"pyrt_filter_remove1", "null", [] { return pyrt_filter_remove1(nullptr, 1); }},
      {"pyrt_filter_compact", "null", [&] { return pyrt_filter_compact(nullptr, &s.kind); }},
      {"pyrt_filter_compact", "right", [&] { return pyrt_filter_compact(s.grown, nullptr); },
       PYRT_OK},
      {"pyrt_filter_contains_bits", "null",
       [&] { return pyrt_filter_contains_bits(nullptr, s.keys, 1, s.bytes, nullptr); }},
      {"pyrt_filter_contains_bits", "null out",
       [&] { return pyrt_filter_contains_bits(s.filter, s.keys, 1, nullptr, nullptr); }},
      {"pyrt_filter_contains_bits", "misaligned",
       [&] {
         return pyrt_filter_contains_bits(s.filter, misaligned(s.keys), 1, s.bytes, nullptr);
       }},
      {"pyrt_filter_contains_bits", "huge",
       [&] { return pyrt_filter_contains_bits(s.filter, s.keys, kHugeSize, s.bytes, nullptr); }},
      {"pyrt_filter_contains_bits", "nothing",
       [&] { return pyrt_filter_contains_bits(s.filter, nullptr, 0, nullptr, &s.number); },
       PYRT_OK},
      {"pyrt_filter_merge", "null", [&] { return pyrt_filter_merge(nullptr, s.filter); }},
      {"pyrt_filter_merge", "null other", [&] { return pyrt_filter_merge(s.filter, nullptr); }},
      {"pyrt_filter_merge", "itself", [&] { return pyrt_filter_merge(s.filter, s.filter); }},
      {"pyrt_filter_merge", "right", [&] { return pyrt_filter_merge(s.grown, s.filter); }, PYRT_OK},
      {open, "null", [&] { return pyrt_filter_open_map(nullptr, 1, &s.filter, &s.kind); }},
      {open, "null out", [&] { return pyrt_filter_open_map("x", 1, nullptr, &s.kind); }},
      {open, "none", [&] { return pyrt_filter_open_map("/nowhere/x", 1, &s.filter, &s.kind); },
       PYRT_ENOENT},
      {open, "directory", [&] { return pyrt_filter_open_map("/", 1, &s.filter, &s.kind); },
       PYRT_EIO},
      {open, "empty",
       [&] { return pyrt_filter_open_map("/proc/self/stat", 0, &s.filter, &s.kind); },
       PYRT_ECORRUPT},
  };
}

TEST(AbuseFilter, EveryEntry) {
  State s;
  std::vector<Row> all = rows(s);
  const std::vector<Row> more = device_rows(s);
  all.insert(all.end(), more.begin(), more.end());
  const std::vector<Row> maps = map_rows(s);
  all.insert(all.end(), maps.begin(), maps.end());
  run(all);
  expect_covered("filter.h", all);
}

}  // namespace
