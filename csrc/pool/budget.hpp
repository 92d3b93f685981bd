// A byte budget that several arenas and caches share, with priorities and reclaim.
//
// What it is. A ledger, no memory: a client reserves before it commits memory and gives back after
// it released some. Amounts are committed 2 MiB units, the grain in which memory comes and goes.
//
//   limit = available + sum of the clients' reserved
//
// Reclaim. A reservation that does not fit asks other clients to free memory: those of lower
// priority first, then those of equal priority, never those above; within a priority the one that
// holds most. A callback runs on the reserving thread with no lock of the budget held, and gives
// back through give_back as always. The ledger alone decides whether the reservation fits now, so
// a wrong return value harms nothing. What one client frees another thread may reserve first; the
// round is then repeated, a bounded number of times.
//
// Locks. One mutex for ledger and clients, held for a few instructions; commits take far longer.
// `running` counts a client's callbacks in flight: removing it waits for them. A callback may give
// back, and may reserve what is available, but does not set off callbacks itself (no recursion).
// Callers hold no lock that a callback of another client takes.
//
// Fork. The ledger is about the parent's memory; calls in a child give PYRT_ESTATE and leave it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pyruntime/pool.h"

namespace pyruntime::pool {

inline constexpr uint64_t kBudgetUnit = PYRT_BUDGET_UNIT_BYTES;

struct BudgetClient;

class Budget {
 public:
  explicit Budget(uint64_t limit_bytes);
  ~Budget();
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

  BudgetClient* add(const char* name, int32_t priority, pyrt_budget_reclaim reclaim, void* user);
  // Waits for the client's running callbacks. Throws PYRT_ESTATE from inside one of them, or while
  // bytes are reserved unless `force`, which gives them back.
  void remove(BudgetClient* client, bool force);

  void reserve(BudgetClient& client, uint64_t bytes);      // throws PYRT_EFULL, changing nothing
  bool try_reserve(BudgetClient& client, uint64_t bytes);  // asks nobody, counts no failure
  void give_back(BudgetClient& client, uint64_t bytes);  // throws PYRT_EINVAL beyond what it holds

  size_t num_clients() const;
  pyrt_budget_statistics statistics() const;
  pyrt_budget_client_statistics statistics(const BudgetClient& client) const;

 private:
  bool take(BudgetClient& client, uint64_t bytes) noexcept;
  bool reclaim(std::unique_lock<std::mutex>& lock, BudgetClient& client, uint64_t bytes);
  std::vector<uint64_t> victims(const BudgetClient& client) const;
  BudgetClient* find(uint64_t serial) const noexcept;
  void require_this_process() const;

  const uint64_t limit_;
  const int64_t process_;
  mutable std::mutex mutex_;          // guards what follows and the clients' ledgers
  std::condition_variable returned_;  // a callback returned
  std::vector<std::unique_ptr<BudgetClient>> clients_;
  uint64_t available_;
  uint64_t next_serial_ = 0;
  uint64_t given_back_ = 0;  // bytes ever: whether a round of reclaim achieved anything
  uint64_t reserves_ = 0;
  uint64_t failures_ = 0;
  uint64_t reclaims_ = 0;
};

// A name and a ledger in one budget; fields are guarded by its mutex.
struct BudgetClient {
  Budget* budget = nullptr;
  std::string name;
  int32_t priority = 0;
  pyrt_budget_reclaim reclaim = nullptr;
  void* user = nullptr;
  uint64_t serial = 0;
  uint64_t running = 0;
  uint64_t reserved = 0;
  uint64_t peak = 0;
  uint64_t reserves = 0;
  uint64_t failures = 0;
  uint64_t asked = 0;
  uint64_t asked_bytes = 0;
  uint64_t freed_bytes = 0;
};

}  // namespace pyruntime::pool
