#include "pool/nodes.hpp"

#include "base/os_memory.hpp"
#include "base/status.hpp"

namespace pyruntime::pool {

NodePools::NodePools(Options each, const std::vector<int>& nodes, NodeOf node_of, void* user)
    : node_of_(node_of), user_(user) {
  if (each.check != Check::range) {
    fail(PYRT_EUNSUPPORTED, "pools of a set check ranges only; debug with a single pool");
  }
  uint64_t seen = 0;
  for (const int node : nodes) {
    if (node < 0 || node > 63) fail(PYRT_EINVAL, "node is %d; it must be in 0..63", node);
    if ((seen >> node & 1) != 0) fail(PYRT_EINVAL, "node %d comes twice", node);
    seen |= uint64_t{1} << node;
    index_of_node_[static_cast<size_t>(node)] = static_cast<uint8_t>(pools_.size());
    each.node = node;
    pools_.push_back(std::make_unique<Pool>(each));
  }
  if (pools_.empty()) fail(PYRT_EINVAL, "there must be at least one node");
}

size_t NodePools::home_index() const noexcept {
  const int node = node_of_ != nullptr ? node_of_(user_) : base::os::current_node();
  return node >= 0 && node < 64 ? index_of_node_[static_cast<size_t>(node)] : 0;
}

size_t NodePools::owner(const void* object) const noexcept {
  size_t index = 0;
  while (index < size() && !pools_[index]->owns(object)) ++index;
  return index;
}

void* NodePools::get() noexcept {
  const size_t home = home_index();
  if (void* const object = pools_[home]->get()) [[likely]]
    return object;
  for (size_t i = 1; i < size(); ++i) {
    if (void* const object = pools_[(home + i) % size()]->get()) {
      borrowed_.fetch_add(1, std::memory_order_relaxed);
      return object;
    }
  }
  return nullptr;
}

pyrt_status NodePools::put(void* object) noexcept {
  const size_t index = owner(object);
  return index == size() ? PYRT_EINVAL : pools_[index]->put(object);
}

bool NodePools::get_bulk(void** out, size_t n) noexcept {
  const size_t home = home_index();
  if (pools_[home]->get_bulk(out, n)) return true;
  size_t have = 0;
  size_t own = 0;
  for (size_t i = 0; i < size() && have < n; ++i) {
    Pool& pool = *pools_[(home + i) % size()];
    while (have < n && (out[have] = pool.get()) != nullptr) ++have;
    if (i == 0) own = have;
  }
  if (have < n) {
    put_bulk(out, have);
    return false;
  }
  borrowed_.fetch_add(n - own, std::memory_order_relaxed);
  return true;
}

pyrt_status NodePools::put_bulk(void* const* objects, size_t n) noexcept {
  std::array<uint64_t, 64> per_pool{};
  for (size_t i = 0; i < n; ++i) {
    const size_t index = owner(objects[i]);
    if (index == size() || per_pool[index] == pools_[index]->max_capacity()) return PYRT_EINVAL;
    if (per_pool[index]++ != 0) continue;
    // Makes this thread's cache there, while nothing has been given away yet.
    if (const pyrt_status status = pools_[index]->put_bulk(objects, 0); status != PYRT_OK) {
      return status;
    }
  }
  for (size_t i = 0, end = 0; i < n; i = end) {
    Pool& pool = *pools_[owner(objects[i])];
    for (end = i + 1; end < n && pool.owns(objects[end]);) ++end;
    pool.put_bulk(objects + i, end - i);
  }
  return PYRT_OK;
}

}  // namespace pyruntime::pool
