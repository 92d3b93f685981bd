// Nested planes: the kernels of every instruction set against each other and against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "base/half.hpp"
#include "base/status.hpp"
#include "moe/ffn.hpp"
#include "moe/kernels.hpp"
#include "moe/quantize.hpp"
#include "tests/support/nested.hpp"

namespace pyruntime::moe {
namespace {

using base::from_half;
using base::to_half;

TEST(MoeHalf, AllHalvesComeBackAndRoundingIsToNearest) {
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    ASSERT_EQ(to_half(from_half(static_cast<uint16_t>(h))), h);
    if (h + 1 < 0x7c00) {
      const float low = from_half(static_cast<uint16_t>(h));
      const float high = from_half(static_cast<uint16_t>(h + 1));
      ASSERT_EQ(to_half((low + high) / 2), (h & 1) != 0 ? h + 1 : h);  // half way: to even
      ASSERT_EQ(to_half(std::nextafter((low + high) / 2, 1e9f)), h + 1);
    }
  }
  EXPECT_EQ(to_half(1e6f), 0x7bff);
  EXPECT_EQ(to_half(-1e6f), 0xfbff);
  EXPECT_EQ(to_half(INFINITY), 0x7bff);
  EXPECT_TRUE(std::isnan(from_half(to_half(-NAN))));
  EXPECT_EQ(from_half(0xfc00), -INFINITY);
}

TEST(MoeQuantize, ErrorFallsWithWidthAndIsWhatItSays) {
  for (const Shape& shape : kShapes) {
    const NestedCase m(shape, 3);
    for (int level = 0; level < shape.levels; ++level) {
      const std::vector<float> back = m.back(level);
      double error = 0.0;
      for (size_t i = 0; i < back.size(); ++i) {
        error += std::pow(static_cast<double>(m.weights[i]) - back[i], 2);
      }
      EXPECT_NEAR(error, m.quantized.error[level], 1e-3 * error + 1e-12);
      if (level > 0) {
        EXPECT_LE(m.quantized.error[level],
                  m.quantized.error[level - 1] + 1e-5f * m.quantized.energy);
      }
      if (shape.rows * shape.columns > 1000) {
        const double allowed[] = {0, 0, .16, 0, 1.2e-2, 0, 8e-4, 0, 6e-5};
        EXPECT_LT(m.quantized.error[level] / m.quantized.energy, allowed[shape.bits[level]]);
      }
    }
  }
}

// A store written at 8 bits, cut, holds the top bits of the same code.
TEST(MoeQuantize, PlanesAreTheCodesBitsFromTheTop) {
  const Shape fine{17, 300, 4, {2, 4, 6, 8}}, coarse{17, 300, 1, {8}};
  const NestedCase m(fine, 5), whole(coarse, 5);
  const auto code = [](const NestedCase& a, int64_t row, int64_t column, int level) {
    int value = 0;
    for (int l = 0; l <= level; ++l) {
      const int bits = plane_bits(a.shape, l), fields = 8 / bits;
      const int64_t super = column / kSuper, g = column % kSuper / kGroup, k = column % kGroup;
      const int64_t record = kPairBytes + (l == 0 ? kMetaBytes : 0);
      const uint8_t* at = a.planes[l] + row / kTileRows * tile_bytes(a.shape, l) +
                          super * (record + kSuperGroups * 64 * bits) + record + g * 64 * bits;
      const auto quad = static_cast<int>(k / 4);
      value = value << bits |
              ((at[quad / fields * 64 + row % kTileRows * 4 + k % 4] >> (quad % fields * bits)) &
               ((1 << bits) - 1));
    }
    return value;
  };
  for (int64_t row = 0; row < 17; ++row) {
    for (int64_t column = 0; column < 300; ++column) {
      const int full = code(whole, row, column, 0);
      for (int level = 0; level < 4; ++level) {
        ASSERT_EQ(code(m, row, column, level), full >> (6 - 2 * level)) << row << ", " << column;
      }
    }
  }
}

TEST(MoeQuantize, ZeroConstantTinyAndHugeWeights) {
  const Shape shape{16, 64, 4, {2, 4, 6, 8}};
  const NestedCase zero(shape, std::vector<float>(1024, 0.0f));
  for (int level = 0; level < 4; ++level) {
    for (const float v : zero.back(level)) EXPECT_EQ(v, 0.0f);
  }
  for (const float constant : {1.0f, -3.0f, 1e-20f, 1e20f}) {
    const NestedCase m(shape, std::vector<float>(1024, constant));
    for (const float v : m.back(3)) EXPECT_NEAR(v / constant, 1.0, 0.01);
  }
  std::vector<float> bad(1024, 1.0f);
  bad[70] = NAN;
  try {
    const NestedCase m(shape, bad);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), PYRT_EINVAL);
    EXPECT_NE(std::string(error.what()).find("[1, 6]"), std::string::npos) << error.what();
  }
}

TEST(MoeQuantize, ImportanceMovesTheErrorAway) {
  const Shape shape{64, 256, 1, {2}};
  std::vector<float> importance(256, 1.0f);
  for (size_t i = 0; i < 256; i += 8) importance[i] = 1000.0f;
  const NestedCase plain(shape, 9), weighted(shape, 9, 0.05f, importance.data());
  const auto error = [&](const NestedCase& m) {
    const std::vector<float> back = m.back(0);
    double sum = 0.0;
    for (size_t i = 0; i < back.size(); ++i) {
      sum += importance[i % 256] * std::pow(static_cast<double>(m.weights[i]) - back[i], 2);
    }
    return sum;
  };
  EXPECT_LT(error(weighted), 0.98 * error(plain));
}

TEST(MoeKernels, ScalarEqualsFloat64OnDequantizedWeights) {
  for (const Shape& shape : kShapes) {
    const NestedCase m(shape, 21);
    const int64_t n = 3;
    const std::vector<float> x = normal(n * shape.columns, 22);
    const Coded coded(x, n, shape.columns, kScalarKernels);
    for (int level = 0; level < shape.levels; ++level) {
      const std::vector<float> y = multiply(kScalarKernels, m.at(level), coded), w = m.back(level);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t row = 0; row < shape.rows; ++row) {
          double sum = 0.0, magnitude = 0.0;
          for (int64_t k = 0; k < shape.columns; ++k) {
            const Row& r = coded.rows[static_cast<size_t>(i)];
            const double a = static_cast<double>(r.scales[k / kGroup]) * r.codes[k];
            sum += a * w[static_cast<size_t>(row * shape.columns + k)];
            magnitude += std::fabs(a * w[static_cast<size_t>(row * shape.columns + k)]);
          }
          ASSERT_NEAR(y[static_cast<size_t>(i * shape.rows + row)], sum, 1e-5 * magnitude + 1e-30);
        }
      }
    }
  }
}

class MoeIsa : public ::testing::TestWithParam<const char*> {};

TEST_P(MoeIsa, EqualsScalarBitForBitForAnyNumberOfTokens) {
  const Kernels* kernel = kernels(GetParam());
  if (kernel == nullptr) GTEST_SKIP() << "this CPU has no " << GetParam();
  for (const Shape& shape : kShapes) {
    const NestedCase m(shape, 31);
    std::vector<float> x = normal(33 * shape.columns, 32, 3.0f);
    for (int64_t k = 0; k < shape.columns; ++k)
      x[static_cast<size_t>(k)] = k % 2 == 0 ? 5.0f : -5.0f;
    const Coded reference(x, 33, shape.columns, kScalarKernels);
    const Coded coded(x, 33, shape.columns, *kernel);
    ASSERT_EQ(reference.memory.size(), coded.memory.size());
    for (size_t i = 0; i < 33; ++i) {
      for (int64_t k = 0; k < ceil_div(shape.columns, kGroup) * kGroup; ++k) {
        ASSERT_EQ(reference.rows[i].codes[k], coded.rows[i].codes[k]);
      }
    }
    for (int level = 0; level < shape.levels; ++level) {
      const std::vector<float> want = multiply(kScalarKernels, m.at(level), reference);
      for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 9, 16, 33}) {
        Coded some = coded;
        some.rows.resize(static_cast<size_t>(n));
        some.rows = std::vector<Row>(coded.rows.begin(), coded.rows.begin() + n);
        const std::vector<float> got = multiply(*kernel, m.at(level), some);
        for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], want[i]) << level << " " << n;
      }
    }
  }
  std::vector<float> a = normal(1000, 41, 20.0f), b = a;
  const std::vector<float> up = normal(1000, 42);
  kScalarKernels.silu_mul(a.data(), up.data(), 1000);
  kernel->silu_mul(b.data(), up.data(), 1000);
  EXPECT_EQ(a, b);
}

// All codes 255 against all activations 127 and -127: the largest sums there can be.
TEST_P(MoeIsa, ExtremeCodesAndActivations) {
  const Kernels* kernel = kernels(GetParam());
  if (kernel == nullptr) GTEST_SKIP() << "this CPU has no " << GetParam();
  for (const Shape& shape :
       {Shape{16, 512, 4, {2, 4, 6, 8}}, Shape{16, 512, 1, {8}}, Shape{16, 512, 3, {4, 6, 8}}}) {
    NestedCase m(shape, 51);
    for (int l = 0; l < shape.levels; ++l) {
      std::fill_n(m.planes[l], plane_bytes(shape, l), uint8_t{255});
      const int64_t record = kPairBytes + (l == 0 ? kMetaBytes : 0);
      for (int64_t super = 0; super < 2; ++super) {
        uint8_t* pair =
            m.planes[l] + super * (record + 512 * plane_bits(shape, l)) + record - kPairBytes;
        for (int i = 0; i < 32; ++i) {
          pair[2 * i] = 0x00;
          pair[2 * i + 1] = 0x3c;  // 1.0
        }
      }
    }
    for (const float sign : {1.0f, -1.0f}) {
      const std::vector<float> x(512, sign);
      const Coded coded(x, 1, 512, *kernel);
      for (int level = 0; level < shape.levels; ++level) {
        const int bits = shape.bits[level];
        const double weight = 255.0 * ((1 << bits) - 0.5) - 255.0;
        const std::vector<float> y = multiply(*kernel, m.at(level), coded);
        for (const float v : y) {
          ASSERT_NEAR(v, sign * 512 * weight * m.quantized.unit,
                      1e-5 * 512 * weight * m.quantized.unit);
        }
      }
    }
  }
}

TEST_P(MoeIsa, AValueThatIsNotFiniteShows) {
  const Kernels* kernel = kernels(GetParam());
  if (kernel == nullptr) GTEST_SKIP() << "this CPU has no " << GetParam();
  const NestedCase m({16, 64, 1, {4}}, 61);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> x = normal(64, 62);
    x[40] = bad;
    for (const float v : multiply(*kernel, m.at(0), Coded(x, 1, 64, *kernel)))
      EXPECT_TRUE(std::isnan(v));
  }
}

INSTANTIATE_TEST_SUITE_P(All, MoeIsa,
                         ::testing::Values("scalar", "avx2", "avx_vnni", "avx512_vnni"),
                         [](const auto& info) { return std::string(info.param); });

class MoeFfn : public ::testing::Test {
 protected:
  static constexpr int64_t kD = 70, kF = 50, kExperts = 5;
  void SetUp() override {
    layer_.experts = kExperts;
    layer_.levels = 4;
    layer_.shapes[kGate] = layer_.shapes[kUp] = {kF, kD, 4, {2, 4, 6, 8}};
    layer_.shapes[kDown] = {kD, kF, 4, {4, 4, 6, 8}};
    for (int64_t e = 0; e < kExperts; ++e) {
      std::vector<std::vector<uint8_t>> extents(4);
      for (int l = 0; l < 4; ++l) {
        int64_t bytes = 0;
        for (const Shape& s : layer_.shapes) bytes += plane_bytes(s, l);
        extents[static_cast<size_t>(l)].resize(static_cast<size_t>(bytes));
      }
      for (int i = 0; i < kMatrices; ++i) {
        const NestedCase m(layer_.shapes[i], static_cast<uint32_t>(100 + e * 3 + i));
        for (int l = 0; l < 4; ++l) {
          int64_t at = 0;
          for (int k = 0; k < i; ++k) at += plane_bytes(layer_.shapes[k], l);
          std::copy_n(m.planes[l], plane_bytes(m.shape, l),
                      extents[static_cast<size_t>(l)].data() + at);
          dequantized_[e][i][l] = m.back(l);
        }
        units_.push_back(m.quantized.unit);
      }
      for (auto& extent : extents) {
        memory_.push_back(std::move(extent));
        planes_.push_back(memory_.back().data());
      }
    }
    layer_.planes = planes_.data();
    layer_.units = units_.data();
  }

  LayerExperts layer_{};
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<const uint8_t*> planes_;
  std::vector<float> units_;
  std::vector<float> dequantized_[kExperts][kMatrices][4];
};

TEST_F(MoeFfn, FollowsTheDequantizedWeightsAndEachTokenIsItsOwn) {
  constexpr int64_t n = 40, k = 3;
  const std::vector<float> x = normal(n * kD, 71);
  std::mt19937 random(72);
  std::vector<int32_t> ids(n * k);
  std::vector<uint8_t> levels(n * k);
  const std::vector<float> weights = normal(n * k, 73);
  for (size_t s = 0; s < ids.size(); ++s) {
    ids[s] = static_cast<int32_t>(random() % 7) - 1;
    if (ids[s] == 5) ids[s] = 0;
    levels[s] = random() % 8 == 0 ? kSkip : static_cast<uint8_t>(random() % 4);
  }
  std::vector<float> out(n * kD), alone(kD);
  ffn(layer_, {x.data(), n, ids.data(), weights.data(), k, levels.data(), 0}, out.data());
  for (int64_t i = 0; i < n; ++i) {
    ffn(layer_,
        {x.data() + i * kD, 1, ids.data() + i * k, weights.data() + i * k, k, levels.data() + i * k,
         0},
        alone.data());
    ASSERT_TRUE(std::equal(alone.begin(), alone.end(), out.begin() + i * kD)) << i;
    std::vector<double> want(kD, 0.0);
    double magnitude = 0.0;
    for (int64_t s = i * k; s < (i + 1) * k; ++s) {
      const auto slot = static_cast<size_t>(s);
      if (ids[slot] < 0 || levels[slot] == kSkip) continue;
      const auto& parts = dequantized_[ids[slot]];
      std::vector<double> hidden(kF);
      for (size_t f = 0; f < kF; ++f) {
        double gate = 0.0, up = 0.0;
        for (size_t c = 0; c < kD; ++c) {
          gate += x[static_cast<size_t>(i * kD) + c] * parts[kGate][levels[slot]][f * kD + c];
          up += x[static_cast<size_t>(i * kD) + c] * parts[kUp][levels[slot]][f * kD + c];
        }
        hidden[f] = gate / (1.0 + std::exp(-gate)) * up;
      }
      for (size_t c = 0; c < kD; ++c) {
        double y = 0.0;
        for (size_t f = 0; f < kF; ++f) y += hidden[f] * parts[kDown][levels[slot]][c * kF + f];
        want[c] += weights[slot] * y;
        magnitude = std::max(magnitude, std::fabs(y));
      }
    }
    for (size_t c = 0; c < kD; ++c) {  // int8 activations: about one percent
      ASSERT_NEAR(out[static_cast<size_t>(i * kD) + c], want[c], 0.05 * magnitude + 1e-12) << i;
    }
  }
}

TEST_F(MoeFfn, RefusesWhatIsNotThere) {
  const std::vector<float> x = normal(kD, 81);
  std::vector<float> out(kD);
  const float weight = 1.0f;
  const auto status = [&](int32_t id, int level) -> pyrt_status {
    try {
      ffn(layer_, {x.data(), 1, &id, &weight, 1, nullptr, level}, out.data());
      return PYRT_OK;
    } catch (const Error& error) {
      return error.status();
    }
  };
  EXPECT_EQ(status(0, 3), PYRT_OK);
  EXPECT_EQ(status(5, 3), PYRT_EINVAL);
  EXPECT_EQ(status(-2, 3), PYRT_EINVAL);
  EXPECT_EQ(status(0, 4), PYRT_EINVAL);
  planes_[2] = nullptr;
  EXPECT_EQ(status(0, 3), PYRT_EINVAL);
  EXPECT_EQ(status(0, 1), PYRT_OK);
}

}  // namespace
}  // namespace pyruntime::moe
