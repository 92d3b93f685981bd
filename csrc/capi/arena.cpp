#include "pool/arena.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "capi/budget.hpp"
#include "capi/error.hpp"
#include "pyruntime/pool.h"

using namespace pyruntime;
using pool::Arena;

struct pyrt_arena : Arena {
  using Arena::Arena;
};

namespace {

Arena::Options convert(const pyrt_arena_options& given) {
  pyrt_arena_options o;
  pyrt_arena_options_init(&o);
  if (given.struct_size < offsetof(pyrt_arena_options, budget)) {
    fail(PYRT_EINVAL, "struct_size is %u; call pyrt_arena_options_init first", given.struct_size);
  }
  std::memcpy(&o, &given, std::min<size_t>(given.struct_size, sizeof o));
  if (o.pages > PYRT_PAGES_4K) fail(PYRT_EINVAL, "pages is %u; it must be in 0..3", o.pages);
  if (o.pages == PYRT_PAGES_HUGETLB) {
    fail(PYRT_EUNSUPPORTED,
         "an arena takes pages auto, thp or 4k; hugetlb pages cannot be trimmed");
  }
  if (o.node < -1 || o.node > 63) fail(PYRT_EINVAL, "node is %d; it must be in -1..63", o.node);
  if (o.num_classes > 4096) {
    fail(PYRT_EINVAL, "num_classes is %llu; it must be in 0..4096",
         static_cast<unsigned long long>(o.num_classes));
  }
  Arena::Options out;
  out.reserve_bytes = o.reserve_bytes;
  if (o.num_classes != 0) {
    capi::require_array(o.class_bytes, "class_bytes");
    out.class_bytes.assign(o.class_bytes, o.class_bytes + o.num_classes);
  }
  out.huge = o.pages != PYRT_PAGES_4K;
  out.node = o.node;
  out.budget = o.budget;
  if (o.name != nullptr) out.name = o.name;
  out.priority = o.priority;
  out.reclaim = o.reclaim;
  out.user = o.user;
  return out;
}

}  // namespace

extern "C" {

void pyrt_arena_options_init(pyrt_arena_options* options) noexcept {
  if (options == nullptr) return;
  *options = {};
  options->struct_size = sizeof *options;
  options->node = -1;
}

pyrt_status pyrt_arena_create(const pyrt_arena_options* options, pyrt_arena** out) noexcept {
  return capi::guard([&] {
    capi::require(options, "options");
    capi::require(out, "out");
    *out = new pyrt_arena(convert(*options));
  });
}

pyrt_status pyrt_arena_destroy(pyrt_arena* arena, int32_t force) noexcept {
  if (arena == nullptr) return PYRT_OK;
  return capi::guard([&] {
    const uint64_t out = arena->objects_out();
    if (out != 0 && !force) {
      fail(PYRT_ESTATE, "%llu objects are still out; release them or destroy with force",
           static_cast<unsigned long long>(out));
    }
    arena->leave_budget();
    delete arena;
  });
}

pyrt_status pyrt_arena_acquire(pyrt_arena* arena, uint64_t bytes, void** out) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    capi::require(out, "out");
    *out = arena->acquire(bytes);
  });
}

pyrt_status pyrt_arena_release(pyrt_arena* arena, void* object) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    arena->release(object);
  });
}

pyrt_status pyrt_arena_size_of(pyrt_arena* arena, const void* object, uint64_t* bytes) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    capi::require(bytes, "bytes");
    *bytes = arena->size_of(object);
  });
}

pyrt_status pyrt_arena_trim(pyrt_arena* arena, uint64_t* released_bytes) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    const uint64_t released = arena->trim();
    if (released_bytes != nullptr) *released_bytes = released;
  });
}

pyrt_status pyrt_arena_get_statistics(pyrt_arena* arena,
                                      pyrt_arena_statistics* statistics) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    capi::require(statistics, "statistics");
    pyrt_arena_statistics full = arena->statistics();
    full.struct_size = statistics->struct_size;
    std::memcpy(statistics, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_arena_check(pyrt_arena* arena) noexcept {
  return capi::guard([&] {
    capi::require(arena, "arena");
    arena->check();
  });
}

}  // extern "C"
