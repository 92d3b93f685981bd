#include "capi/kv.hpp"

#include <algorithm>
#include <cstring>

#include "capi/error.hpp"
#include "kv/batch.hpp"

using namespace pyruntime;

struct pyrt_kv_batch : kv::Batch {
  pyrt_kv_batch(pyrt_kv& pool, std::span<const uint64_t> seqs, std::span<const Arrays> arrays,
                int32_t* lengths)
      : Batch(pool, seqs, arrays, lengths), pool(pool) {}
  pyrt_kv& pool;
};

namespace {

kv::Options convert(const pyrt_kv_options& given) {
  pyrt_kv_options o;
  pyrt_kv_options_init(&o);
  if (given.struct_size < offsetof(pyrt_kv_options, max_seqs)) {
    fail(PYRT_EINVAL, "struct_size is %u; call pyrt_kv_options_init first", given.struct_size);
  }
  std::memcpy(&o, &given, std::min<size_t>(given.struct_size, sizeof o));
  if (o.num_groups < 1 || o.num_groups > PYRT_KV_MAX_GROUPS) {
    fail(PYRT_EINVAL, "num_groups is %u; it must be in 1..8", o.num_groups);
  }
  kv::Options out;
  out.block_size = o.block_size;
  out.num_layers = o.num_layers;
  for (uint32_t g = 0; g < o.num_groups; ++g) out.groups.push_back({o.num_blocks[g], o.window[g]});
  out.max_seqs = o.max_seqs;
  out.max_blocks = o.max_blocks;
  out.extra_nodes = o.extra_nodes;
  out.run_blocks = o.run_blocks;
  out.event_capacity = o.event_capacity;
  out.sharing = o.sharing != 0;
  out.seed = o.seed;
  if (o.secret_bytes > 0) {
    capi::require(o.secret, "secret");
    if (o.secret_bytes > 4096)
      fail(PYRT_EINVAL, "secret_bytes is %zu; at most 4096", o.secret_bytes);
    out.secret.assign(static_cast<const char*>(o.secret), o.secret_bytes);
  }
  return out;
}

template <class T>
std::span<T> array(T* data, size_t n, const char* name) {
  if (n == 0) return {};
  capi::require_array(data, name);
  capi::require_extents({static_cast<int64_t>(std::min<size_t>(n, INT64_MAX))}, name);
  return {data, n};
}

void check_result(const pyrt_kv_result* result) {
  if (result->struct_size < sizeof(uint32_t) * 4) {
    fail(PYRT_EINVAL, "result.struct_size is %u; set it to sizeof(pyrt_kv_result)",
         result->struct_size);
  }
}

void write(const kv::StepResult& from, pyrt_kv_result* out) {
  if (out == nullptr) return;
  pyrt_kv_result full{};
  full.struct_size = out->struct_size;
  full.num_grown = from.num_grown;
  full.num_admitted = from.num_admitted;
  full.never_fits = from.never_fits;
  std::copy(std::begin(from.left), std::end(from.left), full.left);
  std::copy(std::begin(from.need), std::end(from.need), full.need);
  full.copies = from.copies.data();
  full.num_copies = from.copies.size();
  full.evictions = from.evicted.data();
  full.num_evictions = from.evicted.size();
  std::memcpy(out, &full, std::min<size_t>(out->struct_size, sizeof full));
}

// Full is an everyday answer: the message costs nothing to build.
pyrt_status full(const kv::StepResult& result) {
  return capi::set_error(PYRT_EFULL, result.never_fits
                                         ? "a sequence would exceed the pool by itself"
                                         : "not enough KV blocks; preempt or free a sequence");
}

void write_table(const pyrt_kv& pool, uint32_t group, uint64_t seq, int32_t* out, size_t stride) {
  const uint32_t blocks = pool.blocks(seq);
  const int32_t* row = pool.row(group, seq);
  for (uint32_t i = 0; i < blocks; ++i) out[i] = std::max(row[i], -1);
  std::fill(out + blocks, out + stride, -1);
}

}  // namespace

extern "C" {

void pyrt_kv_options_init(pyrt_kv_options* options) noexcept {
  if (options == nullptr) return;
  *options = {};
  options->struct_size = sizeof *options;
  options->block_size = 16;
  options->num_layers = 1;
  options->num_groups = 1;
  options->max_seqs = 1024;
  options->run_blocks = 16;
  options->sharing = 1;
}

pyrt_status pyrt_kv_create(const pyrt_kv_options* options, pyrt_kv** out) noexcept {
  return capi::guard([&] {
    capi::require(options, "options");
    capi::require(out, "out");
    *out = new pyrt_kv(convert(*options));
  });
}

void pyrt_kv_destroy(pyrt_kv* pool) noexcept { delete pool; }

pyrt_status pyrt_kv_space_open(pyrt_kv* pool, const void* salt, size_t bytes,
                               uint32_t* space) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(space, "space");
    if (bytes > 0) capi::require(salt, "salt");
    if (bytes > 4096) fail(PYRT_EINVAL, "bytes is %zu; a salt has at most 4096", bytes);
    *space = pool->open_space(salt, bytes);
  });
}

pyrt_status pyrt_kv_seq_open(pyrt_kv* pool, uint32_t space, uint64_t* seq) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(seq, "seq");
    *seq = pool->open(space);
  });
}

pyrt_status pyrt_kv_seq_admit(pyrt_kv* pool, uint64_t seq, const int32_t* tokens, uint32_t n,
                              uint32_t reserve, uint32_t* cached) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    const auto given = array(tokens, n, "tokens");
    const uint32_t found = pool->admit(seq, given.data(), n, reserve);
    if (cached != nullptr) *cached = found;
  });
}

pyrt_status pyrt_kv_seq_fork(pyrt_kv* pool, uint64_t parent, int32_t published_only,
                             uint64_t* child) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(child, "child");
    *child = pool->fork(parent, published_only != 0);
  });
}

pyrt_status pyrt_kv_seq_free(pyrt_kv* pool, const uint64_t* seqs, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->free(array(seqs, n, "seqs"));
  });
}

pyrt_status pyrt_kv_seq_trim(pyrt_kv* pool, uint64_t seq, uint32_t tokens) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->trim(seq, tokens);
  });
}

pyrt_status pyrt_kv_seq_commit(pyrt_kv* pool, uint64_t seq, uint32_t tokens, uint32_t layers,
                               const int32_t* ids, uint32_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (ids != nullptr) capi::require_array(ids, "ids");
    pool->commit(seq, tokens, layers, ids, ids == nullptr ? 0 : n);
  });
}

pyrt_status pyrt_kv_seq_plan(pyrt_kv* pool, uint64_t seq, uint32_t tokens, uint32_t uses) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->plan(seq, tokens, uses);
  });
}

pyrt_status pyrt_kv_seq_mask(pyrt_kv* pool, uint64_t seq, const uint64_t* keep, uint32_t tokens,
                             int32_t pack, const pyrt_kv_move** moves, size_t* num_moves,
                             uint32_t* held) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (tokens > 0) capi::require_array(keep, "keep");
    capi::require(held, "held");
    if (pack != 0) {
      capi::require(moves, "moves");
      capi::require(num_moves, "num_moves");
    }
    if (tokens != pool->held(seq)) {
      fail(PYRT_EINVAL, "tokens is %u; the sequence holds %u", tokens, pool->held(seq));
    }
    pool->moves.clear();
    if (pack != 0) pool->moves_out.reserve(size_t{tokens} * pool->num_groups());
    *held = pool->mask(seq, keep, tokens, pack != 0 ? &pool->moves : nullptr);
    if (pack == 0) return;
    pool->moves_out.clear();
    for (const kv::Move& move : pool->moves) {
      pool->moves_out.push_back({move.from, move.to, move.group, 0});
    }
    *moves = pool->moves_out.data();
    *num_moves = pool->moves_out.size();
  });
}

pyrt_status pyrt_kv_seq_park(pyrt_kv* pool, uint64_t seq) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->park(seq);
  });
}

pyrt_status pyrt_kv_seq_unpark(pyrt_kv* pool, uint64_t seq) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->result.evicted.clear();
    pool->pins.unpark(seq, pool->result, pool->has_tiers() ? &pool->result.evicted : nullptr);
  });
}

pyrt_status pyrt_kv_seq_get_info(const pyrt_kv* pool, uint64_t seq,
                                 pyrt_kv_seq_info* info) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(info, "info");
    const auto [layered, layers] = pool->partial(seq);
    const pyrt_kv_seq_info full{
        info->struct_size,    pool->blocks(seq), pool->held(seq), pool->valid(seq),
        pool->published(seq), pool->parked(seq), layered,         layers};
    std::memcpy(info, &full, std::min<size_t>(info->struct_size, sizeof full));
  });
}

pyrt_status pyrt_kv_match(pyrt_kv* pool, uint32_t space, const int32_t* tokens, uint32_t n,
                          uint32_t* blocks, uint32_t* lower) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    const auto given = array(tokens, n, "tokens");
    const kv::Match match = pool->match(space, given.data(), n, nullptr);
    if (blocks != nullptr) *blocks = match.blocks;
    if (lower != nullptr) *lower = match.lower;
  });
}

pyrt_status pyrt_kv_step(pyrt_kv* pool, const pyrt_kv_ops* given, pyrt_kv_result* result) noexcept {
  bool fitted = true;
  const pyrt_status status = capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(given, "ops");
    capi::require(result, "result");
    check_result(result);
    if (given->struct_size < offsetof(pyrt_kv_ops, tables)) {
      fail(PYRT_EINVAL, "ops.struct_size is %u; set it to sizeof(pyrt_kv_ops)", given->struct_size);
    }
    pyrt_kv_ops o{};
    std::memcpy(&o, given, std::min<size_t>(given->struct_size, sizeof o));
    if ((o.flags & ~15u) != 0) fail(PYRT_EINVAL, "flags is %#x; only the lowest 4 bits", o.flags);
    const auto frees = array(o.frees, o.num_frees, "frees");
    const auto trims = array(o.trims, o.num_trims, "trims");
    const auto grows = array(o.grows, o.num_grows, "grows");
    const auto admissions = array(o.admissions, o.num_admissions, "admissions");
    const size_t rows = grows.size() + admissions.size();
    if (o.tables != nullptr) {
      for (uint32_t g = 0; rows > 0 && g < pool->num_groups(); ++g) {
        capi::require_array(o.tables[g], "tables");
      }
      for (const pyrt_kv_growth& each : grows) {
        const size_t blocks = std::max(pool->blocks(each.seq), pool->blocks_for(each.tokens));
        if (blocks > o.table_stride) {
          fail(PYRT_EINVAL, "table_stride is %zu; a row has %zu blocks", o.table_stride, blocks);
        }
      }
    }
    for (const pyrt_kv_admission& each : admissions) {
      if (each.num_tokens > 0) capi::require_array(each.tokens, "admissions.tokens");
      const size_t blocks = pool->blocks_for(std::max(each.room, each.num_tokens));
      if (o.tables != nullptr && blocks > o.table_stride) {
        fail(PYRT_EINVAL, "table_stride is %zu; a row has %zu blocks", o.table_stride, blocks);
      }
    }
    pool->scratch_growths.resize(trims.size() + grows.size());
    pool->scratch_admissions.resize(admissions.size());
    kv::Growth* at = pool->scratch_growths.data();
    for (const pyrt_kv_growth& each : trims) *at++ = {each.seq, each.tokens};
    for (const pyrt_kv_growth& each : grows) *at++ = {each.seq, each.tokens};
    for (size_t i = 0; i < admissions.size(); ++i) {
      const pyrt_kv_admission& a = admissions[i];
      pool->scratch_admissions[i] = {a.space, a.tokens, a.num_tokens, a.room, a.reserve, 0, 0};
    }
    kv::StepOps ops;
    ops.frees = frees;
    ops.trims = {pool->scratch_growths.data(), trims.size()};
    ops.grows = {pool->scratch_growths.data() + trims.size(), grows.size()};
    ops.admissions = pool->scratch_admissions;
    ops.prefix = (o.flags & PYRT_KV_PREFIX) != 0;
    ops.keep_promises = (o.flags & PYRT_KV_PROMISES) != 0;
    ops.pins_end = (o.flags & PYRT_KV_PINS_END) != 0;
    const bool dry = (o.flags & PYRT_KV_DRY) != 0;
    if (ops.pins_end && !dry) fail(PYRT_EINVAL, "PYRT_KV_PINS_END goes with PYRT_KV_DRY only");
    fitted = pool->pins.step(ops, pool->result, dry);
    write(pool->result, result);
    if (dry || (!fitted && !ops.prefix)) return;
    for (uint32_t i = 0; i < pool->result.num_admitted; ++i) {
      admissions[i].seq = pool->scratch_admissions[i].seq;
      admissions[i].cached = pool->scratch_admissions[i].cached;
    }
    if (o.tables == nullptr) return;
    for (uint32_t g = 0; g < pool->num_groups(); ++g) {
      int32_t* out = o.tables[g];
      for (uint32_t i = 0; i < pool->result.num_grown; ++i) {
        write_table(*pool, g, grows[i].seq, out + i * o.table_stride, o.table_stride);
      }
      out += grows.size() * o.table_stride;
      for (uint32_t i = 0; i < pool->result.num_admitted; ++i) {
        write_table(*pool, g, admissions[i].seq, out + i * o.table_stride, o.table_stride);
      }
    }
  });
  return status == PYRT_OK && !fitted ? full(pool->result) : status;
}

pyrt_status pyrt_kv_tables(const pyrt_kv* pool, uint32_t group, const uint64_t* seqs, size_t n,
                           int32_t* out, size_t stride) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (group >= pool->num_groups()) {
      fail(PYRT_EINVAL, "group is %u; the pool has %u", group, pool->num_groups());
    }
    const auto rows = array(seqs, n, "seqs");
    if (n > 0 && stride > 0) capi::require_array(out, "out");
    for (const uint64_t seq : rows) {
      if (pool->blocks(seq) > stride) {
        fail(PYRT_EINVAL, "stride is %zu; a row has %u blocks", stride, pool->blocks(seq));
      }
    }
    for (size_t i = 0; i < n; ++i) write_table(*pool, group, seqs[i], out + i * stride, stride);
  });
}

pyrt_status pyrt_kv_batch_create(pyrt_kv* pool, const uint64_t* seqs, size_t n,
                                 int32_t* const* tables, size_t stride, int32_t* const* slots,
                                 int32_t* lengths, pyrt_kv_batch** out) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(out, "out");
    const auto rows = array(seqs, n, "seqs");
    if (n > UINT32_MAX) fail(PYRT_EINVAL, "n is %zu; a batch has fewer than 2^32 rows", n);
    if (lengths != nullptr) capi::require_array(lengths, "lengths");
    std::vector<kv::Batch::Arrays> arrays(pool->num_groups());
    for (uint32_t g = 0; g < pool->num_groups(); ++g) {
      if (tables != nullptr && tables[g] != nullptr) {
        capi::require_array(tables[g], "tables");
        arrays[g].tables = tables[g];
        arrays[g].stride = stride;
      }
      if (slots != nullptr && slots[g] != nullptr) {
        capi::require_array(slots[g], "slots");
        arrays[g].slots = slots[g];
      }
    }
    *out = new pyrt_kv_batch(*pool, rows, arrays, lengths);
  });
}

void pyrt_kv_batch_destroy(pyrt_kv_batch* batch) noexcept { delete batch; }

pyrt_status pyrt_kv_batch_advance(pyrt_kv_batch* batch, const int32_t* tokens, size_t n,
                                  pyrt_kv_result* result) noexcept {
  bool fitted = true;
  const pyrt_status status = capi::guard([&] {
    capi::require(batch, "batch");
    if (result != nullptr) check_result(result);
    if (n != batch->rows()) fail(PYRT_EINVAL, "n is %zu; the batch has %u rows", n, batch->rows());
    const auto given = array(tokens, n, "tokens");
    fitted = batch->pool.pins.advance(*batch, given.data(), batch->pool.result);
    write(batch->pool.result, result);
  });
  return status == PYRT_OK && !fitted ? full(batch->pool.result) : status;
}

pyrt_status pyrt_kv_set_policy(pyrt_kv* pool, uint32_t policy, pyrt_kv_score score,
                               void* user) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (policy > PYRT_KV_SCORE) fail(PYRT_EINVAL, "policy is %u; it must be in 0..2", policy);
    pool->set_policy(static_cast<kv::Policy>(policy), score, user);
  });
}

pyrt_status pyrt_kv_clear(pyrt_kv* pool) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->clear();
  });
}

pyrt_status pyrt_kv_pin_blocks(pyrt_kv* pool, uint32_t group, const uint32_t* blocks,
                               size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->pin_blocks(group, array(blocks, n, "blocks"));
  });
}

pyrt_status pyrt_kv_unpin_blocks(pyrt_kv* pool, uint32_t group, const uint32_t* blocks,
                                 size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->unpin_blocks(group, array(blocks, n, "blocks"));
  });
}

pyrt_status pyrt_kv_take_blocks(pyrt_kv* pool, uint32_t group, uint32_t* blocks,
                                size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (n > 0) capi::require_array(blocks, "blocks");
    if (!pool->take_blocks(group, {blocks, n}, nullptr)) {
      fail(PYRT_EFULL, "%zu blocks of group %u are wanted and %u are to be had", n, group,
           pool->available(group));
    }
  });
}

pyrt_status pyrt_kv_events(pyrt_kv* pool, uint64_t since, pyrt_kv_event* out, size_t capacity,
                           size_t* n, uint64_t* next, uint64_t* lost) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(n, "n");
    capi::require(next, "next");
    capi::require(lost, "lost");
    if (capacity > 0) capi::require_array(out, "out");
    const kv::EventRing& ring = pool->events();
    // A number that is not made yet is one of a pool that was here before.
    const uint64_t from = since > ring.end() ? ring.end() : std::max(since, ring.begin());
    const uint64_t to = std::min<uint64_t>(ring.end(), from + capacity);
    for (uint64_t at = from; at < to; ++at) {
      const kv::Event& event = pool->event(at);
      pyrt_kv_event& written = out[at - from];
      written.type = static_cast<uint32_t>(event.type);
      written.reason = event.reason;
      std::memcpy(written.key, event.key, sizeof written.key);
    }
    *lost = since > ring.end() ? since - ring.end() : from - since;
    *n = to - from;
    *next = to;
  });
}

pyrt_status pyrt_kv_events_snapshot(pyrt_kv* pool, uint8_t* keys, size_t capacity, size_t* n,
                                    uint64_t* next) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(n, "n");
    capi::require(next, "next");
    if (capacity > 0) capi::require(keys, "keys");
    *n = pool->announced(keys, capacity);
    *next = pool->events().end();
    if (*n > capacity) fail(PYRT_EINVAL, "capacity is %zu; there are %zu keys", capacity, *n);
  });
}

pyrt_status pyrt_kv_get_statistics(const pyrt_kv* pool, pyrt_kv_statistics* out) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(out, "statistics");
    pyrt_kv_statistics full{};
    pool->fill(full);
    full.pins = pool->pins.size();
    full.pinned_blocks = pool->pins.blocks();
    full.pins_made = pool->pins.stats.made.read();
    full.pins_expired = pool->pins.stats.expired.read();
    full.pins_ended = pool->pins.stats.ended.read();
    full.pins_pressed = pool->pins.stats.pressed.read();
    full.pins_refused = pool->pins.stats.refused.read();
    full.index_closed = pool->index_closed() ? 1 : 0;
    full.struct_size = out->struct_size;
    std::memcpy(out, &full, std::min<size_t>(out->struct_size, sizeof full));
  });
}

pyrt_status pyrt_kv_available(const pyrt_kv* pool, uint32_t group, uint32_t* blocks) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(blocks, "blocks");
    if (group >= pool->num_groups()) {
      fail(PYRT_EINVAL, "group is %u; the pool has %u", group, pool->num_groups());
    }
    *blocks = pool->available(group);
  });
}

pyrt_status pyrt_kv_check(pyrt_kv* pool) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    try {
      pool->check();
      pool->pins.check();
    } catch (const Error&) {
      pool->close_index();
      throw;
    }
  });
}

pyrt_status pyrt_kv_state_hash(const pyrt_kv* pool, uint64_t* hash) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(hash, "hash");
    *hash = pool->state_hash() ^ pool->pins.hash();
  });
}

pyrt_status pyrt_kv_picture(const pyrt_kv* pool, uint32_t group, char* out, size_t width) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(out, "out");
    if (width == 0 || width > 1 << 20) fail(PYRT_EINVAL, "width is %zu; 1..2^20", width);
    const std::string picture = pool->picture(group, static_cast<uint32_t>(width));
    std::memcpy(out, picture.c_str(), picture.size() + 1);
  });
}

pyrt_status pyrt_kv_fail_at(pyrt_kv* pool, int64_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->fail_at(n);
  });
}

}  // extern "C"
