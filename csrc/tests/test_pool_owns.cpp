// Whatever the SIMD level, a pointer is an object of the pool or is not, as the layout says.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "pool/owns.hpp"
#include "pool/region.hpp"
#include "simd/level.hpp"

namespace pyruntime::pool {
namespace {

TEST(PoolOwns, EveryLevelAgreesWithTheLayout) {
  std::mt19937_64 random(1);
  std::vector<OwnsAll> levels{owns_all_scalar};
#if defined(__x86_64__)
  if (simd::detected() != simd::Level::scalar) levels.push_back(owns_all_avx2);
#endif
  char* const base = reinterpret_cast<char*>(uintptr_t{1} << 40);
  for (int round = 0; round < 400; ++round) {
    const size_t bytes = 1 + random() % (size_t{1} << (1 + random() % 24));
    const Geometry g = Geometry::of(bytes, 0, false);
    const uint64_t objects = 1 + random() % (3 * uint64_t{g.per_unit});
    const PoolBounds bounds{reinterpret_cast<uintptr_t>(base), g.offset_of(objects - 1) + 1,
                            g.unit_bytes - 1, g.used_bytes, g.reciprocal};
    const auto is_object = [&](const char* p) {
      if (p < base) return false;
      const auto offset = static_cast<size_t>(p - base);
      const uint64_t index = g.index_of(offset);
      return index < objects && g.offset_of(index) == offset;
    };
    std::vector<void*> good(1 + random() % 70);
    for (void*& p : good) p = base + g.offset_of(random() % objects);
    for (const OwnsAll owns_all : levels) EXPECT_TRUE(owns_all(bounds, good.data(), good.size()));
    for (int wrong = 0; wrong < 20; ++wrong) {
      char* p = base + g.offset_of(random() % objects);
      switch (random() % 6) {
        case 0:
          p += 1 + random() % 64;
          break;
        case 1:
          p -= 1 + random() % 64;
          break;
        case 2:
          p += bounds.end;
          break;
        case 3:
          p = reinterpret_cast<char*>(random());
          break;
        case 4:
          p = base + g.used_bytes;  // where the next object would be
          break;
        default:
          p = wrong % 2 ? nullptr : base - g.unit_bytes;
          break;
      }
      std::vector<void*> list = good;
      list[random() % list.size()] = p;
      for (const OwnsAll owns_all : levels) {
        EXPECT_EQ(owns_all(bounds, list.data(), list.size()), is_object(p))
            << bytes << " " << static_cast<void*>(p);
      }
    }
  }
}

}  // namespace
}  // namespace pyruntime::pool
