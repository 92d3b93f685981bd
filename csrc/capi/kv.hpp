// The pool behind the C handle, for the files of the C ABI that know it.
#pragma once

#include "kv/block_pool.hpp"
#include "kv/retention.hpp"
#include "pyruntime/kv.h"

struct pyrt_kv : pyruntime::kv::BlockPool {
  using BlockPool::BlockPool;
  pyruntime::kv::Pins pins{*this};
  pyruntime::kv::ToolTimes tools;
  // What the last call gave out pointers into.
  pyruntime::kv::StepResult result;
  std::vector<pyruntime::kv::Move> moves;
  std::vector<pyrt_kv_move> moves_out;
  std::vector<pyruntime::kv::Growth> scratch_growths;
  std::vector<pyruntime::kv::Admission> scratch_admissions;
};
