/* Every public header of pyruntime. */
#ifndef PYRUNTIME_H
#define PYRUNTIME_H
#include "pyruntime/abi.h"
#include "pyruntime/filter.h"
#include "pyruntime/gpu.h"
#include "pyruntime/kv.h"
#include "pyruntime/kv_tiers.h"
#include "pyruntime/moe.h"
#include "pyruntime/moe_cache.h"
#include "pyruntime/ops.h"
#include "pyruntime/pool.h"
#include "pyruntime/pool_nodes.h"
#endif
