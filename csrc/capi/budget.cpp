#include "capi/budget.hpp"

#include <algorithm>
#include <cstring>

#include "capi/error.hpp"
#include "pyruntime/pool.h"

using namespace pyruntime;
using pool::BudgetClient;

namespace {

// The handle C callers see is the ledger itself.
BudgetClient* of(pyrt_budget_client* client) { return reinterpret_cast<BudgetClient*>(client); }
const BudgetClient* of(const pyrt_budget_client* client) {
  return reinterpret_cast<const BudgetClient*>(client);
}

template <class Struct>
void copy_out(Struct full, Struct* out) {
  full.struct_size = out->struct_size;
  std::memcpy(out, &full, std::min<size_t>(full.struct_size, sizeof full));
}

}  // namespace

extern "C" {

pyrt_status pyrt_budget_create(uint64_t limit_bytes, pyrt_budget** out) noexcept {
  return capi::guard([&] {
    capi::require(out, "out");
    *out = new pyrt_budget(limit_bytes);
  });
}

pyrt_status pyrt_budget_destroy(pyrt_budget* budget) noexcept {
  if (budget == nullptr) return PYRT_OK;
  return capi::guard([&] {
    if (const size_t clients = budget->num_clients()) {
      fail(PYRT_ESTATE, "the budget has %zu clients; they must leave it first", clients);
    }
    delete budget;
  });
}

pyrt_status pyrt_budget_register(pyrt_budget* budget, const char* name, int32_t priority,
                                 pyrt_budget_reclaim reclaim, void* user,
                                 pyrt_budget_client** out) noexcept {
  return capi::guard([&] {
    capi::require(budget, "budget");
    capi::require(name, "name");
    capi::require(out, "out");
    *out = reinterpret_cast<pyrt_budget_client*>(budget->add(name, priority, reclaim, user));
  });
}

pyrt_status pyrt_budget_unregister(pyrt_budget_client* client, int32_t force) noexcept {
  if (client == nullptr) return PYRT_OK;
  return capi::guard([&] { of(client)->budget->remove(of(client), force != 0); });
}

pyrt_status pyrt_budget_reserve(pyrt_budget_client* client, uint64_t bytes) noexcept {
  return capi::guard([&] {
    capi::require(client, "client");
    of(client)->budget->reserve(*of(client), bytes);
  });
}

pyrt_status pyrt_budget_give_back(pyrt_budget_client* client, uint64_t bytes) noexcept {
  return capi::guard([&] {
    capi::require(client, "client");
    of(client)->budget->give_back(*of(client), bytes);
  });
}

pyrt_status pyrt_budget_get_statistics(const pyrt_budget* budget,
                                       pyrt_budget_statistics* statistics) noexcept {
  return capi::guard([&] {
    capi::require(budget, "budget");
    capi::require(statistics, "statistics");
    copy_out(budget->statistics(), statistics);
  });
}

pyrt_status pyrt_budget_client_get_statistics(const pyrt_budget_client* client,
                                              pyrt_budget_client_statistics* statistics) noexcept {
  return capi::guard([&] {
    capi::require(client, "client");
    capi::require(statistics, "statistics");
    copy_out(of(client)->budget->statistics(*of(client)), statistics);
  });
}

}  // extern "C"
