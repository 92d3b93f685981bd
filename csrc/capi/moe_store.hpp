// What a pyrt_moe_store is, for the C ABI of those that read from one.
#pragma once

#include "moe/store.hpp"

struct pyrt_moe_store {
  explicit pyrt_moe_store(const char* path) : store(path) {}
  pyruntime::moe::Store store;
};
