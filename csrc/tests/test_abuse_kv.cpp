// Bad input at every function of kv.h.
#include <cmath>
#include <cstring>
#include <memory>

#include "support/abuse.hpp"

namespace {

using namespace pyruntime::abuse;

struct Fixture {
  pyrt_kv* pool = nullptr;
  pyrt_kv_batch* batch = nullptr;
  uint64_t seq = 0, ended = 0, none = 0xdeadbeef12345678;
  int32_t tokens[64] = {};
  uint64_t seqs[2] = {};
  uint32_t u32 = 0;
  uint64_t u64 = 0;
  size_t size = 0;
  int32_t table[64] = {};
  int32_t* tables[1] = {table};
  uint64_t keep[2] = {};
  const pyrt_kv_move* moves = nullptr;
  pyrt_kv_result result{};
  pyrt_kv_ops ops{};
  pyrt_kv_growth growth{};
  pyrt_kv_admission admission{};
  uint32_t block = 0;
  double seconds = 0;

  Fixture() {
    pyrt_kv_options o;
    pyrt_kv_options_init(&o);
    o.num_blocks[0] = 16;
    o.block_size = 4;
    o.max_seqs = 4;
    EXPECT_EQ(pyrt_kv_create(&o, &pool), PYRT_OK);
    EXPECT_EQ(pyrt_kv_seq_open(pool, 0, &seq), PYRT_OK);
    EXPECT_EQ(pyrt_kv_seq_open(pool, 0, &ended), PYRT_OK);
    EXPECT_EQ(pyrt_kv_seq_free(pool, &ended, 1), PYRT_OK);
    EXPECT_EQ(pyrt_kv_batch_create(pool, &seq, 1, nullptr, 0, nullptr, nullptr, &batch), PYRT_OK);
    seqs[0] = seqs[1] = seq;
    result.struct_size = sizeof result;
    ops.struct_size = sizeof ops;
  }
  ~Fixture() {
    pyrt_kv_batch_destroy(batch);
    pyrt_kv_destroy(pool);
  }

  pyrt_status create(const std::function<void(pyrt_kv_options&)>& change) {
    pyrt_kv_options o;
    pyrt_kv_options_init(&o);
    o.num_blocks[0] = 16;
    change(o);
    pyrt_kv* other = nullptr;
    const pyrt_status status = pyrt_kv_create(&o, &other);
    pyrt_kv_destroy(other);
    return status;
  }

  pyrt_status step(const std::function<void(pyrt_kv_ops&)>& change) {
    pyrt_kv_ops o = ops;
    change(o);
    const pyrt_status status = pyrt_kv_step(pool, &o, &result);
    EXPECT_EQ(pyrt_kv_check(pool), PYRT_OK);
    return status;
  }
};

std::vector<Row> rows(Fixture& f) {
  const auto create = [&f](const char* what, std::function<void(pyrt_kv_options&)> change) {
    return Row{"pyrt_kv_create", what, [&f, change] { return f.create(change); }};
  };
  const auto step = [&f](const char* what, std::function<void(pyrt_kv_ops&)> change,
                         pyrt_status expected = PYRT_EINVAL) {
    return Row{"pyrt_kv_step", what, [&f, change] { return f.step(change); }, expected};
  };
  return {
      {"pyrt_kv_options_init", "null",
       [] {
         pyrt_kv_options_init(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_create", "null options", [&] { return pyrt_kv_create(nullptr, &f.pool); }},
      {"pyrt_kv_create", "null out",
       [&] {
         pyrt_kv_options o;
         pyrt_kv_options_init(&o);
         return pyrt_kv_create(&o, nullptr);
       }},
      create("struct_size 0", [](auto& o) { o.struct_size = 0; }),
      create("no group", [](auto& o) { o.num_groups = 0; }),
      create("nine groups", [](auto& o) { o.num_groups = 9; }),
      create("no block", [](auto& o) { o.num_blocks[0] = 0; }),
      create("too many blocks", [](auto& o) { o.num_blocks[0] = UINT32_MAX; }),
      create("block_size 0", [](auto& o) { o.block_size = 0; }),
      create("block_size 1025", [](auto& o) { o.block_size = 1025; }),
      create("no layer", [](auto& o) { o.num_layers = 0; }),
      create("no sequence", [](auto& o) { o.max_seqs = 0; }),
      create("too many sequences", [](auto& o) { o.max_seqs = UINT32_MAX; }),
      create("run_blocks 0", [](auto& o) { o.run_blocks = 0; }),
      create("run_blocks 513", [](auto& o) { o.run_blocks = 513; }),
      create("max_blocks huge", [](auto& o) { o.max_blocks = UINT32_MAX; }),
      create("extra_nodes huge", [](auto& o) { o.extra_nodes = UINT32_MAX; }),
      create("event_capacity huge", [](auto& o) { o.event_capacity = UINT32_MAX; }),
      create("window huge", [](auto& o) { o.window[0] = UINT32_MAX; }),
      create("secret null", [](auto& o) { o.secret_bytes = 1; }),
      create("secret huge",
             [](auto& o) {
               o.secret = &o;
               o.secret_bytes = kHugeSize;
             }),
      {"pyrt_kv_destroy", "null",
       [] {
         pyrt_kv_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_space_open", "null pool",
       [&] { return pyrt_kv_space_open(nullptr, "a", 1, &f.u32); }},
      {"pyrt_kv_space_open", "null salt",
       [&] { return pyrt_kv_space_open(f.pool, nullptr, 1, &f.u32); }},
      {"pyrt_kv_space_open", "huge", [&] { return pyrt_kv_space_open(f.pool, "a", 4097, &f.u32); }},
      {"pyrt_kv_space_open", "null out",
       [&] { return pyrt_kv_space_open(f.pool, "a", 1, nullptr); }},
      {"pyrt_kv_seq_open", "null pool", [&] { return pyrt_kv_seq_open(nullptr, 0, &f.u64); }},
      {"pyrt_kv_seq_open", "null out", [&] { return pyrt_kv_seq_open(f.pool, 0, nullptr); }},
      {"pyrt_kv_seq_open", "no namespace", [&] { return pyrt_kv_seq_open(f.pool, 99, &f.u64); },
       PYRT_ENOENT},
      {"pyrt_kv_seq_admit", "null pool",
       [&] { return pyrt_kv_seq_admit(nullptr, f.seq, f.tokens, 4, 0, &f.u32); }},
      {"pyrt_kv_seq_admit", "null tokens",
       [&] { return pyrt_kv_seq_admit(f.pool, f.seq, nullptr, 4, 0, &f.u32); }},
      {"pyrt_kv_seq_admit", "misaligned",
       [&] { return pyrt_kv_seq_admit(f.pool, f.seq, misaligned(f.tokens), 4, 0, &f.u32); }},
      {"pyrt_kv_seq_admit", "foreign",
       [&] { return pyrt_kv_seq_admit(f.pool, f.none, f.tokens, 4, 0, &f.u32); }, PYRT_ESTATE},
      {"pyrt_kv_seq_fork", "null pool",
       [&] { return pyrt_kv_seq_fork(nullptr, f.seq, 0, &f.u64); }},
      {"pyrt_kv_seq_fork", "null out", [&] { return pyrt_kv_seq_fork(f.pool, f.seq, 0, nullptr); }},
      {"pyrt_kv_seq_fork", "ended", [&] { return pyrt_kv_seq_fork(f.pool, f.ended, 0, &f.u64); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_free", "null pool", [&] { return pyrt_kv_seq_free(nullptr, f.seqs, 1); }},
      {"pyrt_kv_seq_free", "null list", [&] { return pyrt_kv_seq_free(f.pool, nullptr, 1); }},
      {"pyrt_kv_seq_free", "huge", [&] { return pyrt_kv_seq_free(f.pool, f.seqs, kHugeSize); }},
      {"pyrt_kv_seq_free", "twice", [&] { return pyrt_kv_seq_free(f.pool, f.seqs, 2); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_free", "ended", [&] { return pyrt_kv_seq_free(f.pool, &f.ended, 1); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_trim", "null pool", [&] { return pyrt_kv_seq_trim(nullptr, f.seq, 0); }},
      {"pyrt_kv_seq_trim", "more", [&] { return pyrt_kv_seq_trim(f.pool, f.seq, 1); }},
      {"pyrt_kv_seq_trim", "ended", [&] { return pyrt_kv_seq_trim(f.pool, f.ended, 0); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_commit", "null pool",
       [&] { return pyrt_kv_seq_commit(nullptr, f.seq, 0, 1, nullptr, 0); }},
      {"pyrt_kv_seq_commit", "more than held",
       [&] { return pyrt_kv_seq_commit(f.pool, f.seq, UINT32_MAX, 1, nullptr, 0); }},
      {"pyrt_kv_seq_commit", "layers",
       [&] { return pyrt_kv_seq_commit(f.pool, f.seq, 0, 2, nullptr, 0); }},
      {"pyrt_kv_seq_commit", "misaligned",
       [&] { return pyrt_kv_seq_commit(f.pool, f.seq, 0, 1, misaligned(f.tokens), 4); }},
      {"pyrt_kv_seq_commit", "foreign",
       [&] { return pyrt_kv_seq_commit(f.pool, f.none, 0, 1, nullptr, 0); }, PYRT_ESTATE},
      {"pyrt_kv_seq_plan", "null pool", [&] { return pyrt_kv_seq_plan(nullptr, f.seq, 0, 1); }},
      {"pyrt_kv_seq_plan", "uses", [&] { return pyrt_kv_seq_plan(f.pool, f.seq, 0, UINT32_MAX); }},
      {"pyrt_kv_seq_plan", "ended", [&] { return pyrt_kv_seq_plan(f.pool, f.ended, 0, 1); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_mask", "null pool",
       [&] { return pyrt_kv_seq_mask(nullptr, f.seq, f.keep, 0, 0, nullptr, nullptr, &f.u32); }},
      {"pyrt_kv_seq_mask", "null keep",
       [&] { return pyrt_kv_seq_mask(f.pool, f.seq, nullptr, 4, 0, nullptr, nullptr, &f.u32); }},
      {"pyrt_kv_seq_mask", "null held",
       [&] { return pyrt_kv_seq_mask(f.pool, f.seq, f.keep, 0, 0, nullptr, nullptr, nullptr); }},
      {"pyrt_kv_seq_mask", "null moves",
       [&] { return pyrt_kv_seq_mask(f.pool, f.seq, f.keep, 0, 1, nullptr, &f.size, &f.u32); }},
      {"pyrt_kv_seq_mask", "other length",
       [&] { return pyrt_kv_seq_mask(f.pool, f.seq, f.keep, 9, 1, &f.moves, &f.size, &f.u32); }},
      {"pyrt_kv_seq_mask", "huge length",
       [&] {
         return pyrt_kv_seq_mask(f.pool, f.seq, f.keep, UINT32_MAX, 1, &f.moves, &f.size, &f.u32);
       }},
      {"pyrt_kv_seq_park", "null pool", [&] { return pyrt_kv_seq_park(nullptr, f.seq); }},
      {"pyrt_kv_seq_park", "ended", [&] { return pyrt_kv_seq_park(f.pool, f.ended); }, PYRT_ESTATE},
      {"pyrt_kv_seq_unpark", "null pool", [&] { return pyrt_kv_seq_unpark(nullptr, f.seq); }},
      {"pyrt_kv_seq_unpark", "not parked", [&] { return pyrt_kv_seq_unpark(f.pool, f.seq); },
       PYRT_ESTATE},
      {"pyrt_kv_seq_get_info", "null info",
       [&] { return pyrt_kv_seq_get_info(f.pool, f.seq, nullptr); }},
      {"pyrt_kv_seq_get_info", "ended",
       [&] {
         pyrt_kv_seq_info info{};
         info.struct_size = sizeof info;
         return pyrt_kv_seq_get_info(f.pool, f.ended, &info);
       },
       PYRT_ESTATE},
      {"pyrt_kv_match", "null pool",
       [&] { return pyrt_kv_match(nullptr, 0, f.tokens, 4, &f.u32, nullptr); }},
      {"pyrt_kv_match", "null tokens",
       [&] { return pyrt_kv_match(f.pool, 0, nullptr, 4, &f.u32, nullptr); }},
      {"pyrt_kv_match", "no namespace",
       [&] { return pyrt_kv_match(f.pool, 7, f.tokens, 4, &f.u32, nullptr); }, PYRT_ENOENT},
      {"pyrt_kv_step", "null pool", [&] { return pyrt_kv_step(nullptr, &f.ops, &f.result); }},
      {"pyrt_kv_step", "null ops", [&] { return pyrt_kv_step(f.pool, nullptr, &f.result); }},
      {"pyrt_kv_step", "null result", [&] { return pyrt_kv_step(f.pool, &f.ops, nullptr); }},
      {"pyrt_kv_step", "result size 0",
       [&] {
         pyrt_kv_result small{};
         return pyrt_kv_step(f.pool, &f.ops, &small);
       }},
      step("size 0", [](auto& o) { o.struct_size = 0; }),
      step("flags", [](auto& o) { o.flags = 16; }),
      step("pins end in a real step", [](auto& o) { o.flags = PYRT_KV_PINS_END; }),
      step("null frees", [](auto& o) { o.num_frees = 1; }),
      step("null trims", [](auto& o) { o.num_trims = 1; }),
      step("null grows", [](auto& o) { o.num_grows = 1; }),
      step("null admissions", [](auto& o) { o.num_admissions = 1; }),
      step("huge grows",
           [&f](auto& o) {
             o.grows = &f.growth;
             o.num_grows = kHugeSize;
           }),
      step(
          "freed twice",
          [&f](auto& o) {
            o.frees = f.seqs;
            o.num_frees = 2;
          },
          PYRT_ESTATE),
      step(
          "grows what is none",
          [&f](auto& o) {
            f.growth = {f.none, 4, 0};
            o.grows = &f.growth;
            o.num_grows = 1;
          },
          PYRT_ESTATE),
      step(
          "grows what it frees",
          [&f](auto& o) {
            f.growth = {f.seq, 4, 0};
            o.frees = f.seqs;
            o.grows = &f.growth;
            o.num_frees = o.num_grows = 1;
          },
          PYRT_ESTATE),
      step(
          "never fits",
          [&f](auto& o) {
            f.growth = {f.seq, UINT32_MAX, 0};
            o.grows = &f.growth;
            o.num_grows = 1;
          },
          PYRT_EFULL),
      step("trims what it has not",
           [&f](auto& o) {
             f.growth = {f.seq, 4, 0};
             o.trims = &f.growth;
             o.num_trims = 1;
           }),
      step("admits null tokens",
           [&f](auto& o) {
             f.admission = {nullptr, 0, 4, 0, 4, 0, 0, 0};
             o.admissions = &f.admission;
             o.num_admissions = 1;
           }),
      step(
          "admits to no namespace",
          [&f](auto& o) {
            f.admission = {f.tokens, 0, 4, 99, 4, 0, 0, 0};
            o.admissions = &f.admission;
            o.num_admissions = 1;
          },
          PYRT_ENOENT),
      step("narrow table",
           [&f](auto& o) {
             f.growth = {f.seq, 40, 0};
             o.grows = &f.growth;
             o.num_grows = 1;
             o.tables = f.tables;
             o.table_stride = 1;
           }),
      step("null table",
           [&f](auto& o) {
             static int32_t* none[1] = {};
             f.growth = {f.seq, 4, 0};
             o.grows = &f.growth;
             o.num_grows = 1;
             o.tables = none;
             o.table_stride = 16;
           }),
      {"pyrt_kv_tables", "group",
       [&] { return pyrt_kv_tables(f.pool, 1, f.seqs, 1, f.table, 16); }},
      {"pyrt_kv_tables", "null out",
       [&] { return pyrt_kv_tables(f.pool, 0, f.seqs, 1, nullptr, 16); }},
      {"pyrt_kv_tables", "ended",
       [&] { return pyrt_kv_tables(f.pool, 0, &f.ended, 1, f.table, 16); }, PYRT_ESTATE},
      {"pyrt_kv_batch_create", "null pool",
       [&] {
         pyrt_kv_batch* out;
         return pyrt_kv_batch_create(nullptr, f.seqs, 1, nullptr, 0, nullptr, nullptr, &out);
       }},
      {"pyrt_kv_batch_create", "twice",
       [&] {
         pyrt_kv_batch* out;
         return pyrt_kv_batch_create(f.pool, f.seqs, 2, nullptr, 0, nullptr, nullptr, &out);
       },
       PYRT_ESTATE},
      {"pyrt_kv_batch_create", "huge",
       [&] {
         pyrt_kv_batch* out;
         return pyrt_kv_batch_create(f.pool, f.seqs, kHugeSize, nullptr, 0, nullptr, nullptr, &out);
       }},
      {"pyrt_kv_batch_create", "misaligned lengths",
       [&] {
         pyrt_kv_batch* out;
         return pyrt_kv_batch_create(f.pool, f.seqs, 1, nullptr, 0, nullptr, misaligned(f.table),
                                     &out);
       }},
      {"pyrt_kv_batch_destroy", "null",
       [] {
         pyrt_kv_batch_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_kv_batch_advance", "null",
       [&] { return pyrt_kv_batch_advance(nullptr, f.tokens, 1, nullptr); }},
      {"pyrt_kv_batch_advance", "other length",
       [&] { return pyrt_kv_batch_advance(f.batch, f.tokens, 2, nullptr); }},
      {"pyrt_kv_batch_advance", "null tokens",
       [&] { return pyrt_kv_batch_advance(f.batch, nullptr, 1, nullptr); }},
      {"pyrt_kv_set_policy", "unknown",
       [&] { return pyrt_kv_set_policy(f.pool, 3, nullptr, nullptr); }},
      {"pyrt_kv_set_policy", "no function",
       [&] { return pyrt_kv_set_policy(f.pool, PYRT_KV_SCORE, nullptr, nullptr); }},
      {"pyrt_kv_clear", "null", [] { return pyrt_kv_clear(nullptr); }},
      {"pyrt_kv_pin_blocks", "group", [&] { return pyrt_kv_pin_blocks(f.pool, 8, &f.block, 1); }},
      {"pyrt_kv_pin_blocks", "free", [&] { return pyrt_kv_pin_blocks(f.pool, 0, &f.block, 1); },
       PYRT_ESTATE},
      {"pyrt_kv_unpin_blocks", "not pinned",
       [&] { return pyrt_kv_unpin_blocks(f.pool, 0, &f.block, 1); }, PYRT_ESTATE},
      {"pyrt_kv_take_blocks", "null", [&] { return pyrt_kv_take_blocks(nullptr, 0, &f.block, 1); }},
      {"pyrt_kv_take_blocks", "null blocks",
       [&] { return pyrt_kv_take_blocks(f.pool, 0, nullptr, 1); }},
      {"pyrt_kv_take_blocks", "group", [&] { return pyrt_kv_take_blocks(f.pool, 8, &f.block, 1); }},
      {"pyrt_kv_take_blocks", "more than there are",
       [&] { return pyrt_kv_take_blocks(f.pool, 0, &f.block, SIZE_MAX / 8); }, PYRT_EFULL},
      {"pyrt_kv_pin", "null", [&] { return pyrt_kv_pin(f.pool, f.seq, 0, 0, nullptr); }},
      {"pyrt_kv_pin", "none", [&] { return pyrt_kv_pin(f.pool, 12345, 0, 0, &f.u64); },
       PYRT_ESTATE},
      {"pyrt_kv_unpin", "zero", [&] { return pyrt_kv_unpin(f.pool, 0); }, PYRT_ESTATE},
      {"pyrt_kv_unpin", "none", [&] { return pyrt_kv_unpin(f.pool, ~0ull); }, PYRT_ESTATE},
      {"pyrt_kv_tick", "null", [] { return pyrt_kv_tick(nullptr, 0, nullptr); }},
      {"pyrt_kv_tick", "the end of time",
       [&] {
         pyrt_kv_tick(f.pool, INT64_MIN, nullptr);
         return pyrt_kv_tick(f.pool, INT64_MAX, nullptr);
       },
       PYRT_OK},
      {"pyrt_kv_pin_cap", "above 1", [&] { return pyrt_kv_pin_cap(f.pool, 1.5); }},
      {"pyrt_kv_pin_cap", "NaN", [&] { return pyrt_kv_pin_cap(f.pool, NAN); }},
      {"pyrt_kv_ttl_observe", "negative", [&] { return pyrt_kv_ttl_observe(f.pool, "t", 1, -1); }},
      {"pyrt_kv_ttl_observe", "null", [&] { return pyrt_kv_ttl_observe(f.pool, nullptr, 1, 1); }},
      {"pyrt_kv_ttl_observe", "huge",
       [&] { return pyrt_kv_ttl_observe(f.pool, "t", kHugeSize, 1); }},
      {"pyrt_kv_ttl_ended", "0", [&] { return pyrt_kv_ttl_ended(f.pool, 0); }},
      {"pyrt_kv_ttl_ended", "huge", [&] { return pyrt_kv_ttl_ended(f.pool, ~0u); }},
      {"pyrt_kv_ttl_suggest", "null",
       [&] { return pyrt_kv_ttl_suggest(f.pool, "t", 1, nullptr, &f.seconds); }},
      {"pyrt_kv_ttl_suggest", "no size",
       [&] {
         const pyrt_kv_ttl ttl{};
         return pyrt_kv_ttl_suggest(f.pool, "t", 1, &ttl, &f.seconds);
       }},
      {"pyrt_kv_ttl_suggest", "unknown rule",
       [&] {
         const pyrt_kv_ttl ttl{sizeof ttl, 2, 0, 0, 0, 1};
         return pyrt_kv_ttl_suggest(f.pool, "t", 1, &ttl, &f.seconds);
       }},
      {"pyrt_kv_ttl_suggest", "infinite wait",
       [&] {
         const pyrt_kv_ttl ttl{sizeof ttl, 0, INFINITY, 0, 0, 1};
         return pyrt_kv_ttl_suggest(f.pool, "t", 1, &ttl, &f.seconds);
       }},
      {"pyrt_kv_events", "null",
       [&] { return pyrt_kv_events(f.pool, 0, nullptr, 1, &f.size, &f.u64, &f.u64); }},
      {"pyrt_kv_events", "null next",
       [&] { return pyrt_kv_events(f.pool, 0, nullptr, 0, &f.size, nullptr, &f.u64); }},
      {"pyrt_kv_events_snapshot", "null keys",
       [&] { return pyrt_kv_events_snapshot(f.pool, nullptr, 1, &f.size, &f.u64); }},
      {"pyrt_kv_get_statistics", "null", [&] { return pyrt_kv_get_statistics(f.pool, nullptr); }},
      {"pyrt_kv_available", "group", [&] { return pyrt_kv_available(f.pool, 1, &f.u32); }},
      {"pyrt_kv_check", "null", [] { return pyrt_kv_check(nullptr); }},
      {"pyrt_kv_state_hash", "null", [&] { return pyrt_kv_state_hash(f.pool, nullptr); }},
      {"pyrt_kv_picture", "width 0",
       [&] { return pyrt_kv_picture(f.pool, 0, reinterpret_cast<char*>(f.table), 0); }},
      {"pyrt_kv_picture", "group",
       [&] { return pyrt_kv_picture(f.pool, 5, reinterpret_cast<char*>(f.table), 8); }},
      {"pyrt_kv_fail_at", "null", [] { return pyrt_kv_fail_at(nullptr, 0); }},
  };
}

TEST(AbuseKv, EveryFunctionRefusesBadInputAndStaysAsItWas) {
  Fixture f;
  uint64_t before = 0, after = 0;
  ASSERT_EQ(pyrt_kv_state_hash(f.pool, &before), PYRT_OK);
  const std::vector<Row> all = rows(f);
  run(all);
  ASSERT_EQ(pyrt_kv_state_hash(f.pool, &after), PYRT_OK);
  EXPECT_EQ(before, after);
  expect_covered("kv.h", all);
}

}  // namespace
