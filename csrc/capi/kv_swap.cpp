#include <algorithm>
#include <cstring>
#include <vector>

#include "capi/error.hpp"
#include "kv/swap.hpp"
#include "pyruntime/kv_tiers.h"

using namespace pyruntime;

struct pyrt_kv_swap : kv::SwapEngine {
  using SwapEngine::SwapEngine;
};

namespace {

static_assert(sizeof(pyrt_kv_swap_run) == sizeof(kv::SwapRun));

template <class Struct>
Struct sized(const Struct* given, const char* name) {
  capi::require(given, name);
  Struct full{};
  if (given->struct_size < sizeof full) {
    fail(PYRT_EINVAL, "struct_size is %u; it must be at least %zu", given->struct_size,
         sizeof full);
  }
  std::memcpy(&full, given, sizeof full);
  return full;
}

}  // namespace

extern "C" {

void pyrt_kv_swap_options_init(pyrt_kv_swap_options* options) noexcept {
  if (options == nullptr) return;
  *options = {sizeof *options, 1, 4096, 0, 0, 1};
}

pyrt_status pyrt_kv_swap_create(const pyrt_kv_swap_options* options, pyrt_kv_swap** out) noexcept {
  return capi::guard([&] {
    const pyrt_kv_swap_options given = sized(options, "options");
    capi::require(out, "out");
    kv::SwapOptions wanted;
    wanted.workers[0] = given.workers;
    wanted.queue_limit = given.queue_limit;
    wanted.delay_ns = given.delay_ns;
    wanted.seed = given.seed;
    *out = new pyrt_kv_swap(wanted);
  });
}

void pyrt_kv_swap_destroy(pyrt_kv_swap* swap) noexcept { delete swap; }

pyrt_status pyrt_kv_swap_add_space(pyrt_kv_swap* swap, const pyrt_kv_space* space,
                                   uint32_t* out) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    const pyrt_kv_space given = sized(space, "space");
    capi::require(out, "out");
    if (given.num_pieces < 1 || given.num_pieces > 1u << 16u) {
      fail(PYRT_EINVAL, "num_pieces is %llu; it must be in 1..2^16",
           static_cast<unsigned long long>(given.num_pieces));
    }
    capi::require_array(given.bases, "bases");
    kv::Space made;
    for (uint64_t p = 0; p < given.num_pieces; ++p) {
      made.bases.push_back(reinterpret_cast<char*>(given.bases[p]));
    }
    made.block_stride = given.block_stride;
    made.piece_bytes = given.piece_bytes;
    made.num_blocks = given.num_blocks;
    *out = swap->add_space(made);
  });
}

pyrt_status pyrt_kv_swap_remove_space(pyrt_kv_swap* swap, uint32_t space) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    swap->remove_space(space);
  });
}

pyrt_status pyrt_kv_swap_add_fence(pyrt_kv_swap* swap, uint32_t* out) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    capi::require(out, "out");
    *out = swap->add_fence();
  });
}

pyrt_status pyrt_kv_swap_signal(pyrt_kv_swap* swap, uint32_t fence, uint64_t value) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    swap->signal(fence, value);
  });
}

pyrt_status pyrt_kv_swap_copy(pyrt_kv_swap* swap, uint32_t from, uint32_t to,
                              const pyrt_kv_swap_run* runs, uint64_t num_runs, uint32_t fence,
                              uint64_t value, uint64_t* ticket) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    capi::require(ticket, "ticket");
    if (num_runs > 0) capi::require_array(runs, "runs");
    capi::require_extents({static_cast<int64_t>(std::min<uint64_t>(num_runs, INT64_MAX))}, "runs");
    const auto* first = reinterpret_cast<const kv::SwapRun*>(runs);
    *ticket = swap->copy(from, to, {first, static_cast<size_t>(num_runs)}, {fence, value});
  });
}

pyrt_status pyrt_kv_swap_cancel(pyrt_kv_swap* swap, uint64_t ticket) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    swap->cancel(ticket);
  });
}

pyrt_status pyrt_kv_swap_wait(pyrt_kv_swap* swap, uint64_t ticket, int64_t timeout_ns) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    const int64_t limit = std::min<int64_t>(timeout_ns, int64_t{1} << 60);
    if (!(ticket == 0 ? swap->wait_all(limit) : swap->wait(ticket, limit))) {
      fail(PYRT_ETIMEOUT, "not finished after %lld ns", static_cast<long long>(timeout_ns));
    }
  });
}

pyrt_status pyrt_kv_swap_collect(pyrt_kv_swap* swap, pyrt_kv_completion* out, uint64_t capacity,
                                 uint64_t* n) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    capi::require(n, "n");
    if (capacity > 0) capi::require_array(out, "out");
    kv::Completion some[64];
    uint64_t taken = 0;
    while (taken < capacity) {
      const size_t got = swap->collect(
          {some, static_cast<size_t>(std::min<uint64_t>(capacity - taken, std::size(some)))});
      for (size_t i = 0; i < got; ++i) out[taken++] = {some[i].ticket, some[i].status, 0};
      if (got == 0) break;
    }
    *n = taken;
  });
}

pyrt_status pyrt_kv_swap_busy(pyrt_kv_swap* swap, uint32_t space, uint32_t block,
                              int32_t for_writing, int32_t* out) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    capi::require(out, "out");
    *out = swap->busy(space, block, for_writing != 0) ? 1 : 0;
  });
}

pyrt_status pyrt_kv_swap_fail_part(pyrt_kv_swap* swap, int64_t n) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    if (n < 0) fail(PYRT_EINVAL, "n is %lld; it must not be negative", static_cast<long long>(n));
    swap->fail_part(n);
  });
}

pyrt_status pyrt_kv_swap_get_statistics(pyrt_kv_swap* swap, pyrt_kv_swap_statistics* out) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    capi::require(out, "out");
    const kv::SwapStats s = swap->stats();
    const pyrt_kv_swap_statistics full = {out->struct_size, 0,           s.jobs,     s.finished,
                                          s.failed,         s.cancelled, s.blocks,   s.bytes,
                                          s.descriptors,    s.conflicts, s.copy_ns,  s.copy_cpu_ns,
                                          s.waits,          s.wait_ns,   s.in_flight};
    std::memcpy(out, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_kv_swap_check(pyrt_kv_swap* swap) noexcept {
  return capi::guard([&] {
    capi::require(swap, "swap");
    swap->check();
  });
}

}  // extern "C"
