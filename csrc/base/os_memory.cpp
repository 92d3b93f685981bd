#include "base/os_memory.hpp"

#include <dirent.h>
#include <linux/membarrier.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace pyruntime::base::os {

size_t page_bytes() noexcept {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void* reserve(size_t bytes, size_t alignment) noexcept {
  const size_t padded = bytes + alignment;
  if (padded < bytes) return nullptr;
  void* raw = mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t base = (start + alignment - 1) & ~(alignment - 1);
  if (base > start) munmap(raw, base - start);
  const uintptr_t end = base + bytes;
  if (start + padded > end) munmap(reinterpret_cast<void*>(end), start + padded - end);
  return reinterpret_cast<void*>(base);
}

void* map_file(int descriptor, size_t bytes) noexcept {
  void* base = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0);
  return base == MAP_FAILED ? nullptr : base;
}

void unreserve(void* base, size_t bytes) noexcept { munmap(base, bytes); }

bool commit(void* base, size_t bytes) noexcept {
  return mprotect(base, bytes, PROT_READ | PROT_WRITE) == 0;
}

bool commit_hugetlb(void* base, size_t bytes) noexcept {
  void* got = mmap(base, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_HUGETLB, -1, 0);
  if (got != MAP_FAILED) return true;
  // A failed MAP_FIXED may have unmapped the range: put the reservation back.
  mmap(base, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return false;
}

bool protect_none(void* base, size_t bytes) noexcept {
  return mprotect(base, bytes, PROT_NONE) == 0;
}

bool discard(void* base, size_t bytes) noexcept { return madvise(base, bytes, MADV_DONTNEED) == 0; }

bool advise_huge(void* base, size_t bytes, bool wanted) noexcept {
  return madvise(base, bytes, wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0;
}

int populate(void* base, size_t bytes) noexcept {
  while (madvise(base, bytes, MADV_POPULATE_WRITE) != 0) {
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  return 0;
}

int collapse(void* base, size_t bytes) noexcept {
  return madvise(base, bytes, MADV_COLLAPSE) == 0 ? 0 : errno;
}

int prefer_node(void* base, size_t bytes, int node) noexcept {
  if (node < 0 || node >= 64) return EINVAL;
  const unsigned long mask = 1UL << node;
  return syscall(SYS_mbind, base, bytes, MPOL_PREFERRED, &mask, 65UL, 0U) == 0 ? 0 : errno;
}

bool exclude_from_fork(void* base, size_t bytes) noexcept {
  return madvise(base, bytes, MADV_DONTFORK) == 0;
}

size_t huge_bytes(const void* base, size_t bytes) noexcept {
  std::FILE* smaps = std::fopen("/proc/self/smaps", "re");
  if (smaps == nullptr) return 0;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
  const uintptr_t end = begin + bytes;
  size_t total = 0;
  bool inside = false;
  char line[512];
  while (std::fgets(line, sizeof line, smaps) != nullptr) {
    uintptr_t low = 0;
    uintptr_t high = 0;
    size_t kib = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &low, &high) == 2) {
      inside = low >= begin && high <= end;
    } else if (inside && (std::sscanf(line, "AnonHugePages: %zu kB", &kib) == 1 ||
                          std::sscanf(line, "Private_Hugetlb: %zu kB", &kib) == 1)) {
      total += kib << 10;
    }
  }
  std::fclose(smaps);
  return std::min(total, bytes);
}

uint64_t nodes() noexcept {
  static const uint64_t found = [] {
    uint64_t mask = 0;
    if (DIR* const entries = opendir("/sys/devices/system/node")) {
      while (const dirent* entry = readdir(entries)) {
        unsigned id = 0;
        char rest = 0;
        if (std::sscanf(entry->d_name, "node%u%c", &id, &rest) == 1 && id < 64) {
          mask |= uint64_t{1} << id;
        }
      }
      closedir(entries);
    }
    return mask == 0 ? 1 : mask;
  }();
  return found;
}

int current_node() noexcept {
  unsigned cpu = 0;
  unsigned node = 0;
  return getcpu(&cpu, &node) == 0 ? static_cast<int>(node) : 0;
}

bool register_fence_all() noexcept {
#if defined(__SANITIZE_THREAD__)
  return false;  // TSan sees fences of ours, not the kernel's
#else
  static const bool registered =
      syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
  return registered;
#endif
}

void fence_all() noexcept { syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0); }

}  // namespace pyruntime::base::os
