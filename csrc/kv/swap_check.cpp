// The invariant of the swap engine: the marks are those of its unfinished jobs.
#include <unistd.h>

#include "base/status.hpp"
#include "kv/swap.hpp"

namespace pyruntime::kv {

void SwapEngine::check() {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  for (size_t s = 0; s < spaces_.size(); ++s) {
    const SpaceState& space = spaces_[s];
    std::vector<Mark> counted(space.marks.size());
    uint64_t touches = 0;
    for (const auto& [ticket, job] : jobs_) {
      for (const Touch& touch : job->touches) {
        if (job->finished || touch.space != s + 1) continue;
        ++touches;
        for (uint32_t i = 0; i < touch.count; ++i) {
          Mark& mark = counted[touch.first + i];
          ++(touch.write ? mark.writers : mark.readers);
        }
      }
    }
    if (touches != space.touches) fail(PYRT_ECORRUPT, "space %zu miscounts its jobs", s + 1);
    for (size_t b = 0; b < counted.size(); ++b) {
      if (counted[b].readers != space.marks[b].readers ||
          counted[b].writers != space.marks[b].writers) {
        fail(PYRT_ECORRUPT, "space %zu, block %zu: the marks are not those of the jobs", s + 1, b);
      }
    }
  }
}

}  // namespace pyruntime::kv
