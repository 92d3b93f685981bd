// What sequences refuse: repeated admissions, trims into what was given up.
#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

TEST(KvSequences, ATrimBehindWhatWasGivenUpIsRefused) {
  BlockPool pool(options(16, 4, 6));
  SeqHandle seq;
  serve(pool, seq, prompt({1, 2, 3, 4}, 4, 1));  // 15 valid: tokens 0..7 are gone
  const uint64_t before = pool.state_hash();
  for (const uint32_t tokens : {12u, 9u, 6u, 1u}) {
    expect_status(PYRT_EINVAL, [&] { pool.trim(seq, tokens); });
  }
  EXPECT_EQ(pool.state_hash(), before);
  pool.trim(seq, 13);  // sees 8..12
  pool.check();
  pool.trim(seq, 0);  // from the beginning
  pool.check();
  EXPECT_EQ(pool.blocks(seq), 0u);
  BlockPool full(options(16));
  serve(full, seq, prompt({1, 2, 3, 4}));
  const uint64_t keep = 0xff0f;
  full.mask(seq, &keep, 16, nullptr);
  expect_status(PYRT_EINVAL, [&] { full.trim(seq, 6); });
  full.trim(seq, 8);
  full.check();
}

TEST(KvSequences, AnAdmissionMayBeRepeatedWhileNothingIsHeld) {
  BlockPool pool(options(16));
  SeqHandle first;
  serve(pool, first, prompt({1, 2}));
  const SeqHandle seq = pool.open(0);
  const Tokens unknown = prompt({7}), known = prompt({1, 2, 3});
  EXPECT_EQ(pool.admit(seq, unknown.data(), 4, 24), 0u);
  EXPECT_EQ(pool.promised(), 6u);
  EXPECT_EQ(pool.admit(seq, known.data(), 12, 24), 8u);
  EXPECT_EQ(pool.promised(), 4u);
  pool.check();
  const SeqHandle parked = pool.open(0);
  pool.park(parked);
  EXPECT_THROW(pool.admit(parked, known.data(), 12, 0), Error);
  pool.check();
}

}  // namespace
