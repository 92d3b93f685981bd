// The stop flag behind pyrt_stop: raised by one thread, read at operator boundaries by another.
#pragma once

#include <atomic>

struct pyrt_stop {
  std::atomic<bool> raised{false};
};
