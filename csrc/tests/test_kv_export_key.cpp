// SHA-256 against the standard's vectors at every level, and export keys against their definition.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kv/export_key.hpp"
#include "pyruntime/kv_tiers.h"

namespace kv = pyruntime::kv;

namespace {

std::vector<const kv::ShaKernels*> levels() {
  std::vector<const kv::ShaKernels*> all = {&kv::sha_kernels_scalar()};
  if (kv::sha_kernels_native() != nullptr) all.push_back(kv::sha_kernels_native());
  return all;
}

std::string hex(const uint8_t* bytes, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", bytes[i]);
    out += two;
  }
  return out;
}

std::string sha(const kv::ShaKernels& kernels, const std::string& message, size_t piece) {
  kv::Sha256 stream(kernels);
  for (size_t at = 0; at < message.size(); at += piece) {
    stream.update(message.data() + at, std::min(piece, message.size() - at));
  }
  const kv::Digest digest = stream.digest();
  return hex(digest.data(), digest.size());
}

TEST(Sha256, StandardVectors) {  // FIPS 180-4 examples and NIST's one of a million letters
  const struct {
    std::string message;
    const char* digest;
  } vectors[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmn"
       "o"
       "pqrsmnopqrstnopqrstu",
       "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
      {std::string(1000000, 'a'),
       "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
  };
  for (const kv::ShaKernels* kernels : levels()) {
    for (const auto& vector : vectors) {
      for (const size_t piece : {size_t{1} << 20, size_t{64}, size_t{7}}) {
        if (vector.message.size() / piece > 100000) continue;
        EXPECT_EQ(sha(*kernels, vector.message, piece), vector.digest) << kernels->name;
      }
    }
  }
}

TEST(Sha256, LevelsAgree) {
  const kv::ShaKernels* native = kv::sha_kernels_native();
  if (native == nullptr) GTEST_SKIP() << "this CPU has no SHA instructions";
  std::mt19937_64 random(1);
  for (int round = 0; round < 500; ++round) {
    kv::ShaState states[2];
    uint8_t blocks[2][64];
    for (auto& state : states) {
      for (uint32_t& word : state) word = static_cast<uint32_t>(random());
    }
    for (auto& block : blocks) {
      for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
    }
    kv::ShaState single[2] = {states[0], states[1]};
    kv::ShaState scalar[2] = {states[0], states[1]};
    native->compress_pair(states[0], blocks[0], states[1], blocks[1]);
    for (int i = 0; i < 2; ++i) native->compress(single[i], blocks[i]);
    kv::sha_kernels_scalar().compress_pair(scalar[0], blocks[0], scalar[1], blocks[1]);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(states[i], scalar[i]);
      EXPECT_EQ(single[i], scalar[i]);
    }
  }
}

std::string framed(const std::string& part) {
  const uint64_t size = part.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof size) + part;
}

TEST(ExportKeys, AreTheDigestOfHeadAndTokens) {
  std::vector<int32_t> tokens(700);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7919 % 50000);
  const std::string secret = "of the deployment";
  const std::string space("tenant\0x", 8);
  for (const kv::ShaKernels* kernels : levels()) {
    for (const uint32_t size : {1u, 3u, 8u, 16u, 32u, 48u, 100u}) {
      kv::Sha256 names(*kernels);
      const std::string text =
          std::string("pyruntime-kv-1") + '\0' + framed(secret) + framed(space);
      names.update(text.data(), text.size());
      const kv::Digest named = names.digest();
      std::string message(reinterpret_cast<const char*>(named.data()), named.size());
      const uint64_t wide = size;
      message.append(reinterpret_cast<const char*>(&wide), sizeof wide).append(24, '\0');
      const size_t blocks = tokens.size() / size;
      std::vector<uint8_t> keys(blocks * 32);
      kv::KeyChain chain(secret.data(), secret.size(), space.data(), space.size(), size, *kernels);
      // In uneven portions, none of which may matter.
      for (size_t done = 0, portion = 1; done < blocks; ++portion) {
        const size_t n = std::min(portion, blocks - done);
        chain.extend(tokens.data() + done * size, n, keys.data() + done * 32);
        done += n;
      }
      EXPECT_EQ(chain.blocks(), blocks);
      for (size_t i = 0; i < blocks; ++i) {
        message.append(reinterpret_cast<const char*>(tokens.data() + i * size), size * 4);
        ASSERT_EQ(hex(keys.data() + 32 * i, 32), sha(*kernels, message, message.size()))
            << kernels->name << ", block size " << size << ", block " << i;
      }
    }
  }
}

TEST(ExportKeys, SecretsAndSpacesAreFramed) {
  const int32_t tokens[16] = {1, 2, 3};
  uint8_t one[32];
  uint8_t other[32];
  ASSERT_EQ(pyrt_kv_export_keys("ab", 2, "c", 1, tokens, 16, 16, one), PYRT_OK);
  ASSERT_EQ(pyrt_kv_export_keys("a", 1, "bc", 2, tokens, 16, 16, other), PYRT_OK);
  EXPECT_NE(std::memcmp(one, other, 32), 0);
  ASSERT_EQ(pyrt_kv_export_keys("ab", 2, "c", 1, tokens, 15, 8, other), PYRT_OK);
  EXPECT_NE(std::memcmp(one, other, 32), 0);
  ASSERT_EQ(pyrt_kv_export_keys("ab", 2, "c", 1, tokens, 15, 16, nullptr), PYRT_OK);
}

}  // namespace
