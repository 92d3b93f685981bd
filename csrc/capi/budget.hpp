// What a pyrt_budget is, for the C ABI of those that draw on one.
#pragma once

#include "pool/budget.hpp"

struct pyrt_budget : pyruntime::pool::Budget {
  using Budget::Budget;
};
