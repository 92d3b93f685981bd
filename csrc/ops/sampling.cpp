#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "base/thread_pool.hpp"
#include "ops/kernels.hpp"
#include "ops/ops.hpp"

namespace pyruntime::ops {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Scratch of one thread, kept between calls so that sampling does not allocate per step.
struct Scratch {
  std::vector<int32_t> order;
  std::vector<float> weights;
  std::vector<float> raw;
  std::vector<int32_t> counts;  // zero between rows
};

void penalise(const SampleBatch& b, int64_t row, float* x, Scratch& scratch) {
  const pyrt_ops_sampling& s = b.sampling[row];
  if (b.token_offsets == nullptr) return;
  const bool repetition = s.repetition_penalty != 0.0f && s.repetition_penalty != 1.0f;
  if (!repetition && s.presence_penalty == 0.0f && s.frequency_penalty == 0.0f) return;
  const int32_t* tokens = b.token_ids + b.token_offsets[row];
  const int64_t count = b.token_offsets[row + 1] - b.token_offsets[row];
  const int64_t prompt = b.num_prompt[row];
  // counts: occurrences in the output, plus kSeen once a token was repetition-penalised.
  constexpr int32_t kSeen = 1 << 30;
  std::vector<int32_t>& counts = scratch.counts;
  counts.resize(std::max(counts.size(), static_cast<size_t>(b.vocab)));
  if (repetition) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t& mark = counts[static_cast<size_t>(tokens[i])];
      if (mark != 0) continue;
      mark = kSeen;
      float& value = x[tokens[i]];
      value = value > 0.0f ? value / s.repetition_penalty : value * s.repetition_penalty;
    }
    for (int64_t i = 0; i < count; ++i) counts[static_cast<size_t>(tokens[i])] = 0;
  }
  for (int64_t i = prompt; i < count; ++i) ++counts[static_cast<size_t>(tokens[i])];
  for (int64_t i = prompt; i < count; ++i) {
    int32_t& times = counts[static_cast<size_t>(tokens[i])];
    if (times == 0) continue;
    x[tokens[i]] -= s.presence_penalty + s.frequency_penalty * static_cast<float>(times);
    times = 0;
  }
}

// The position of the first of the largest values.
int64_t argmax(const float* x, int64_t count) { return std::max_element(x, x + count) - x; }

int32_t draw(const SampleBatch& b, int64_t row, float* x, const Kernels& kernel, Scratch& scratch) {
  const pyrt_ops_sampling& s = b.sampling[row];
  const auto vocab = b.vocab;
  const float top = kernel.max_of(x, vocab);
  if (s.temperature == 0.0f) return static_cast<int32_t>(argmax(x, vocab));
  const float inverse = 1.0f / s.temperature;
  // Candidates: all that are not ruled out; those that min_p would drop never need sorting.
  const float floor = s.min_p > 0.0f ? top + s.temperature * std::log(s.min_p) : kNone;
  std::vector<int32_t>& order = scratch.order;
  order.clear();
  for (int64_t i = 0; i < vocab; ++i) {
    if (x[i] != kNone) order.push_back(static_cast<int32_t>(i));
  }
  const auto before = [x](int32_t a, int32_t c) { return x[a] != x[c] ? x[a] > x[c] : a < c; };
  auto kept = static_cast<int64_t>(order.size());
  const bool nucleus = s.top_p > 0.0f && s.top_p < 1.0f;
  if (s.top_k > 0 && s.top_k < kept) {
    kept = s.top_k;
    std::nth_element(order.begin(), order.begin() + kept - 1, order.end(), before);
    order.resize(static_cast<size_t>(kept));
  }
  const auto weigh = [&] {
    scratch.weights.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) scratch.weights[i] = x[order[i]];
    kernel.exp_scaled(scratch.weights.data(), static_cast<int64_t>(order.size()), top, inverse);
    double total = 0.0;
    for (const float w : scratch.weights) total += static_cast<double>(w);
    return total;
  };
  if (nucleus) {
    const double total = weigh();
    // Sort no more than the nucleus can need: grow the sorted head until it holds top_p.
    double covered = 0.0;
    int64_t sorted = 0;
    int64_t cut = kept;
    for (int64_t want = std::min<int64_t>(kept, 64); cut == kept && sorted < kept;
         want = std::min(kept, want * 4)) {
      std::partial_sort(order.begin() + sorted, order.begin() + want, order.end(), before);
      for (; sorted < want; ++sorted) {
        float w = x[order[static_cast<size_t>(sorted)]];
        kernel.exp_scaled(&w, 1, top, inverse);
        covered += static_cast<double>(w);
        if (covered >= static_cast<double>(s.top_p) * total) {
          cut = sorted + 1;
          ++sorted;
          break;
        }
      }
      if (want == kept) break;
    }
    order.resize(static_cast<size_t>(cut));
  }
  if (s.min_p > 0.0f) {
    const auto small = [x, floor](int32_t i) { return x[i] < floor; };
    order.erase(std::remove_if(order.begin(), order.end(), small), order.end());
  }
  if (s.top_k > 0 || nucleus) std::sort(order.begin(), order.end());
  const double target = weigh() * uniform(s.seed, static_cast<uint64_t>(s.position));
  double passed = 0.0;
  for (size_t i = 0; i < order.size(); ++i) {
    passed += static_cast<double>(scratch.weights[i]);
    if (passed > target) return order[i];
  }
  return order.back();
}

void sample_row(const SampleBatch& b, int64_t row, const Kernels& kernel, Scratch& scratch) {
  const pyrt_ops_sampling& s = b.sampling[row];
  float* x = b.logits + row * b.vocab;
  b.logprobs[row] = std::numeric_limits<float>::quiet_NaN();
  b.tokens[row] = -1;
  b.status[row] = PYRT_SAMPLE_NOT_FINITE;
  const auto usable = [](float v) { return v < std::numeric_limits<float>::infinity(); };
  if (!std::all_of(x, x + b.vocab, usable)) return;  // NaN or +inf
  const float top = kernel.max_of(x, b.vocab);
  if (top == kNone) return;
  float base = 0.0f;
  if (s.num_logprobs >= 0) {
    base = top + static_cast<float>(std::log(kernel.sum_exp(x, b.vocab, top)));
    if (s.num_logprobs > 0) {
      std::vector<int32_t>& order = scratch.order;
      order.resize(static_cast<size_t>(b.vocab));
      std::iota(order.begin(), order.end(), 0);
      const int64_t wanted = std::min<int64_t>(s.num_logprobs, b.vocab);
      std::partial_sort(order.begin(), order.begin() + wanted, order.end(),
                        [x](int32_t a, int32_t c) { return x[a] != x[c] ? x[a] > x[c] : a < c; });
      for (int64_t i = 0; i < s.num_logprobs; ++i) {
        const bool there = i < wanted;
        b.top_ids[row * PYRT_MAX_LOGPROBS + i] = there ? order[static_cast<size_t>(i)] : -1;
        b.top_logprobs[row * PYRT_MAX_LOGPROBS + i] =
            there ? x[order[static_cast<size_t>(i)]] - base : kNone;
      }
    }
  }
  const int64_t first = b.bias_offsets == nullptr ? 0 : b.bias_offsets[row];
  const int64_t last = b.bias_offsets == nullptr ? 0 : b.bias_offsets[row + 1];
  const bool changes = s.num_logprobs >= 0 && (last > first || b.token_offsets != nullptr);
  if (changes) scratch.raw.assign(x, x + b.vocab);
  for (int64_t i = first; i < last; ++i) x[b.bias_ids[i]] += b.bias_values[i];
  penalise(b, row, x, scratch);
  if (kernel.max_of(x, b.vocab) == kNone) return;
  const int32_t token = draw(b, row, x, kernel, scratch);
  b.tokens[row] = token;
  b.status[row] = PYRT_SAMPLE_OK;
  if (s.num_logprobs >= 0) {
    b.logprobs[row] = (changes ? scratch.raw[static_cast<size_t>(token)] : x[token]) - base;
  }
}

}  // namespace

double uniform(uint64_t seed, uint64_t position) noexcept {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32u);
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32u), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(b >> 32u) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32u) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint64_t bits = (uint64_t{c[1]} << 32u | c[0]) >> 11u;
  return static_cast<double>(bits) * 0x1p-53;
}

void sample(const SampleBatch& b) {
  const Kernels& kernel = kernels();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, b.vocab));
  std::atomic<bool> no_memory{false};
  base::ThreadPool::process().parallel_for(b.n, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    try {
      for (int64_t row = begin; row < end; ++row) sample_row(b, row, kernel, scratch);
    } catch (const std::bad_alloc&) {
      no_memory.store(true, std::memory_order_relaxed);
    }
  });
  if (no_memory.load()) throw std::bad_alloc();
}

}  // namespace pyruntime::ops
