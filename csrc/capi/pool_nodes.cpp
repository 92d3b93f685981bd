#include "pyruntime/pool_nodes.h"

#include <bit>

#include "base/os_memory.hpp"
#include "capi/error.hpp"
#include "capi/pool.hpp"
#include "pool/nodes.hpp"

using namespace pyruntime;

struct pyrt_node_pools : pool::NodePools {
  using NodePools::NodePools;
};

namespace {

std::vector<int> machine_nodes() {
  std::vector<int> nodes;
  for (uint64_t left = base::os::nodes(); left != 0; left &= left - 1) {
    nodes.push_back(std::countr_zero(left));
  }
  return nodes;
}

pyrt_status refuse(pyrt_status status) {
  switch (status) {
    case PYRT_EINVAL:
      return capi::set_error(status,
                             "a pointer is no object of the set, or a list is longer than "
                             "the objects of its node");
    case PYRT_ENOMEM:
      return capi::set_error(status,
                             "no memory for this thread's cache; the objects are still yours");
    case PYRT_ESTATE:
      return capi::set_error(status, "the pools are excluded from forked children");
    default:
      return status;
  }
}

}  // namespace

extern "C" {

uint32_t pyrt_nodes(int32_t* out, uint32_t capacity) noexcept {
  const uint64_t mask = base::os::nodes();
  uint32_t n = 0;
  for (uint64_t left = mask; left != 0; left &= left - 1, ++n) {
    if (out != nullptr && n < capacity) out[n] = std::countr_zero(left);
  }
  return n;
}

int32_t pyrt_current_node(void) noexcept { return base::os::current_node(); }

pyrt_status pyrt_node_pools_create(const pyrt_pool_options* each, const int32_t* nodes,
                                   uint32_t num_nodes, pyrt_node_of_thread node_of, void* user,
                                   pyrt_node_pools** out) noexcept {
  return capi::guard([&] {
    capi::require(each, "each");
    capi::require(out, "out");
    if (num_nodes > 64) fail(PYRT_EINVAL, "num_nodes is %u; it must be in 0..64", num_nodes);
    if (num_nodes != 0) capi::require_array(nodes, "nodes");
    const auto wanted =
        num_nodes == 0 ? machine_nodes() : std::vector<int>(nodes, nodes + num_nodes);
    *out = new pyrt_node_pools(capi::pool_options(*each), wanted, node_of, user);
  });
}

pyrt_status pyrt_node_pools_destroy(pyrt_node_pools* set, int32_t force) noexcept {
  if (set == nullptr) return PYRT_OK;
  return capi::guard([&] {
    uint64_t out = 0;
    uint64_t handles = 0;
    for (size_t i = 0; i < set->size() && !force; ++i) {
      out += set->at(i).objects_out();
      handles += set->at(i).handles();
    }
    if (out != 0 || handles != 0) {
      fail(PYRT_ESTATE, "%llu objects and %llu caches are still out; release them, or force it",
           static_cast<unsigned long long>(out), static_cast<unsigned long long>(handles));
    }
    delete set;
  });
}

void* pyrt_node_pools_get(pyrt_node_pools* set) noexcept {
  return set == nullptr ? nullptr : set->get();
}

pyrt_status pyrt_node_pools_put(pyrt_node_pools* set, void* object) noexcept {
  if (set == nullptr) return capi::set_error(PYRT_EINVAL, "set must not be NULL");
  const pyrt_status status = set->put(object);
  return status == PYRT_OK ? status : refuse(status);
}

pyrt_status pyrt_node_pools_get_bulk(pyrt_node_pools* set, void** out, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(set, "set");
    if (n == 0) return;
    capi::require_array(out, "out");
    if (!set->get_bulk(out, n)) {
      if (set->at(0).forked_away()) {
        fail(PYRT_ESTATE, "the pools are excluded from forked children");
      }
      fail(PYRT_EFULL, "the pools together cannot hand out %zu objects more; release some", n);
    }
  });
}

pyrt_status pyrt_node_pools_put_bulk(pyrt_node_pools* set, void* const* objects,
                                     size_t n) noexcept {
  return capi::guard([&] {
    capi::require(set, "set");
    if (n == 0) return;
    capi::require_array(objects, "objects");
    if (const pyrt_status status = set->put_bulk(objects, n); status != PYRT_OK) {
      refuse(status);
      throw Error(status, pyrt_last_error());
    }
  });
}

pyrt_pool* pyrt_node_pools_home(pyrt_node_pools* set) noexcept {
  return set == nullptr ? nullptr : static_cast<pyrt_pool*>(&set->home());
}

pyrt_pool* pyrt_node_pools_at(pyrt_node_pools* set, uint32_t index) noexcept {
  return set == nullptr || index >= set->size() ? nullptr
                                                : static_cast<pyrt_pool*>(&set->at(index));
}

uint64_t pyrt_node_pools_borrowed(const pyrt_node_pools* set) noexcept {
  return set == nullptr ? 0 : set->borrowed();
}

}  // extern "C"
