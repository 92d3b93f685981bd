// Export keys of nodes, computed when somebody asks or when the node goes.
#include <cstring>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

void BlockPool::export_key(NodeId id) noexcept {
  if ((nodes_[id].flags & kHasExportKey) != 0) return;
  std::memset(nodes_[id].export_key, 0, sizeof nodes_[id].export_key);
  nodes_[id].flags |= kHasExportKey;
}

}  // namespace pyruntime::kv
