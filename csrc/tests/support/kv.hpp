// Random programs over a block pool, and prompts to feed them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kv/batch.hpp"
#include "kv/block_pool.hpp"

namespace pyruntime::kv::test {

using Tokens = std::vector<int32_t>;

// A prompt of whole blocks, each of one repeated value, less the last `cut` tokens.
inline Tokens prompt(std::initializer_list<int> parts, uint32_t size = 4, uint32_t cut = 0) {
  Tokens tokens;
  for (const int part : parts) tokens.insert(tokens.end(), size, part);
  tokens.resize(tokens.size() - cut);
  return tokens;
}

inline Options options(uint32_t blocks, uint32_t size = 4, uint32_t window = 0) {
  Options o;
  o.block_size = size;
  o.groups = {{blocks, window}};
  o.max_seqs = 64;
  o.seed = 1;
  return o;
}

template <class Body>
void expect_status(pyrt_status status, Body body) {
  try {
    body();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), status) << error.what();
  }
}

inline uint32_t below(std::mt19937_64& random, uint64_t n) {
  return static_cast<uint32_t>(random() % n);
}

// A score function that prefers one half of the blocks, or answers nothing.
struct Scored {
  int calls = 0;
  bool silent = false;
};

inline void prefer_even_blocks(const Candidate* c, int64_t n, double* scores, void* user) {
  auto* scored = static_cast<Scored*>(user);
  ++scored->calls;
  if (scored->silent) return;
  for (int64_t i = 0; i < n; ++i) scores[i] = c[i].block % 2 == 0 ? -1.0 : 1.0;
}

// Serves a prompt whole: admitted, computed, published. Returns its cached tokens.
inline uint32_t serve(BlockPool& pool, SeqHandle& seq, const Tokens& tokens, uint32_t space = 0) {
  Admission a;
  a.space = space;
  a.tokens = tokens.data();
  a.num_tokens = a.room = static_cast<uint32_t>(tokens.size());
  StepOps ops;
  ops.admissions = {&a, 1};
  StepResult result;
  EXPECT_TRUE(pool.step(ops, result, false));
  seq = a.seq;
  pool.commit(seq, a.room, pool.options().num_layers, tokens.data(), a.room);
  pool.check();
  return a.cached;
}

// A random program: every operation, with arguments that are mostly right. One sequence's tokens
// are drawn from few values, so that prefixes are shared often.
class Program {
 public:
  Program(const Options& options, uint64_t seed) : pool(options), random_(seed) {
    spaces_ = {0, pool.open_space("b", 1)};
  }

  struct Live {
    SeqHandle seq;
    Tokens tokens;  // known
    uint32_t space;
    bool masked = false;  // tokens are not what the pool holds
  };

  void step() {
    switch (below(random_, 13)) {
      case 0:
      case 1:
      case 2:
      case 3:
        return transaction(false);
      case 4:
        return transaction(true);
      case 5:
        return commit();
      case 6:
        return fork();
      case 7:
        return release();
      case 8:
        return park_or_unpark();
      case 9:
        return pins();
      case 10:
        return mask();
      case 11:
        return rare();
      case 12:
        return batch();
    }
  }

  BlockPool pool;
  std::vector<Live> live;
  uint64_t done = 0, refused = 0, injected = 0, batched = 0;
  bool inject = false;

 private:
  Tokens tokens(uint32_t n) {
    Tokens t;
    const uint32_t size = pool.options().block_size;
    while (t.size() < n) t.insert(t.end(), size, static_cast<int32_t>(below(random_, 3)));
    t.resize(n);
    return t;
  }

  void transaction(bool dry) {
    std::vector<SeqHandle> frees;
    std::vector<Growth> trims, grows;
    std::vector<Admission> admissions(below(random_, 3));
    std::vector<Tokens> prompts;
    std::vector<size_t> freed, grown;
    std::vector<Tokens> known;
    for (size_t i = 0; i < live.size(); ++i) {
      Live& each = live[i];
      if (pool.parked(each.seq)) continue;
      const uint32_t held = pool.held(each.seq);
      const uint32_t what = below(random_, 8);
      if (what == 0) {
        frees.push_back(each.seq);
        freed.push_back(i);
        continue;
      }
      uint32_t from = held;
      if (what == 1 && held > 0 && may_trim(each.seq, from = below(random_, held + 1))) {
        trims.push_back({each.seq, from});
      } else {
        from = held;
      }
      if (what < 6) {
        grows.push_back({each.seq, from + below(random_, 2 * pool.options().block_size)});
        grown.push_back(i);
      }
    }
    for (Admission& a : admissions) {
      prompts.push_back(tokens(1 + below(random_, 8 * pool.options().block_size)));
      a.space = spaces_[below(random_, 2)];
      a.num_tokens = a.room = static_cast<uint32_t>(prompts.back().size());
      a.reserve = below(random_, 2) * 2 * a.room;
    }
    for (size_t i = 0; i < admissions.size(); ++i) admissions[i].tokens = prompts[i].data();
    StepOps ops{frees, trims, grows, admissions, below(random_, 3) == 0, below(random_, 4) == 0};
    StepResult result, foretold;
    const uint64_t before = pool.state_hash();
    const bool would = pool.step(ops, foretold, true);
    ASSERT_EQ(pool.state_hash(), before) << "a dry run changed something";
    if (dry) return;
    bool fitted = false;
    // Every internal step of the plan fails in turn, and leaves no trace, until none is left.
    for (int64_t k = inject ? 0 : -1;; ++k) {
      pool.fail_at(k);
      try {
        fitted = pool.step(ops, result, false);
        break;
      } catch (const Error& error) {
        ASSERT_EQ(error.status(), PYRT_ENOMEM);
        ASSERT_EQ(pool.state_hash(), before) << "step " << k << " failed and left something";
        ++injected;
      }
    }
    pool.fail_at(-1);
    ASSERT_EQ(fitted, would);
    if (!fitted && !ops.prefix) {
      ++refused;
      ASSERT_EQ(pool.state_hash(), before) << "a refused step changed something";
      return;
    }
    ++done;
    for (uint32_t g = 0; g < pool.num_groups(); ++g) {
      // A copied or cut block may become evictable, which the plan does not count on.
      if (!fitted) continue;
      ASSERT_GE(pool.available(g), result.left[g]);
      if (result.copies.empty() && trims.empty()) {
        ASSERT_EQ(pool.available(g), result.left[g]);
      }
    }
    for (const Growth& trim : trims) {
      for (Live& each : live) {
        if (each.seq == trim.seq && each.tokens.size() > trim.tokens)
          each.tokens.resize(trim.tokens);
      }
    }
    for (size_t i = 0; i < result.num_grown; ++i) {
      Live& each = live[grown[i]];
      while (each.tokens.size() < pool.held(each.seq)) {
        each.tokens.push_back(static_cast<int32_t>(below(random_, 2)));
      }
      if (below(random_, 3) > 0) commit_one(each);
    }
    for (size_t i = 0; i < result.num_admitted; ++i) {
      ASSERT_LT(admissions[i].cached, admissions[i].num_tokens);
      live.push_back({admissions[i].seq, prompts[i], admissions[i].space});
      if (below(random_, 4) > 0) commit_one(live.back());
    }
    for (size_t i = freed.size(); i-- > 0;) {
      live.erase(live.begin() + static_cast<ptrdiff_t>(freed[i]));
    }
  }

  // Not where a window or a mask has given up what the next token needs.
  bool may_trim(SeqHandle seq, uint32_t tokens) {
    bool windows = false, hole = false;
    for (uint32_t g = 0; g < pool.num_groups(); ++g) {
      windows |= pool.options().groups[g].window != 0;
      const uint32_t at = tokens / pool.options().block_size;
      hole |= at < pool.blocks(seq) && pool.row(g, seq)[at] < 0;
    }
    return !hole && (!windows || tokens == 0 || tokens >= pool.valid(seq));
  }

  void commit_one(Live& each) {
    if (pool.parked(each.seq)) return;
    const uint32_t held = pool.held(each.seq), valid = pool.valid(each.seq);
    const uint32_t to = below(random_, 3) == 0 ? valid + below(random_, held - valid + 1) : held;
    const bool told = !each.masked && below(random_, 8) > 0;
    const uint32_t layers = pool.options().num_layers - (below(random_, 8) == 0);
    pool.commit(each.seq, to, layers, told ? each.tokens.data() : nullptr,
                told ? static_cast<uint32_t>(each.tokens.size()) : 0);
  }

  void commit() {
    if (!live.empty()) commit_one(live[below(random_, live.size())]);
  }

  void fork() {
    if (live.empty() || live.size() > 20) return;
    const Live parent = live[below(random_, live.size())];
    if (pool.parked(parent.seq)) return;
    const SeqHandle child = pool.fork(parent.seq, below(random_, 3) == 0);
    live.push_back({child, parent.tokens, parent.space, parent.masked});
    live.back().tokens.resize(std::min<size_t>(parent.tokens.size(), pool.held(child)));
  }

  void release() {
    if (live.empty()) return;
    const size_t i = below(random_, live.size());
    pool.free({&live[i].seq, 1});
    live.erase(live.begin() + static_cast<ptrdiff_t>(i));
  }

  void park_or_unpark() {
    if (live.empty()) return;
    Live& each = live[below(random_, live.size())];
    if (!pool.parked(each.seq)) return pool.park(each.seq);
    const uint64_t before = pool.state_hash();
    for (int64_t k = inject ? 0 : -1; k < 2; ++k) {
      pool.fail_at(k);
      try {
        pool.unpark(each.seq, nullptr);
        break;
      } catch (const Error& error) {
        ASSERT_EQ(pool.state_hash(), before);
        if (error.status() == PYRT_EFULL) break;
        ++injected;
      }
    }
    pool.fail_at(-1);
  }

  // A few steps of some of the sequences, each step's failures as in a transaction.
  void batch() {
    std::vector<SeqHandle> seqs;
    std::vector<size_t> rows;
    for (size_t i = 0; i < live.size(); ++i) {
      if (pool.parked(live[i].seq) || below(random_, 3) == 0) continue;
      seqs.push_back(live[i].seq);
      rows.push_back(i);
    }
    uint32_t width = 0;
    for (const GroupOptions& group : pool.options().groups) {
      width = std::max(width, group.num_blocks);
    }
    std::vector<int32_t> tables(seqs.size() * width * pool.num_groups());
    std::vector<Batch::Arrays> arrays;
    for (uint32_t g = 0; g < pool.num_groups(); ++g) {
      arrays.push_back({tables.data() + g * seqs.size() * width, width, nullptr});
    }
    Batch batch(pool, seqs, arrays, nullptr);
    for (uint32_t steps = below(random_, 3 * pool.options().block_size); steps > 0; --steps) {
      Tokens tokens;
      for (size_t i = 0; i < seqs.size(); ++i) {
        tokens.push_back(static_cast<int32_t>(below(random_, 2)));
      }
      StepResult result;
      bool fitted = false, full = false;
      const uint64_t before = pool.state_hash();
      const Tokens table = tables;
      for (int64_t k = inject ? 0 : -1;; ++k) {
        pool.fail_at(k);
        try {
          fitted = batch.advance(tokens.data(), result);
          break;
        } catch (const Error& error) {
          ASSERT_TRUE(pool.state_hash() == before && tables == table)
              << "step " << k << " of a batch failed and left something";
          full = error.status() == PYRT_EINVAL;  // a row has as many blocks as a table can hold
          if (full) break;
          ASSERT_EQ(error.status(), PYRT_ENOMEM);
          ++injected;
        }
      }
      pool.fail_at(-1);
      if (full || !fitted) {
        ASSERT_TRUE(pool.state_hash() == before && tables == table);
        ++refused;
        return;
      }
      ++batched;
      for (uint32_t g = 0; g < pool.num_groups(); ++g) {
        ASSERT_GE(pool.available(g), result.left[g]);
        for (size_t i = 0; i < seqs.size(); ++i) {
          const int32_t* row = arrays[g].tables + i * width;
          const uint32_t last = pool.blocks(seqs[i]) - 1;
          ASSERT_EQ(row[last], pool.row(g, seqs[i])[last]);
        }
      }
      for (size_t i = 0; i < seqs.size(); ++i) {
        Live& each = live[rows[i]];
        if (each.tokens.size() + 1 == pool.held(each.seq)) each.tokens.push_back(tokens[i]);
      }
    }
  }

  void pins() {
    const uint32_t g = below(random_, pool.num_groups());
    if (!pinned_.empty() && below(random_, 2) == 0) {
      const size_t i = below(random_, pinned_.size());
      pool.unpin_blocks(pinned_[i].first, {&pinned_[i].second, 1});
      pinned_.erase(pinned_.begin() + static_cast<ptrdiff_t>(i));
      return;
    }
    if (pinned_.size() > 6) return;
    BlockId block = below(random_, pool.options().groups[g].num_blocks);
    try {
      if (below(random_, 2) == 0) {
        if (!pool.take_blocks(g, {&block, 1}, nullptr)) return;
      } else {
        pool.pin_blocks(g, {&block, 1});
      }
      pinned_.emplace_back(g, block);
    } catch (const Error&) {
    }
  }

  void mask() {
    if (live.empty()) return;
    Live& each = live[below(random_, live.size())];
    const uint32_t held = pool.held(each.seq);
    if (pool.parked(each.seq) || held == 0 || held != pool.valid(each.seq)) return;
    std::vector<uint64_t> keep(held / 64 + 1);
    const uint32_t size = pool.options().block_size;
    for (uint32_t i = 0; i < held; ++i) {
      const bool kept = i / size % 2 == 0 || below(random_, 3) == 0;
      keep[i / 64] |= uint64_t{kept} << (i % 64);
    }
    std::vector<Move> moves;
    const bool pack = below(random_, 2) == 0;
    try {
      pool.mask(each.seq, keep.data(), held, pack ? &moves : nullptr);
      each.masked = true;
      each.tokens.resize(pool.held(each.seq));
    } catch (const Error& error) {
      EXPECT_TRUE(error.status() == PYRT_EFULL || error.status() == PYRT_EUNSUPPORTED);
    }
  }

  void rare() {
    if (below(random_, 20) == 0) pool.clear();
    if (live.empty()) return;
    Live& each = live[below(random_, live.size())];
    try {
      pool.plan(each.seq, below(random_, 40), below(random_, 3));
    } catch (const Error&) {
    }
  }

  std::mt19937_64 random_;
  std::vector<uint32_t> spaces_;
  std::vector<std::pair<uint32_t, BlockId>> pinned_;
};

}  // namespace pyruntime::kv::test
