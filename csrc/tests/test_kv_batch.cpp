// Prepared decode batches do what single steps do.
#include "kv/batch.hpp"
#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

struct Rows {
  std::vector<int32_t> tables, slots, lengths;
  std::vector<Batch::Arrays> arrays;
  Rows(size_t n, size_t width, uint32_t groups)
      : tables(n * width * groups), slots(n * groups), lengths(n) {
    for (uint32_t g = 0; g < groups; ++g) {
      arrays.push_back({tables.data() + g * n * width, width, slots.data() + g * n});
    }
  }
};

// The same program twice: once by batches, once by steps and commits. Tables, lengths, what is
// published and what a lookup finds must be the same, whatever happens between the steps.
void compare(const Options& o, uint64_t seed) {
  BlockPool one(o), two(o);
  std::mt19937_64 random(seed);
  struct Live {
    SeqHandle one, two;
    Tokens tokens;
  };
  std::vector<Live> live;
  const uint32_t size = o.block_size;
  for (int round = 0; round < 60; ++round) {
    while (live.size() < 6) {
      Live each;
      for (uint32_t n = 1 + below(random, 5 * size); each.tokens.size() < n;) {
        each.tokens.push_back(static_cast<int32_t>(each.tokens.size() / size % 2));
      }
      serve(one, each.one, each.tokens);
      serve(two, each.two, each.tokens);
      live.push_back(each);
    }
    if (below(random, 3) == 0) {  // one shares its open block now
      Live child = live[0];
      child.one = one.fork(live[0].one, false);
      child.two = two.fork(live[0].two, false);
      child.tokens.resize(one.held(child.one));  // the latest token is not valid yet
      live.push_back(child);
    }
    std::vector<SeqHandle> seqs;
    for (const Live& each : live) seqs.push_back(each.one);
    const size_t width = 64;
    Rows rows(live.size(), width, one.num_groups());
    Batch batch(one, seqs, rows.arrays, rows.lengths.data());
    for (uint32_t step = 0; step < 3 * size; ++step) {
      std::vector<int32_t> tokens;
      std::vector<Growth> grows;
      for (Live& each : live) {
        // What was appended before is valid now, the new token is not yet.
        two.commit(each.two, two.held(each.two), o.num_layers, each.tokens.data(),
                   static_cast<uint32_t>(each.tokens.size()));
        tokens.push_back(static_cast<int32_t>(below(random, 2)));
        each.tokens.push_back(tokens.back());
        grows.push_back({each.two, static_cast<uint32_t>(each.tokens.size())});
      }
      StepResult result, other;
      StepOps ops;
      ops.grows = grows;
      ASSERT_TRUE(batch.advance(tokens.data(), result));
      ASSERT_TRUE(two.step(ops, other, false));
      one.check();
      for (size_t i = 0; i < live.size(); ++i) {
        const auto held = static_cast<uint32_t>(live[i].tokens.size());
        ASSERT_EQ(rows.lengths[i], static_cast<int32_t>(held));
        ASSERT_EQ(one.held(live[i].one), held);
        ASSERT_EQ(one.valid(live[i].one), held - 1);
        ASSERT_EQ(one.blocks(live[i].one), two.blocks(live[i].two));
        ASSERT_EQ(one.published(live[i].one), two.published(live[i].two));
        for (uint32_t g = 0; g < one.num_groups(); ++g) {
          const int32_t* row = rows.arrays[g].tables + i * width;
          for (uint32_t at = 0; at < one.blocks(live[i].one); ++at) {
            const int32_t entry = one.row(g, live[i].one)[at];
            // Windows slide when a row opens a block, so holes may come a little later.
            ASSERT_TRUE(row[at] == entry || entry < 0) << "row " << i << " entry " << at;
          }
          ASSERT_EQ(row[one.blocks(live[i].one)], -1);
          ASSERT_EQ(rows.arrays[g].slots[i], row[(held - 1) / size] * static_cast<int32_t>(size) +
                                                 static_cast<int32_t>((held - 1) % size));
        }
      }
    }
    for (const Live& each : live) {
      EXPECT_EQ(one.match(0, each.tokens.data(), static_cast<uint32_t>(each.tokens.size()), nullptr)
                    .blocks,
                two.match(0, each.tokens.data(), static_cast<uint32_t>(each.tokens.size()), nullptr)
                    .blocks);
    }
    while (live.size() > 3) {
      const size_t i = below(random, live.size());
      one.free({&live[i].one, 1});
      two.free({&live[i].two, 1});
      live.erase(live.begin() + static_cast<ptrdiff_t>(i));
    }
  }
}

TEST(KvBatch, DoesWhatStepsDo) { compare(options(400), 1); }

TEST(KvBatch, DoesWhatStepsDoWhenNothingIsShared) {
  Options o = options(400);
  o.sharing = false;
  compare(o, 2);
}

TEST(KvBatch, DoesWhatStepsDoWithLargerBlocks) {
  Options o = options(300, 16);
  o.num_layers = 3;
  compare(o, 3);
}

TEST(KvBatch, DoesWhatStepsDoInSeveralGroups) {
  Options o = options(400);
  o.groups.push_back({400, 0});
  compare(o, 4);
}

TEST(KvBatch, WindowsSlide) {
  Options o = options(16, 4, 8);
  o.max_blocks = 64;
  BlockPool pool(o);
  const SeqHandle seq = pool.open(0);
  Rows rows(1, 64, 1);
  Batch batch(pool, {&seq, 1}, rows.arrays, rows.lengths.data());
  StepResult result;
  for (int32_t i = 0; i < 200; ++i) {
    ASSERT_TRUE(batch.advance(&i, result)) << i;
    pool.check();
    int held = 0;
    for (int at = 0; at <= i / 4; ++at) held += rows.tables[static_cast<size_t>(at)] >= 0;
    ASSERT_LE(held, 4);
    ASSERT_EQ(rows.slots[0] / 4, rows.tables[static_cast<size_t>(i / 4)]);
  }
}

TEST(KvBatch, ARefusedStepLeavesNoTrace) {
  BlockPool pool(options(4));
  std::vector<SeqHandle> seqs(2);
  for (SeqHandle& seq : seqs) seq = pool.open(0);
  Rows rows(2, 8, 1);
  Batch batch(pool, seqs, rows.arrays, rows.lengths.data());
  StepResult result;
  const int32_t tokens[] = {1, 2};
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(batch.advance(tokens, result));
  const uint64_t before = pool.state_hash();
  const auto table = rows.tables;
  EXPECT_FALSE(batch.advance(tokens, result));
  EXPECT_EQ(result.left[0], -2);
  EXPECT_EQ(pool.state_hash(), before);
  EXPECT_EQ(rows.tables, table);
  for (int64_t k = 0; k < 2; ++k) {  // and so does one in which something fails
    pool.free({seqs.data() + 1, 1});
    seqs[1] = pool.open(0);
    Batch again(pool, {seqs.data(), 1}, rows.arrays, rows.lengths.data());
    const uint64_t at_rest = pool.state_hash();
    pool.fail_at(k);
    EXPECT_THROW(again.advance(tokens, result), Error);
    pool.fail_at(-1);
    EXPECT_EQ(pool.state_hash(), at_rest);
  }
}

TEST(KvBatch, ContentWrittenASecondTimeIsNoRoom) {
  Options o = options(4);
  o.run_blocks = 1;
  BlockPool pool(o);
  SeqHandle first;
  serve(pool, first, prompt({1}));
  pool.free({&first, 1});  // its block is cached
  const SeqHandle seq = pool.open(0), other = pool.open(0);
  Batch batch(pool, {&seq, 1}, std::vector<Batch::Arrays>(1), nullptr);
  StepResult result;
  const int32_t token = 1;
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(batch.advance(&token, result));
  const Growth growth{other, 8};
  StepOps ops;
  ops.grows = {&growth, 1};
  ASSERT_TRUE(pool.step(ops, result, false));
  ASSERT_EQ(pool.available(0), 1u);
  const uint64_t before = pool.state_hash();
  // The block that is full is what is cached: held with it, nothing is left to evict.
  EXPECT_FALSE(batch.advance(&token, result));
  EXPECT_EQ(result.left[0], -1);
  EXPECT_EQ(pool.state_hash(), before);
  pool.free({&other, 1});
  EXPECT_TRUE(batch.advance(&token, result));
  pool.check();
}

TEST(KvBatch, EndsWithItsSequences) {
  BlockPool pool(options(16));
  std::vector<SeqHandle> seqs{pool.open(0), pool.open(0)};
  Rows rows(2, 2, 1);
  Batch batch(pool, seqs, rows.arrays, nullptr);
  StepResult result;
  const int32_t tokens[] = {1, 2};
  EXPECT_TRUE(batch.advance(tokens, result));
  pool.free({seqs.data(), 1});
  seqs[0] = pool.open(0);  // the same slot, another sequence
  const uint64_t before = pool.state_hash();
  EXPECT_THROW(batch.advance(tokens, result), Error);
  EXPECT_EQ(pool.state_hash(), before);
  EXPECT_THROW(Batch(pool, std::vector<SeqHandle>{seqs[1], seqs[1]}, rows.arrays, nullptr), Error);
  // A row that outgrows its table.
  Batch narrow(pool, {seqs.data() + 1, 1}, rows.arrays, nullptr);
  for (int i = 0; i < 7; ++i) EXPECT_TRUE(narrow.advance(tokens, result));
  EXPECT_THROW(narrow.advance(tokens, result), Error);
  pool.check();
}

}  // namespace
