// As large as it gets: millions of blocks, a hundred thousand sequences, whole tables.
#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

TEST(KvScale, MillionsOfBlocksAndAHundredThousandSequences) {
  constexpr uint32_t kSeqs = 100'000, kEach = 40, kBlocks = kSeqs * kEach;
  Options o = options(kBlocks, 16);
  o.max_seqs = kSeqs;
  o.max_blocks = kEach;
  BlockPool pool(o);
  std::vector<SeqHandle> seqs(kSeqs);
  std::vector<Growth> grows;
  for (SeqHandle& seq : seqs) {
    seq = pool.open(0);
    grows.push_back({seq, 16 * kEach});
  }
  StepOps ops;
  StepResult result;
  ops.grows = grows;
  ASSERT_TRUE(pool.step(ops, result, false));
  EXPECT_EQ(pool.available(0), 0u);
  std::vector<bool> seen(kBlocks);
  for (const SeqHandle seq : seqs) {
    const int32_t* row = pool.row(0, seq);
    for (uint32_t i = 0; i < kEach; ++i) {
      ASSERT_TRUE(row[i] >= 0 && row[i] < static_cast<int32_t>(kBlocks));
      ASSERT_FALSE(seen[static_cast<size_t>(row[i])]);
      seen[static_cast<size_t>(row[i])] = true;
    }
  }
  // The last of all is published, found, and outlives the others.
  Tokens tokens(16 * kEach);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i);
  pool.commit(seqs.back(), 16 * kEach, 1, tokens.data(), 16 * kEach);
  ops = {};
  ops.frees = seqs;
  ASSERT_TRUE(pool.step(ops, result, false));
  EXPECT_EQ(pool.available(0), kBlocks);
  EXPECT_EQ(pool.match(0, tokens.data(), 16 * kEach, nullptr).blocks, kEach - 1);
  pool.check();
}

TEST(KvScale, SlotsThatABatchCannotNumberAreRefused) {
  Options o = options(1u << 22, 1024);  // 2^32 slots
  o.max_blocks = 8;
  BlockPool pool(o);
  const SeqHandle seq = pool.open(0);
  const Growth growth{seq, 4096};
  StepOps ops;
  ops.grows = {&growth, 1};
  StepResult result;
  EXPECT_TRUE(pool.step(ops, result, false));
  expect_status(PYRT_EUNSUPPORTED,
                [&] { Batch(pool, {&seq, 1}, std::vector<Batch::Arrays>(1), nullptr); });
  EXPECT_FALSE(pool.fits(8 * 1024 + 1));
  pool.check();
}

}  // namespace
