// What the entries of pool.h and pool_nodes.h share.
#pragma once

#include "pool/pool.hpp"

struct pyrt_pool : pyruntime::pool::Pool {
  using Pool::Pool;
};

namespace pyruntime::capi {

// Checks and converts; fields beyond the caller's struct_size keep their defaults.
pool::Options pool_options(const pyrt_pool_options& given);

}  // namespace pyruntime::capi
