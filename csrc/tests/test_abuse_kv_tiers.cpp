// Bad input at every entry of kv_tiers.h; see support/abuse.hpp.
#include <unistd.h>

#include <cstdlib>

#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

std::vector<Row> export_rows() {
  static int32_t tokens[32] = {};
  static uint8_t keys[64];
  const auto keys_of = [](const void* secret, uint64_t secret_bytes, const void* space,
                          uint64_t space_bytes, const int32_t* at, uint64_t n, uint32_t size,
                          uint8_t* out) {
    return [=] {
      return pyrt_kv_export_keys(secret, secret_bytes, space, space_bytes, at, n, size, out);
    };
  };
  const char* name = "pyrt_kv_export_keys";
  return {
      {name, "right", keys_of("s", 1, "n", 1, tokens, 32, 16, keys), PYRT_OK},
      {name, "nothing", keys_of(nullptr, 0, nullptr, 0, nullptr, 0, 16, nullptr), PYRT_OK},
      {name, "null secret", keys_of(nullptr, 1, "n", 1, tokens, 32, 16, keys)},
      {name, "null space", keys_of("s", 1, nullptr, 1, tokens, 32, 16, keys)},
      {name, "huge secret", keys_of("s", kHuge, "n", 1, tokens, 32, 16, keys)},
      {name, "huge space", keys_of("s", 1, "n", ~0ull, tokens, 32, 16, keys)},
      {name, "null tokens", keys_of("s", 1, "n", 1, nullptr, 32, 16, keys)},
      {name, "misaligned", keys_of("s", 1, "n", 1, misaligned(tokens), 16, 16, keys)},
      {name, "huge tokens", keys_of("s", 1, "n", 1, tokens, kHuge, 16, keys)},
      {name, "block size 0", keys_of("s", 1, "n", 1, tokens, 32, 0, keys)},
      {name, "block size huge", keys_of("s", 1, "n", 1, tokens, 32, ~0u, keys)},
      {name, "null keys", keys_of("s", 1, "n", 1, tokens, 32, 16, nullptr)},
  };
}

struct Swaps {
  Swaps() {
    pyrt_kv_swap_options_init(&options);
    EXPECT_EQ(pyrt_kv_swap_create(&options, &swap), PYRT_OK);
    space = {sizeof space, 4, &base, 1, 16, 16};
    EXPECT_EQ(pyrt_kv_swap_add_space(swap, &space, &id), PYRT_OK);
    EXPECT_EQ(pyrt_kv_swap_add_fence(swap, &fence), PYRT_OK);
    statistics.struct_size = sizeof statistics;
  }
  ~Swaps() { pyrt_kv_swap_destroy(swap); }
  alignas(16) uint8_t memory[64] = {};
  uintptr_t base = reinterpret_cast<uintptr_t>(memory);
  pyrt_kv_swap_options options{};
  pyrt_kv_space space{};
  pyrt_kv_swap* swap = nullptr;
  uint32_t id = 0, fence = 0, number = 0;
  uint64_t ticket = 0, n = 0;
  int32_t answer = 0;
  pyrt_kv_completion ended[4] = {};
  pyrt_kv_swap_statistics statistics{};
};

std::vector<Row> swap_rows(Swaps& s) {
  const auto create = [&s](auto change) {
    return [&s, change] {
      pyrt_kv_swap_options options = s.options;
      change(options);
      pyrt_kv_swap* swap = nullptr;
      const pyrt_status status = pyrt_kv_swap_create(&options, &swap);
      EXPECT_EQ(swap, nullptr);
      return status;
    };
  };
  const auto add = [&s](auto change) {
    return [&s, change] {
      pyrt_kv_space space = s.space;
      change(space);
      return pyrt_kv_swap_add_space(s.swap, &space, &s.number);
    };
  };
  const auto copy = [&s](uint32_t from, uint32_t to, pyrt_kv_swap_run run, uint64_t n,
                         uint32_t fence) {
    return [&s, from, to, run, n, fence] {
      return pyrt_kv_swap_copy(s.swap, from, to, &run, n, fence, 0, &s.ticket);
    };
  };
  using O = pyrt_kv_swap_options;
  using S = pyrt_kv_space;
  return {
      {"pyrt_kv_swap_options_init", "null",
       [] {
         pyrt_kv_swap_options_init(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_swap_create", "null out", [&] { return pyrt_kv_swap_create(&s.options, nullptr); }},
      {"pyrt_kv_swap_create", "struct_size", create([](O& o) { o.struct_size = 2; })},
      {"pyrt_kv_swap_create", "no workers", create([](O& o) { o.workers = 0; })},
      {"pyrt_kv_swap_create", "workers", create([](O& o) { o.workers = ~0u; })},
      {"pyrt_kv_swap_create", "queue", create([](O& o) { o.queue_limit = 0; })},
      {"pyrt_kv_swap_create", "delay", create([](O& o) { o.delay_ns = ~0ull; })},
      {"pyrt_kv_swap_destroy", "null",
       [] {
         pyrt_kv_swap_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_swap_add_space", "null",
       [&] { return pyrt_kv_swap_add_space(nullptr, &s.space, &s.number); }},
      {"pyrt_kv_swap_add_space", "null space",
       [&] { return pyrt_kv_swap_add_space(s.swap, nullptr, &s.number); }},
      {"pyrt_kv_swap_add_space", "null out",
       [&] { return pyrt_kv_swap_add_space(s.swap, &s.space, nullptr); }},
      {"pyrt_kv_swap_add_space", "struct_size", add([](S& v) { v.struct_size = 0; })},
      {"pyrt_kv_swap_add_space", "no blocks", add([](S& v) { v.num_blocks = 0; })},
      {"pyrt_kv_swap_add_space", "null bases", add([](S& v) { v.bases = nullptr; })},
      {"pyrt_kv_swap_add_space", "no pieces", add([](S& v) { v.num_pieces = 0; })},
      {"pyrt_kv_swap_add_space", "huge pieces", add([](S& v) { v.num_pieces = ~0ull; })},
      {"pyrt_kv_swap_add_space", "huge piece", add([](S& v) { v.piece_bytes = ~0ull; })},
      {"pyrt_kv_swap_add_space", "overlapping blocks", add([](S& v) { v.block_stride = 8; })},
      {"pyrt_kv_swap_remove_space", "null",
       [&] { return pyrt_kv_swap_remove_space(nullptr, s.id); }},
      {"pyrt_kv_swap_add_fence", "null",
       [&] { return pyrt_kv_swap_add_fence(nullptr, &s.number); }},
      {"pyrt_kv_swap_add_fence", "null out",
       [&] { return pyrt_kv_swap_add_fence(s.swap, nullptr); }},
      {"pyrt_kv_swap_signal", "null", [&] { return pyrt_kv_swap_signal(nullptr, s.fence, 1); }},
      {"pyrt_kv_swap_signal", "no fence", [&] { return pyrt_kv_swap_signal(s.swap, ~0u, 1); }},
      {"pyrt_kv_swap_copy", "null",
       [&] {
         const pyrt_kv_swap_run run{0, 1, 1};
         return pyrt_kv_swap_copy(nullptr, s.id, s.id, &run, 1, 0, 0, &s.ticket);
       }},
      {"pyrt_kv_swap_copy", "null runs",
       [&] { return pyrt_kv_swap_copy(s.swap, s.id, s.id, nullptr, 1, 0, 0, &s.ticket); }},
      {"pyrt_kv_swap_copy", "outside", copy(s.id, s.id, {0, 4, 1}, 1, 0)},
      {"pyrt_kv_swap_copy", "wraps", copy(s.id, s.id, {~0u, 0, 2}, 1, 0)},
      {"pyrt_kv_swap_copy", "huge count", copy(s.id, s.id, {0, 1, ~0u}, 1, 0)},
      {"pyrt_kv_swap_copy", "reads what it writes", copy(s.id, s.id, {0, 1, 2}, 1, 0)},
      {"pyrt_kv_swap_copy", "right", copy(s.id, s.id, {0, 2, 2}, 1, 0), PYRT_OK},
      {"pyrt_kv_swap_cancel", "null", [&] { return pyrt_kv_swap_cancel(nullptr, 1); }},
      {"pyrt_kv_swap_wait", "null", [&] { return pyrt_kv_swap_wait(nullptr, 0, 0); }},
      {"pyrt_kv_swap_wait", "right", [&] { return pyrt_kv_swap_wait(s.swap, 0, -1); }, PYRT_OK},
      {"pyrt_kv_swap_collect", "null",
       [&] { return pyrt_kv_swap_collect(nullptr, s.ended, 4, &s.n); }},
      {"pyrt_kv_swap_collect", "null out",
       [&] { return pyrt_kv_swap_collect(s.swap, nullptr, 4, &s.n); }},
      {"pyrt_kv_swap_collect", "null n",
       [&] { return pyrt_kv_swap_collect(s.swap, s.ended, 4, nullptr); }},
      {"pyrt_kv_swap_busy", "null",
       [&] { return pyrt_kv_swap_busy(nullptr, s.id, 0, 0, &s.answer); }},
      {"pyrt_kv_swap_busy", "null out",
       [&] { return pyrt_kv_swap_busy(s.swap, s.id, 0, 0, nullptr); }},
      {"pyrt_kv_swap_fail_part", "null", [] { return pyrt_kv_swap_fail_part(nullptr, 1); }},
      {"pyrt_kv_swap_get_statistics", "null",
       [&] { return pyrt_kv_swap_get_statistics(nullptr, &s.statistics); }},
      {"pyrt_kv_swap_get_statistics", "null out",
       [&] { return pyrt_kv_swap_get_statistics(s.swap, nullptr); }},
      {"pyrt_kv_swap_check", "null", [] { return pyrt_kv_swap_check(nullptr); }},
      {"pyrt_kv_swap_check", "right", [&] { return pyrt_kv_swap_check(s.swap); }, PYRT_OK},
  };
}

struct Disks {
  Disks() {
    EXPECT_NE(mkdtemp(folder), nullptr);
    path = std::string(folder) + "/blocks";
    pyrt_kv_disk_options_init(&options);
    options.item_bytes = 16;
    options.capacity_bytes = 1 << 16;
    EXPECT_EQ(pyrt_kv_disk_open(path.c_str(), &options, &disk), PYRT_OK);
    statistics.struct_size = sizeof statistics;
  }
  ~Disks() {
    pyrt_kv_disk_close(disk);
    std::filesystem::remove_all(folder);
  }
  char folder[32] = "/tmp/pyruntime-abuse-XXXXXX";
  std::string path;
  pyrt_kv_disk_options options{};
  pyrt_kv_disk* disk = nullptr;
  uint8_t keys[64] = {1}, data[32] = {}, found[2] = {};
  uint64_t n = 0;
  pyrt_kv_disk_statistics statistics{};
};

std::vector<Row> disk_rows(Disks& d) {
  const auto open = [&d](auto change) {
    return [&d, change] {
      pyrt_kv_disk_options options = d.options;
      change(options);
      pyrt_kv_disk* disk = nullptr;
      const pyrt_status status = pyrt_kv_disk_open((d.path + "2").c_str(), &options, &disk);
      EXPECT_EQ(disk, nullptr);
      return status;
    };
  };
  using O = pyrt_kv_disk_options;
  return {
      {"pyrt_kv_disk_options_init", "null",
       [] {
         pyrt_kv_disk_options_init(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_disk_open", "null path",
       [&] {
         pyrt_kv_disk* disk = nullptr;
         return pyrt_kv_disk_open(nullptr, &d.options, &disk);
       }},
      {"pyrt_kv_disk_open", "null options",
       [&] {
         pyrt_kv_disk* disk = nullptr;
         return pyrt_kv_disk_open(d.path.c_str(), nullptr, &disk);
       }},
      {"pyrt_kv_disk_open", "null out",
       [&] { return pyrt_kv_disk_open(d.path.c_str(), &d.options, nullptr); }},
      {"pyrt_kv_disk_open", "struct_size", open([](O& o) { o.struct_size = 8; })},
      {"pyrt_kv_disk_open", "no item", open([](O& o) { o.item_bytes = 0; })},
      {"pyrt_kv_disk_open", "huge item", open([](O& o) { o.item_bytes = ~0ull; })},
      {"pyrt_kv_disk_open", "no capacity", open([](O& o) { o.capacity_bytes = 0; })},
      {"pyrt_kv_disk_open", "null fingerprint", open([](O& o) { o.fingerprint_bytes = 3; })},
      {"pyrt_kv_disk_open", "huge fingerprint", open([&d](O& o) {
         o.fingerprint = d.data;
         o.fingerprint_bytes = ~0u;
       })},
      {"pyrt_kv_disk_open", "twice",
       [&] {
         pyrt_kv_disk* disk = nullptr;
         return pyrt_kv_disk_open(d.path.c_str(), &d.options, &disk);
       },
       PYRT_ESTATE},
      {"pyrt_kv_disk_close", "null",
       [] {
         pyrt_kv_disk_close(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_disk_put", "null",
       [&] { return pyrt_kv_disk_put(nullptr, d.keys, 1, d.data, &d.n); }},
      {"pyrt_kv_disk_put", "null keys",
       [&] { return pyrt_kv_disk_put(d.disk, nullptr, 1, d.data, &d.n); }},
      {"pyrt_kv_disk_put", "null data",
       [&] { return pyrt_kv_disk_put(d.disk, d.keys, 1, nullptr, &d.n); }},
      {"pyrt_kv_disk_put", "huge",
       [&] { return pyrt_kv_disk_put(d.disk, d.keys, ~0ull, d.data, &d.n); }},
      {"pyrt_kv_disk_put", "nothing",
       [&] { return pyrt_kv_disk_put(d.disk, nullptr, 0, nullptr, nullptr); }, PYRT_OK},
      {"pyrt_kv_disk_put", "right",
       [&] { return pyrt_kv_disk_put(d.disk, d.keys, 2, d.data, nullptr); }, PYRT_OK},
      {"pyrt_kv_disk_get", "null",
       [&] { return pyrt_kv_disk_get(nullptr, d.keys, 1, d.data, d.found); }},
      {"pyrt_kv_disk_get", "null keys",
       [&] { return pyrt_kv_disk_get(d.disk, nullptr, 1, d.data, d.found); }},
      {"pyrt_kv_disk_get", "null out",
       [&] { return pyrt_kv_disk_get(d.disk, d.keys, 1, nullptr, d.found); }},
      {"pyrt_kv_disk_get", "null found",
       [&] { return pyrt_kv_disk_get(d.disk, d.keys, 1, d.data, nullptr); }},
      {"pyrt_kv_disk_get", "huge",
       [&] { return pyrt_kv_disk_get(d.disk, d.keys, kHuge, d.data, d.found); }},
      {"pyrt_kv_disk_get", "right",
       [&] { return pyrt_kv_disk_get(d.disk, d.keys, 2, d.data, d.found); }, PYRT_OK},
      {"pyrt_kv_disk_match", "null", [&] { return pyrt_kv_disk_match(nullptr, d.keys, 1, &d.n); }},
      {"pyrt_kv_disk_match", "null keys",
       [&] { return pyrt_kv_disk_match(d.disk, nullptr, 1, &d.n); }},
      {"pyrt_kv_disk_match", "null out",
       [&] { return pyrt_kv_disk_match(d.disk, d.keys, 1, nullptr); }},
      {"pyrt_kv_disk_match", "huge",
       [&] { return pyrt_kv_disk_match(d.disk, d.keys, kHuge, &d.n); }},
      {"pyrt_kv_disk_fail_io", "null", [] { return pyrt_kv_disk_fail_io(nullptr, 1, 0); }},
      {"pyrt_kv_disk_fail_io", "negative", [&] { return pyrt_kv_disk_fail_io(d.disk, -1, 0); }},
      {"pyrt_kv_disk_fail_io", "no fault", [&] { return pyrt_kv_disk_fail_io(d.disk, 1, 4); }},
      {"pyrt_kv_disk_fail_io", "a read",
       [&] {
         EXPECT_EQ(pyrt_kv_disk_fail_io(d.disk, 1, PYRT_KV_DISK_FAIL_READ), PYRT_OK);
         return pyrt_kv_disk_get(d.disk, d.keys, 2, d.data, d.found);
       },
       PYRT_EIO},
      {"pyrt_kv_disk_get_statistics", "null",
       [&] { return pyrt_kv_disk_get_statistics(nullptr, &d.statistics); }},
      {"pyrt_kv_disk_get_statistics", "null out",
       [&] { return pyrt_kv_disk_get_statistics(d.disk, nullptr); }},
      {"pyrt_kv_disk_get_statistics", "right",
       [&] {
         d.statistics.file_bytes = 7;
         d.statistics.struct_size = offsetof(pyrt_kv_disk_statistics, file_bytes);
         const pyrt_status status = pyrt_kv_disk_get_statistics(d.disk, &d.statistics);
         EXPECT_EQ(d.statistics.items, 2u);
         EXPECT_EQ(d.statistics.file_bytes, 7u);
         return status;
       },
       PYRT_OK},
      {"pyrt_kv_disk_check", "null", [] { return pyrt_kv_disk_check(nullptr); }},
      {"pyrt_kv_disk_check", "right", [&] { return pyrt_kv_disk_check(d.disk); }, PYRT_OK},
  };
}

TEST(AbuseKvTiers, EveryEntry) {
  Swaps swaps;
  Disks disks;
  std::vector<Row> rows = export_rows();
  for (const std::vector<Row>& more : {swap_rows(swaps), disk_rows(disks)}) {
    rows.insert(rows.end(), more.begin(), more.end());
  }
  run(rows);
  expect_covered("kv_tiers.h", rows);
}

}  // namespace
