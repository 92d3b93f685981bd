// One pool on each NUMA node, used as one: a get is served from the memory of the node the calling
// thread runs on, an object goes back to the node it came from.
//
//   thread on node 1 --- get ---> Pool of node 1, else of the nodes after it in the list
//                    --- put ---> the Pool whose region holds the object
//
// There is nothing new underneath: each pool has its own region, depot and thread caches, so a
// thread keeps up to two magazines for every node it touches. Objects of a foreign node gather in
// such a magazine and cross to their depot a magazine at a time; no line of a depot is shared
// between nodes but by its exchanges.
//
// The owner of an address is found by asking each pool, two comparisons apiece: there are as many
// as the machine has nodes. The node of a thread is asked on every get (the system's `getcpu` in
// user space, some ten nanoseconds); a pinned thread takes home() once and spares that.
//
// All or none. put_bulk looks at every pointer, and sees that this thread has its caches, before it
// gives the first object away; so the checks that can fail later (double release) are not offered:
// pools of a set check ranges.
//
// Failure. A node that refuses memory falls back inside its pool, which counts it.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "pool/pool.hpp"

namespace pyruntime::pool {

class NodePools {
 public:
  // The node of the calling thread; one that is not of the set counts as the first.
  using NodeOf = int32_t (*)(void* user);

  // `each` for every node of `nodes`, all different and in 0..63; `node_of` may be nullptr.
  NodePools(Options each, const std::vector<int>& nodes, NodeOf node_of, void* user);

  size_t size() const { return pools_.size(); }
  Pool& at(size_t index) { return *pools_[index]; }
  Pool& home() noexcept { return *pools_[home_index()]; }
  size_t owner(const void* object) const noexcept;  // size(): none

  void* get() noexcept;
  pyrt_status put(void* object) noexcept;
  bool get_bulk(void** out, size_t n) noexcept;
  pyrt_status put_bulk(void* const* objects, size_t n) noexcept;

  // Objects that were not had from the caller's own node.
  uint64_t borrowed() const { return borrowed_.load(std::memory_order_relaxed); }

 private:
  size_t home_index() const noexcept;

  std::vector<std::unique_ptr<Pool>> pools_;
  std::array<uint8_t, 64> index_of_node_{};
  const NodeOf node_of_;
  void* const user_;
  std::atomic<uint64_t> borrowed_{0};
};

}  // namespace pyruntime::pool
