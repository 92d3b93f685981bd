// The block pool: sharing, eviction, runs, forks, transactions, and random programs of everything.
#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

std::vector<int32_t> row(const BlockPool& pool, SeqHandle seq, uint32_t group = 0) {
  return {pool.row(group, seq), pool.row(group, seq) + pool.blocks(seq)};
}

void free_one(BlockPool& pool, SeqHandle seq) { pool.free({&seq, 1}); }

TEST(Kv, PrefixesAreSharedWithinANamespaceOnly) {
  BlockPool pool(options(16));
  SeqHandle a, b, c, d;
  EXPECT_EQ(serve(pool, a, prompt({1, 2, 3})), 0u);
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 9})), 8u);
  EXPECT_EQ(serve(pool, c, prompt({1, 2, 3})), 8u);  // the last token is never cached
  const uint32_t other = pool.open_space("other", 5);
  EXPECT_EQ(pool.open_space("other", 5), other);
  EXPECT_EQ(serve(pool, d, prompt({1, 2}), other), 0u);
  EXPECT_EQ(row(pool, a)[0], row(pool, b)[0]);
  EXPECT_EQ(row(pool, a)[1], row(pool, b)[1]);
  EXPECT_NE(row(pool, a)[2], row(pool, b)[2]);
  EXPECT_NE(row(pool, a)[2], row(pool, c)[2]);  // a second copy of content stays private
  for (const SeqHandle seq : {a, b, c, d}) free_one(pool, seq);
  pool.check();
  EXPECT_EQ(pool.available(0), 16u);
  EXPECT_EQ(serve(pool, a, prompt({1, 2, 3, 4})), 12u);
}

TEST(Kv, TheLeastRecentlyUsedEndGoesFirst) {
  BlockPool pool(options(4));
  SeqHandle a, b, c, d;
  serve(pool, a, prompt({1, 2}));
  free_one(pool, a);
  serve(pool, b, prompt({3}));
  free_one(pool, b);
  serve(pool, c, prompt({5, 6}));  // one free block, so one eviction: the end of 1-2
  free_one(pool, c);
  EXPECT_EQ(serve(pool, d, prompt({1, 2})), 4u);
}

TEST(Kv, CollidingKeysSeparateContentByComparison) {
  BlockPool pool(options(64));
  pool.collide_for_test();
  SeqHandle seq;
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(serve(pool, seq, prompt({i, i + 1, 7})), 0u);
    free_one(pool, seq);
  }
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(serve(pool, seq, prompt({i, i + 1, 7, 8})), 12u);
    free_one(pool, seq);
  }
}

TEST(Kv, AForkCopiesOnWrite) {
  BlockPool pool(options(16));
  SeqHandle a;
  const Tokens tokens = prompt({1, 2, 3}, 4, 2);  // ten tokens
  serve(pool, a, tokens);
  const SeqHandle b = pool.fork(a, false);
  pool.check();
  EXPECT_EQ(row(pool, a), row(pool, b));
  const Growth grows[] = {{b, 11}, {a, 11}};
  StepOps ops;
  ops.grows = grows;
  StepResult result;
  ASSERT_TRUE(pool.step(ops, result, false));
  pool.check();
  ASSERT_EQ(result.copies.size(), 1u);  // who writes last needs no copy
  EXPECT_EQ(static_cast<int32_t>(result.copies[0].from), row(pool, a)[2]);
  EXPECT_EQ(static_cast<int32_t>(result.copies[0].to), row(pool, b)[2]);
  EXPECT_EQ(row(pool, a)[1], row(pool, b)[1]);
  const SeqHandle pin = pool.fork(a, true);
  EXPECT_EQ(pool.held(pin), 8u);
  const SeqHandle all[] = {a, b};
  pool.free(all);
  EXPECT_EQ(pool.available(0), 14u);  // the pin keeps two blocks
  free_one(pool, pin);
  pool.check();
  EXPECT_EQ(pool.available(0), 16u);
}

TEST(Kv, ATrimmedPublishedBlockIsCopiedBeforeItIsWritten) {
  BlockPool pool(options(16));
  SeqHandle a;
  Tokens tokens = prompt({1, 2, 3});
  serve(pool, a, tokens);
  pool.trim(a, 6);
  pool.check();
  const Growth grow{a, 9};
  StepOps ops;
  ops.grows = {&grow, 1};
  StepResult result;
  ASSERT_TRUE(pool.step(ops, result, false));
  ASSERT_EQ(result.copies.size(), 1u);
  tokens = {1, 1, 1, 1, 2, 2, 8, 8, 8};
  pool.commit(a, 9, 1, tokens.data(), 9);
  pool.check();
  SeqHandle b, c;
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 3, 4})), 12u);  // the cut content is still there
  tokens.resize(12, 5);
  EXPECT_EQ(serve(pool, c, tokens), 8u);
}

TEST(Kv, TrimAndGrowInOneStep) {
  BlockPool pool(options(16));
  SeqHandle a;
  serve(pool, a, prompt({1, 2, 3}));
  const Growth trim{a, 5}, grow{a, 6};
  StepOps ops;
  ops.trims = {&trim, 1};
  ops.grows = {&grow, 1};
  StepResult foretold, result;
  ASSERT_TRUE(pool.step(ops, foretold, true));
  ASSERT_TRUE(pool.step(ops, result, false));
  pool.check();
  EXPECT_EQ(result.copies.size(), 1u);
  EXPECT_EQ(pool.held(a), 6u);
}

TEST(Kv, WindowsReleaseAndHitWhatTheNextQuerySees) {
  BlockPool pool(options(32, 4, 8));
  SeqHandle a, b;
  serve(pool, a, prompt({1, 2, 3, 4, 5, 6}));
  // The next query, at 24, sees 17..24: blocks 0..3 are behind.
  EXPECT_EQ(row(pool, a)[3], -1);
  EXPECT_GE(row(pool, a)[4], 0);
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 3, 4, 5, 9})), 20u);
  EXPECT_EQ(row(pool, b)[1], -1);
  EXPECT_EQ(row(pool, a)[4], row(pool, b)[4]);
}

TEST(Kv, SeveralGroupsHitWhatAllCanServe) {
  Options o = options(32);
  o.groups = {{32, 0}, {8, 8}};
  BlockPool pool(o);
  SeqHandle a, b, c;
  serve(pool, a, prompt({1, 2, 3, 4}));
  free_one(pool, a);
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 3, 7})), 12u);
  free_one(pool, b);
  // Fill the window's eight blocks with something else: nothing to hit, though the full group has
  // everything.
  serve(pool, c, prompt({8, 8, 8, 8, 8, 8, 8, 8}));
  free_one(pool, c);
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 3, 7})), 0u);
}

TEST(Kv, RefusedStepsLeaveNoTrace) {
  BlockPool pool(options(8));
  SeqHandle a, b;
  serve(pool, a, prompt({1, 2, 3}));
  serve(pool, b, prompt({4, 5, 6}));
  const uint64_t before = pool.state_hash();
  Growth grows[] = {{a, 16}, {b, 24}};
  StepOps ops;
  ops.grows = grows;
  StepResult result;
  EXPECT_FALSE(pool.step(ops, result, false));
  EXPECT_EQ(result.left[0], -2);
  EXPECT_FALSE(result.never_fits);
  EXPECT_EQ(pool.state_hash(), before);
  ops.prefix = true;
  EXPECT_FALSE(pool.step(ops, result, false));
  EXPECT_EQ(result.num_grown, 1u);
  EXPECT_EQ(pool.held(a), 16u);
  EXPECT_EQ(pool.held(b), 12u);
  grows[1].tokens = 400;
  EXPECT_FALSE(pool.step(ops, result, true));
  EXPECT_TRUE(result.never_fits);
  // What a step frees is there for what it grows.
  ops.prefix = false;
  ops.frees = {&a, 1};
  ops.grows = {grows + 1, 1};
  grows[1].tokens = 32;
  EXPECT_TRUE(pool.step(ops, result, false));
  pool.check();
}

TEST(Kv, PromisesHoldAdmissionsBack) {
  BlockPool pool(options(8));
  const Tokens tokens = prompt({1, 2});
  Admission two[2];
  for (Admission& a : two) {
    a.tokens = tokens.data();
    a.num_tokens = a.room = 8;
    a.reserve = 20;
  }
  StepOps ops;
  ops.admissions = two;
  ops.keep_promises = ops.prefix = true;
  StepResult result;
  EXPECT_FALSE(pool.step(ops, result, false));
  EXPECT_EQ(result.num_admitted, 1u);  // 5 of 8 blocks are promised
  EXPECT_EQ(pool.promised(), 3u);
  free_one(pool, two[0].seq);
  EXPECT_EQ(pool.promised(), 0u);
  pool.check();
}

TEST(Kv, SequencesGrowInPlace) {
  Options o = options(1024);
  o.run_blocks = 16;
  BlockPool pool(o);
  std::vector<SeqHandle> seqs(8);
  std::vector<Growth> grows;
  for (SeqHandle& seq : seqs) seq = pool.open(0);
  for (uint32_t tokens = 1; tokens <= 32 * 4; ++tokens) {
    grows.clear();
    for (const SeqHandle seq : seqs) grows.push_back({seq, tokens});
    StepOps ops;
    ops.grows = grows;
    StepResult result;
    ASSERT_TRUE(pool.step(ops, result, false));
    pool.check();
  }
  for (const SeqHandle seq : seqs) {
    int runs = 1;
    for (uint32_t i = 1; i < 32; ++i) runs += row(pool, seq)[i] != row(pool, seq)[i - 1] + 1;
    EXPECT_LE(runs, 2);
  }
}

TEST(Kv, PlannedContentStaysUntilItsLastUseAndThenGoesFirst) {
  BlockPool pool(options(6));
  SeqHandle a, b, c;
  serve(pool, c, prompt({11}));
  free_one(pool, c);
  serve(pool, a, prompt({1, 2}));
  pool.plan(a, 8, 1);
  free_one(pool, a);
  pool.check();
  EXPECT_EQ(pool.available(0), 4u);  // held for one more
  EXPECT_EQ(serve(pool, b, prompt({1, 2, 3}, 4, 3)), 8u);
  free_one(pool, b);
  pool.check();
  EXPECT_EQ(pool.available(0), 6u);
  // What was used before goes later: the plan of 1 and 2 is over.
  const NodeId first = [&] {
    NodeId id;
    EXPECT_EQ(pool.oldest(0, {&id, 1}), 1u);
    return id;
  }();
  EXPECT_EQ(pool.tokens(first)[0], 2);
  serve(pool, c, prompt({7, 8, 9, 10}));
  EXPECT_EQ(pool.match(0, prompt({1, 2, 3, 0}).data(), 16, nullptr).blocks, 1u);
  free_one(pool, c);
  serve(pool, a, prompt({1, 2}));
  pool.plan(a, 8, 5);
  pool.plan(a, 0, 0);
  free_one(pool, a);
  EXPECT_EQ(pool.available(0), 6u);
}

TEST(Kv, MaskedTokensFreeBlocksOrMoveTogether) {
  BlockPool pool(options(32));
  SeqHandle a, b;
  serve(pool, a, prompt({1, 2, 3, 4, 5}, 4, 1));
  serve(pool, b, prompt({6, 7, 8, 9, 10}, 4, 1));
  const uint64_t keep = ~(uint64_t{0xf} << 4 | uint64_t{3} << 10);  // block 1 goes, half of block 2
  EXPECT_EQ(pool.mask(a, &keep, 19, nullptr), 19u);
  pool.check();
  EXPECT_EQ(row(pool, a)[1], -1);
  EXPECT_GE(row(pool, a)[2], 0);
  std::vector<Move> moves;
  const auto before = row(pool, b);
  EXPECT_EQ(pool.mask(b, &keep, 19, &moves), 13u);
  pool.check();
  EXPECT_EQ(pool.blocks(b), 4u);
  EXPECT_EQ(row(pool, b)[0], before[0]);
  ASSERT_EQ(moves.size(), 9u);  // tokens 8, 9, 12 .. 18 are now 4 .. 12
  EXPECT_EQ(moves[0].from, static_cast<uint64_t>(before[2]) * 4);
  EXPECT_EQ(moves[0].to, static_cast<uint64_t>(row(pool, b)[1]) * 4);
  EXPECT_EQ(moves[8].to, static_cast<uint64_t>(row(pool, b)[3]) * 4);
  // What was published before is there for others; nothing of these two is from now on.
  EXPECT_EQ(pool.match(0, prompt({6, 7, 8, 9, 10}).data(), 20, nullptr).blocks, 4u);
}

TEST(Kv, AScoreFunctionChoosesAndASilentOneIsSwitchedOff) {
  BlockPool pool(options(32));
  Scored scored;
  pool.set_policy(Policy::score, prefer_even_blocks, &scored);
  SeqHandle seq;
  std::vector<SeqHandle> singles;
  for (int i = 0; i < 32; ++i) {
    serve(pool, seq, prompt({i + 100}));
    free_one(pool, seq);
  }
  serve(pool, seq, prompt({1, 2, 3, 4}));
  EXPECT_GT(scored.calls, 0);
  for (const int32_t block : row(pool, seq)) EXPECT_EQ(block % 2, 0);
  scored.silent = true;
  SeqHandle other;
  serve(pool, other, prompt({5, 6, 7, 8}));
  EXPECT_EQ(pool.stats().score_faults.read(), 1u);
  const int calls = scored.calls;
  serve(pool, other, prompt({50, 60, 70, 80}));
  EXPECT_EQ(scored.calls, calls);
  expect_status(PYRT_EINVAL, [&] { pool.set_policy(Policy::score, nullptr, nullptr); });
}

TEST(Kv, TheSecondSegmentOutlivesAScan) {
  for (const Policy policy : {Policy::lru, Policy::slru}) {
    BlockPool pool(options(32));
    pool.set_policy(policy, nullptr, nullptr);
    SeqHandle seq;
    for (int i = 0; i < 2; ++i) {
      serve(pool, seq, prompt({1, 2, 3, 4}));
      free_one(pool, seq);
    }
    for (int i = 0; i < 40; ++i) {
      serve(pool, seq, prompt({100 + i}));
      free_one(pool, seq);
    }
    const uint32_t left = pool.match(0, prompt({1, 2, 3, 4}).data(), 16, nullptr).blocks;
    EXPECT_EQ(left, policy == Policy::lru ? 0u : 3u);
  }
}

TEST(Kv, HandlesThatAreNoneAreRefused) {
  BlockPool pool(options(8)), elsewhere(options(8));
  const SeqHandle a = pool.open(0);
  free_one(pool, a);
  expect_status(PYRT_ESTATE, [&] { free_one(pool, a); });
  const SeqHandle b = pool.open(0);
  EXPECT_NE(a, b);
  expect_status(PYRT_ESTATE, [&] { pool.trim(a, 0); });
  expect_status(PYRT_ESTATE, [&] { pool.commit(12345, 0, 1, nullptr, 0); });
  expect_status(PYRT_ENOENT, [&] { pool.open(77); });
  const SeqHandle twice[] = {b, b};
  expect_status(PYRT_ESTATE, [&] { pool.free(twice); });
  EXPECT_TRUE(pool.alive(b));
  expect_status(PYRT_EINVAL, [&] { pool.commit(b, 1, 1, nullptr, 0); });
  expect_status(PYRT_EINVAL, [&] { pool.trim(b, 1); });
  Options bad = options(8);
  bad.groups.clear();
  expect_status(PYRT_EINVAL, [&] { BlockPool{bad}; });
  for (int i = 0; i < 63; ++i) pool.open(0);
  expect_status(PYRT_EFULL, [&] { pool.open(0); });
}

TEST(Kv, PictureShowsStates) {
  BlockPool pool(options(32));
  SeqHandle a, b;
  serve(pool, a, prompt({1, 2, 3, 4}));
  serve(pool, b, prompt({5, 6}));
  free_one(pool, b);
  const std::string picture = pool.picture(0, 32);
  EXPECT_EQ(std::count(picture.begin(), picture.end(), 'o'), 4) << picture;
  EXPECT_EQ(std::count(picture.begin(), picture.end(), 'c'), 2) << picture;
  EXPECT_EQ(pool.picture(0, 4).size(), 4u);
}

// What the tiers are told, and what they may do.
struct Shadows : Tiers {
  bool keep = true;
  std::vector<NodeId> evicted, gone;
  bool evicting(uint32_t, NodeId node, BlockId) noexcept override {
    evicted.push_back(node);
    if (keep) pool->node(node).tier[0] = 7;
    return keep;
  }
  void removed(NodeId node) noexcept override { gone.push_back(node); }
  BlockPool* pool = nullptr;
};

TEST(Kv, EvictedContentMayLiveOnBelow) {
  Options o = options(4);
  o.extra_nodes = 64;
  BlockPool pool(o);
  Shadows shadows;
  shadows.pool = &pool;
  pool.set_tiers(&shadows);
  SeqHandle seq;
  serve(pool, seq, prompt({1, 2}));
  free_one(pool, seq);
  serve(pool, seq, prompt({3, 4, 5, 6}));
  pool.check();
  EXPECT_EQ(shadows.evicted.size(), 2u);
  std::vector<NodeId> nodes;
  Match match = pool.match(0, prompt({1, 2, 0}).data(), 12, &nodes);
  EXPECT_EQ(match.blocks, 0u);
  EXPECT_EQ(match.lower, 2u);
  // It comes back: a block for it, copied into, then visible.
  free_one(pool, seq);
  BlockId block;
  std::vector<Eviction> evicted;
  ASSERT_TRUE(pool.take_blocks(0, {&block, 1}, &evicted));
  EXPECT_EQ(evicted.size(), 1u);
  pool.check();
  pool.attach(nodes[0], 0, block);
  pool.check();
  match = pool.match(0, prompt({1, 2, 0}).data(), 12, nullptr);
  EXPECT_EQ(match.blocks, 1u);
  EXPECT_EQ(match.lower, 1u);
  // The tier gives up.
  pool.node(nodes[1]).tier[0] = kNone;
  pool.release(nodes[1]);
  EXPECT_EQ(shadows.gone.back(), nodes[1]);
  EXPECT_FALSE(pool.is_node(nodes[1]));
  pool.check();
  pool.set_tiers(nullptr);
}

TEST(Kv, PinnedBlocksAreNotReusedBeforeTheirCopyEnds) {
  BlockPool pool(options(4));
  SeqHandle seq;
  serve(pool, seq, prompt({1, 2}, 4, 1));  // one published block, one private
  const std::vector<int32_t> held = row(pool, seq);
  const BlockId blocks[] = {static_cast<BlockId>(held[0]), static_cast<BlockId>(held[1])};
  pool.pin_blocks(0, blocks);
  free_one(pool, seq);
  pool.check();
  EXPECT_EQ(pool.available(0), 2u);
  SeqHandle other;
  serve(pool, other, prompt({5, 6}));
  for (const int32_t block : row(pool, other)) {
    EXPECT_NE(block, held[0]);
    EXPECT_NE(block, held[1]);
  }
  const auto held_by_it = static_cast<BlockId>(row(pool, other)[0]);
  expect_status(PYRT_ESTATE, [&] { pool.unpin_blocks(0, {&held_by_it, 1}); });
  pool.unpin_blocks(0, blocks);
  pool.check();
  EXPECT_EQ(pool.available(0), 2u);
  expect_status(PYRT_ESTATE, [&] { pool.unpin_blocks(0, blocks); });
  expect_status(PYRT_EINVAL, [&] {
    const BlockId none = 99;
    pool.pin_blocks(0, {&none, 1});
  });
}

TEST(Kv, AParkedSequenceComesBackWithItsHoles) {
  BlockPool pool(options(8, 4, 8));
  SeqHandle a;
  const Tokens tokens = prompt({1, 2, 3, 4, 5});
  serve(pool, a, tokens);
  const auto before = row(pool, a);
  pool.park(a);
  pool.check();
  EXPECT_EQ(pool.available(0), 8u);
  pool.unpark(a, nullptr);
  pool.check();
  for (size_t i = 0; i < before.size(); ++i) EXPECT_EQ(row(pool, a)[i] < 0, before[i] < 0);
  pool.commit(a, 20, 1, tokens.data(), 20);  // publishes anew
  pool.check();
  free_one(pool, a);
  EXPECT_EQ(pool.available(0), 8u);
}

}  // namespace
