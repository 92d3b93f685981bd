/* One pool on each NUMA node, used as one: gets are local to the calling thread, puts go back to
 * the node an object came from.
 *
 * Threads and forks as in pool.h. create and destroy must not run beside other calls on the same
 * set.
 */
#ifndef PYRUNTIME_POOL_NODES_H
#define PYRUNTIME_POOL_NODES_H

#include "pyruntime/pool.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyrt_node_pools pyrt_node_pools;

/* Tells the node that the calling thread belongs to. Called on every get, on the thread of the
 * get; must not call the set. A node that is not of the set counts as its first. */
typedef int32_t (*pyrt_node_of_thread)(void* user);

/* Writes up to `capacity` of this machine's NUMA nodes (of the first 64) and returns how many there
 * are; `out` may be NULL if `capacity` is 0. */
PYRT_API uint32_t pyrt_nodes(int32_t* out, uint32_t capacity) PYRT_NOEXCEPT;
/* The node the calling thread runs on at this moment. */
PYRT_API int32_t pyrt_current_node(void) PYRT_NOEXCEPT;

/* Creates a pool as `each` says (but for its `node`) on every node of nodes[num_nodes]: all
 * different, 0..63, in the order in which they help each other out; num_nodes 0: all of this
 * machine. A node that refuses memory falls back, which its pool's statistics count. `node_of`
 * NULL: the node the thread runs on. PYRT_EUNSUPPORTED for another check than PYRT_CHECK_RANGE:
 * several pools cannot refuse a list as one when a later object of it turns out to be released
 * twice. */
PYRT_API pyrt_status pyrt_node_pools_create(const pyrt_pool_options* each, const int32_t* nodes,
                                            uint32_t num_nodes, pyrt_node_of_thread node_of,
                                            void* user, pyrt_node_pools** out) PYRT_NOEXCEPT;
/* PYRT_ESTATE with the count while objects are out, unless `force`. */
PYRT_API pyrt_status pyrt_node_pools_destroy(pyrt_node_pools* set, int32_t force) PYRT_NOEXCEPT;

/* An object of this thread's node, else of the nodes after it; NULL when all are exhausted. */
PYRT_API void* pyrt_node_pools_get(pyrt_node_pools* set) PYRT_NOEXCEPT;
/* PYRT_EINVAL for a pointer that is no object of the set. */
PYRT_API pyrt_status pyrt_node_pools_put(pyrt_node_pools* set, void* object) PYRT_NOEXCEPT;
/* n objects, all or none (PYRT_EFULL); of one node where one has enough. */
PYRT_API pyrt_status pyrt_node_pools_get_bulk(pyrt_node_pools* set, void** out,
                                              size_t n) PYRT_NOEXCEPT;
/* All or none; the objects may come from different nodes. */
PYRT_API pyrt_status pyrt_node_pools_put_bulk(pyrt_node_pools* set, void* const* objects,
                                              size_t n) PYRT_NOEXCEPT;

/* The pool of the calling thread's node, for a thread that stays there: calls on it spare the
 * question, and its statistics are its own. Belongs to the set. NULL if `set` is. */
PYRT_API pyrt_pool* pyrt_node_pools_home(pyrt_node_pools* set) PYRT_NOEXCEPT;
/* The pool of the index-th node, NULL beyond the last. Belongs to the set. */
PYRT_API pyrt_pool* pyrt_node_pools_at(pyrt_node_pools* set, uint32_t index) PYRT_NOEXCEPT;
/* Objects so far that were not had from the caller's own node. */
PYRT_API uint64_t pyrt_node_pools_borrowed(const pyrt_node_pools* set) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
