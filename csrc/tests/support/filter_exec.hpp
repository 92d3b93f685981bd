// Execution spaces of filter/core.hpp for tests.
#pragma once

#include <functional>
#include <utility>

#include "filter/core.hpp"

namespace pyruntime::filter {

// One thread at a time.
struct Exclusive {
  static constexpr bool kConcurrent = false;
  static uint64_t load(const uint64_t* word) { return *word; }
  static bool cas(uint64_t* word, uint64_t&, uint64_t desired) {
    *word = desired;
    return true;
  }
  static uint32_t epoch(const uint32_t* epoch) { return *epoch; }
  static void bump(uint32_t*) {}
  static void settle() {}
  static void at(Step) {}
  static void count(const View& view, Counter which, uint64_t n) { view.counters[which] += n; }
  static void at_least(const View& view, Counter which, uint64_t n) {
    if (view.counters[which] < n) view.counters[which] = n;
  }
};

// Another operation runs at one of the places where a mover can be interrupted.
struct Hooked : Exclusive {
  static constexpr bool kConcurrent = true;
  static inline std::function<void(Step)> hook;
  static uint32_t epoch(const uint32_t* epoch) { return *epoch; }
  static void bump(uint32_t* epoch) { ++*epoch; }
  static bool cas(uint64_t* word, uint64_t& expected, uint64_t desired) {
    if (*word != expected) {
      expected = *word;
      return false;
    }
    *word = desired;
    return true;
  }
  static void at(Step step) {
    if (!hook) return;
    const auto once = std::move(hook);
    hook = nullptr;
    once(step);
    if (!hook) hook = once;
  }
};

}  // namespace pyruntime::filter
