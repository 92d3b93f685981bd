#include "pool/budget.hpp"

#include <unistd.h>

#include <algorithm>
#include <cinttypes>

#include "base/status.hpp"

namespace pyruntime::pool {
namespace {

constexpr int kRounds = 4;  // of reclaim, while other threads take what was freed

// The client whose callback this thread is in.
thread_local constinit const BudgetClient* reclaiming = nullptr;

void require_units(uint64_t bytes) {
  if (bytes % kBudgetUnit != 0) {
    fail(PYRT_EINVAL, "bytes is %" PRIu64 "; it must be a multiple of %" PRIu64 " (2 MiB)", bytes,
         kBudgetUnit);
  }
}

}  // namespace

Budget::Budget(uint64_t limit_bytes)
    : limit_(limit_bytes / kBudgetUnit * kBudgetUnit), process_(getpid()), available_(limit_) {
  if (limit_bytes < kBudgetUnit || limit_bytes > uint64_t{1} << 62) {
    fail(PYRT_EINVAL, "limit_bytes is %" PRIu64 "; it must be in %" PRIu64 "..2^62", limit_bytes,
         kBudgetUnit);
  }
}

Budget::~Budget() = default;

void Budget::require_this_process() const {
  if (getpid() != process_) fail(PYRT_ESTATE, "the budget belongs to the parent of this process");
}

BudgetClient* Budget::add(const char* name, int32_t priority, pyrt_budget_reclaim reclaim,
                          void* user) {
  require_this_process();
  auto client = std::make_unique<BudgetClient>();
  client->budget = this;
  client->name = name;
  client->priority = priority;
  client->reclaim = reclaim;
  client->user = user;
  std::scoped_lock lock(mutex_);
  client->serial = next_serial_++;
  clients_.push_back(std::move(client));
  return clients_.back().get();
}

void Budget::remove(BudgetClient* client, bool force) {
  require_this_process();
  std::unique_lock lock(mutex_);
  if (reclaiming == client) {
    fail(PYRT_ESTATE, "%s cannot leave the budget from inside its reclaim callback",
         client->name.c_str());
  }
  if (client->reserved != 0 && !force) {
    fail(PYRT_ESTATE, "%s holds %" PRIu64 " bytes of the budget; give them back or use force",
         client->name.c_str(), client->reserved);
  }
  client->reclaim = nullptr;  // no more callbacks from now on
  returned_.wait(lock, [&] { return client->running == 0; });
  available_ += client->reserved;
  given_back_ += client->reserved;
  std::erase_if(clients_, [&](const auto& c) { return c.get() == client; });
}

bool Budget::take(BudgetClient& client, uint64_t bytes) noexcept {
  if (bytes > available_) return false;
  available_ -= bytes;
  client.reserved += bytes;
  client.peak = std::max(client.peak, client.reserved);
  ++client.reserves;
  ++reserves_;
  return true;
}

bool Budget::try_reserve(BudgetClient& client, uint64_t bytes) {
  require_units(bytes);
  require_this_process();
  std::scoped_lock lock(mutex_);
  return take(client, bytes);
}

void Budget::reserve(BudgetClient& client, uint64_t bytes) {
  require_units(bytes);
  require_this_process();
  std::unique_lock lock(mutex_);
  if (take(client, bytes)) return;
  const bool may_ask = bytes <= limit_ && reclaiming == nullptr;
  if (may_ask && reclaim(lock, client, bytes)) return;
  ++client.failures;
  ++failures_;
  fail(PYRT_EFULL,
       "%s asked for %" PRIu64 " bytes and %" PRIu64 " of the budget's %" PRIu64
       " are available; clients of its priority or below freed no more",
       client.name.c_str(), bytes, available_, limit_);
}

// Lower priorities first; among equals who holds most, then who came first.
std::vector<uint64_t> Budget::victims(const BudgetClient& client) const {
  std::vector<const BudgetClient*> found;
  for (const auto& other : clients_) {
    const bool askable = other.get() != &client && other->priority <= client.priority;
    if (askable && other->reclaim != nullptr && other->reserved != 0) found.push_back(other.get());
  }
  std::stable_sort(found.begin(), found.end(), [](const auto* a, const auto* b) {
    return a->priority != b->priority ? a->priority < b->priority : a->reserved > b->reserved;
  });
  std::vector<uint64_t> serials;
  for (const BudgetClient* other : found) serials.push_back(other->serial);
  return serials;
}

BudgetClient* Budget::find(uint64_t serial) const noexcept {
  for (const auto& client : clients_) {
    if (client->serial == serial) return client.get();
  }
  return nullptr;
}

bool Budget::reclaim(std::unique_lock<std::mutex>& lock, BudgetClient& client, uint64_t bytes) {
  ++reclaims_;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t before = given_back_;
    for (const uint64_t serial : victims(client)) {
      BudgetClient* const victim = find(serial);  // it may have left meanwhile
      if (victim == nullptr || victim->reclaim == nullptr || victim->reserved == 0) continue;
      const uint64_t wanted = bytes - available_;
      const auto callback = victim->reclaim;
      ++victim->running;
      ++victim->asked;
      victim->asked_bytes += wanted;
      lock.unlock();
      reclaiming = victim;
      const uint64_t freed = callback(victim->user, wanted);
      reclaiming = nullptr;
      lock.lock();
      victim->freed_bytes += freed;
      if (--victim->running == 0) returned_.notify_all();
      if (take(client, bytes)) return true;
    }
    if (given_back_ == before) return false;
  }
  return false;
}

void Budget::give_back(BudgetClient& client, uint64_t bytes) {
  require_units(bytes);
  require_this_process();
  std::scoped_lock lock(mutex_);
  if (bytes > client.reserved) {
    fail(PYRT_EINVAL, "bytes is %" PRIu64 "; %s holds %" PRIu64, bytes, client.name.c_str(),
         client.reserved);
  }
  client.reserved -= bytes;
  available_ += bytes;
  given_back_ += bytes;
}

size_t Budget::num_clients() const {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return clients_.size();
}

pyrt_budget_statistics Budget::statistics() const {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return {sizeof(pyrt_budget_statistics),
          static_cast<uint32_t>(clients_.size()),
          limit_,
          available_,
          reserves_,
          failures_,
          reclaims_};
}

pyrt_budget_client_statistics Budget::statistics(const BudgetClient& client) const {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return {sizeof(pyrt_budget_client_statistics),
          client.priority,
          client.reserved,
          client.peak,
          client.reserves,
          client.failures,
          client.asked,
          client.asked_bytes,
          client.freed_bytes};
}

}  // namespace pyruntime::pool
