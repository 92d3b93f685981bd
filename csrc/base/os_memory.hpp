// The only place that talks to the operating system about memory.
//
// Every function says what it found rather than what was asked for; a refused wish (huge pages, a
// NUMA node) is a return value, never an exception: callers go on with what they got and report it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyruntime::base::os {

inline constexpr size_t kHugePageBytes = size_t{2} << 20;

size_t page_bytes() noexcept;

// Reserves `bytes` of address space, inaccessible, starting at a multiple of `alignment` (a power
// of two, at least a page). Returns nullptr when the system refuses.
void* reserve(size_t bytes, size_t alignment) noexcept;
void unreserve(void* base, size_t bytes) noexcept;

// Makes [base, base + bytes) of a reservation readable and writable, zero-filled on first touch.
bool commit(void* base, size_t bytes) noexcept;

// As commit, from the reserved hugetlb pages of the system; false when there are not enough.
bool commit_hugetlb(void* base, size_t bytes) noexcept;

// Takes all access away again (guard pages, objects at rest in guard mode).
bool protect_none(void* base, size_t bytes) noexcept;

// Gives the memory back; the range stays committed and reads as zeroes.
bool discard(void* base, size_t bytes) noexcept;

bool advise_huge(void* base, size_t bytes, bool wanted) noexcept;

// Faults every page in for writing: 0, or the errno that stopped it. Never raises SIGBUS.
int populate(void* base, size_t bytes) noexcept;

// Asks for [base, base + bytes) to be moved into huge pages now (kernel >= 6.1): 0 or errno.
int collapse(void* base, size_t bytes) noexcept;

// Prefers `node` for pages faulted in later: 0 or errno.
int prefer_node(void* base, size_t bytes, int node) noexcept;

bool exclude_from_fork(void* base, size_t bytes) noexcept;

// Bytes of [base, base + bytes) that are huge pages now, read from this process's smaps.
size_t huge_bytes(const void* base, size_t bytes) noexcept;

// Maps the file of a descriptor read-only, shared with everybody who maps it; nullptr when the
// system refuses. `unreserve` ends it, the descriptor may be closed before.
void* map_file(int descriptor, size_t bytes) noexcept;

// The machine's NUMA nodes as bits, of the first 64; node 0 where the system tells of none.
uint64_t nodes() noexcept;
// The node the calling thread runs on; a system call is not needed.
int current_node() noexcept;

// Orders every running thread of the process as if each had executed a full fence. False when the
// kernel has no membarrier: the callers of the asymmetric lock then fence themselves.
bool register_fence_all() noexcept;
void fence_all() noexcept;

}  // namespace pyruntime::base::os
