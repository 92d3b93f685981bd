// The store's file: what a reader must refuse, and that the extents come back.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include "base/crc32c.hpp"
#include "base/status.hpp"
#include "moe/store.hpp"

namespace pyruntime::moe {
namespace {

namespace fs = std::filesystem;

StoreInfo small_info() {
  StoreInfo info{};
  info.num_layers = 3;
  info.num_experts = 2;
  info.hidden = 40;
  info.ffn = 24;
  info.levels = 3;
  const uint8_t bits[3][4] = {{2, 4, 8, 0}, {2, 4, 8, 0}, {4, 4, 8, 0}};
  std::memcpy(info.bits, bits, sizeof bits);
  info.model_hash[0] = 7;
  return info;
}

class MoeStore : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              ("pyrt-mxs-" + std::to_string(getpid()) + "-" +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    path_ = (folder_ / "a.mxs").string();
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<char> data(int64_t bytes, uint32_t seed) const {
    std::mt19937 random(seed);
    std::vector<char> out(static_cast<size_t>(bytes));
    for (char& c : out) c = static_cast<char>(random());
    return out;
  }

  void write(const std::string& path) const {
    StoreWriter writer(path, small_info());
    const Header& h = writer.header();
    for (const int layer : {0, 2}) {
      for (int level = 0; level < 3; ++level) {
        for (int expert = 0; expert < 2; ++expert) {
          const int64_t bytes = matrix_offset(h, level, kMatrices);
          const auto d = data(bytes, static_cast<uint32_t>(layer * 100 + level * 10 + expert));
          writer.add_plane(layer, expert, level, d.data(), bytes, Quality{});
        }
      }
    }
    const Shape dense{17, 33, 1, {8}};
    const auto d = data(plane_bytes(dense, 0), 999);
    writer.add_dense(1, 5, dense, d.data(), static_cast<int64_t>(d.size()), Quality{});
    writer.commit();
  }

  // The status of opening the file after `damage` changed its bytes.
  pyrt_status opened_after(const std::function<void(std::vector<char>&)>& damage) {
    write(path_);
    std::ifstream in(path_, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(in)), {});
    in.close();
    damage(bytes);
    std::ofstream(path_, std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    try {
      Store store(path_);
      return PYRT_OK;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(path_), std::string::npos) << error.what();
      return error.status();
    }
  }

  fs::path folder_;
  std::string path_;
};

template <class Body>
pyrt_status status_of(Body body) {
  try {
    body();
    return PYRT_OK;
  } catch (const Error& error) {
    return error.status();
  }
}

TEST(Crc32c, KnownValueAndBothVersionsAgree) {
  using base::crc32c, base::crc32c_tables;
  EXPECT_EQ(crc32c("123456789", 9), 0xe3069283u);
  std::vector<uint8_t> bytes(50000);
  std::mt19937 random(1);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
  for (const size_t size : {0, 1, 7, 8, 9, 4095, 12287, 12288, 12289, 49999}) {
    EXPECT_EQ(crc32c(bytes.data() + 1, size), crc32c_tables(bytes.data() + 1, size)) << size;
    const uint32_t first = crc32c(bytes.data(), size / 3);
    EXPECT_EQ(crc32c(bytes.data() + size / 3, size - size / 3, first), crc32c(bytes.data(), size));
  }
}

TEST_F(MoeStore, WhatWasWrittenComesBack) {
  write(path_);
  Store store(path_);
  EXPECT_TRUE(store.sparse(0));
  EXPECT_FALSE(store.sparse(1));
  EXPECT_EQ(store.header().model_hash[0], 7);
  EXPECT_EQ(store.find(1, 0, 0), nullptr);
  EXPECT_EQ(store.find(0, 2, 0), nullptr);
  EXPECT_EQ(store.find(3, 0, 0), nullptr);
  EXPECT_EQ(store.find_dense(1, 4), nullptr);
  for (const int layer : {0, 2}) {
    for (int level = 0; level < 3; ++level) {
      for (int expert = 0; expert < 2; ++expert) {
        const Record* r = store.find(layer, expert, level);
        ASSERT_NE(r, nullptr);
        EXPECT_EQ(r->offset % kPage, 0u);
        ASSERT_EQ(static_cast<int64_t>(r->bytes), store.extent_bytes(level));
        std::vector<char> got(r->bytes);
        store.read(*r, got.data());
        EXPECT_EQ(got, data(static_cast<int64_t>(r->bytes),
                            static_cast<uint32_t>(layer * 100 + level * 10 + expert)));
      }
    }
  }
  const Record* dense = store.find_dense(1, 5);
  ASSERT_NE(dense, nullptr);
  EXPECT_EQ(dense->rows, 17u);
  store.verify();
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
}

TEST_F(MoeStore, MissingFile) {
  EXPECT_EQ(status_of([&] { Store store(path_); }), PYRT_ENOENT);
  EXPECT_EQ(status_of([&] { Store store(folder_.string()); }), PYRT_EIO);
}

TEST_F(MoeStore, TruncatedAnywhere) {
  write(path_);
  const auto whole = fs::file_size(path_);
  for (const uint64_t size : {uint64_t{0}, uint64_t{10}, uint64_t{4096}, uint64_t{5000},
                              uint64_t{20000}, whole - 24, whole - 1}) {
    EXPECT_EQ(opened_after([&](auto& bytes) { bytes.resize(size); }), PYRT_ECORRUPT) << size;
  }
  EXPECT_EQ(opened_after([&](auto& bytes) { bytes.push_back(0); }), PYRT_ECORRUPT);
}

TEST_F(MoeStore, DamagedHeaderIndexOrFooter) {
  EXPECT_EQ(opened_after([](auto&) {}), PYRT_OK);
  EXPECT_EQ(opened_after([](auto& b) { b[0] ^= 1; }), PYRT_ECORRUPT);
  EXPECT_EQ(opened_after([](auto& b) { b[8] = 2; }), PYRT_EVERSION);
  EXPECT_EQ(opened_after([](auto& b) { b[50] ^= 1; }), PYRT_ECORRUPT);
  EXPECT_EQ(opened_after([](auto& b) { b[b.size() - 1] ^= 1; }), PYRT_ECORRUPT);
  EXPECT_EQ(opened_after([](auto& b) { b[b.size() - 24 - 60] ^= 1; }), PYRT_ECORRUPT);
}

// A well-formed file whose index lies: every checksum is right.
TEST_F(MoeStore, LyingIndex) {
  write(path_);
  Store store(path_);
  const auto refused = [&](const std::function<void(std::vector<Record>&)>& lie) {
    std::vector<Record> records = store.records();
    lie(records);
    return status_of([&] { check_index(path_, store.header(), records); }) == PYRT_ECORRUPT;
  };
  EXPECT_FALSE(refused([](auto&) {}));
  EXPECT_TRUE(refused([](auto& r) { r[3].offset += 1; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].offset = r[4].offset; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].offset = uint64_t{1} << 60; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].offset = 0; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].bytes -= 1; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].layer = 3; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].layer = 1; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].expert = 2; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].level = 3; }));
  EXPECT_TRUE(refused([](auto& r) { r[3].kind = 2; }));
  EXPECT_TRUE(refused([](auto& r) { r.erase(r.begin()); }));
  EXPECT_TRUE(refused([](auto& r) {  // the same extent twice, at two places
    r[1].expert = r[0].expert;
    r[1].level = r[0].level;
  }));
  EXPECT_TRUE(refused([](auto& r) { r.back().rows = 1 << 30; }));
  EXPECT_TRUE(refused([](auto& r) { r.back().dense_levels = 200; }));
}

TEST_F(MoeStore, DamagedExtentIsFoundWhenItIsRead) {
  EXPECT_EQ(opened_after([](auto& b) { b[kPage + 3] ^= 1; }), PYRT_OK);
  Store store(path_);
  std::vector<char> out(static_cast<size_t>(store.extent_bytes(0)));
  EXPECT_EQ(status_of([&] { store.read(*store.find(0, 0, 0), out.data()); }), PYRT_ECORRUPT);
  EXPECT_EQ(status_of([&] { store.read(*store.find(0, 1, 0), out.data()); }), PYRT_OK);
  EXPECT_EQ(status_of([&] { store.verify(); }), PYRT_ECORRUPT);
}

TEST_F(MoeStore, FileThatShrinksWhileOpen) {
  write(path_);
  Store store(path_);
  fs::resize_file(path_, kPage + 100);
  std::vector<char> out(static_cast<size_t>(store.extent_bytes(0)));
  EXPECT_EQ(status_of([&] { store.read(*store.find(0, 0, 0), out.data()); }), PYRT_EIO);
}

TEST_F(MoeStore, WriterRefusesAndLeavesNothingBehind) {
  {
    StoreWriter writer(path_, small_info());
    const std::vector<char> d(static_cast<size_t>(matrix_offset(writer.header(), 0, kMatrices)));
    const auto add = [&](int64_t layer, int64_t expert, int level, size_t bytes) {
      return status_of([&] {
        writer.add_plane(layer, expert, level, d.data(), static_cast<int64_t>(bytes), Quality{});
      });
    };
    EXPECT_EQ(add(3, 0, 0, d.size()), PYRT_EINVAL);
    EXPECT_EQ(add(0, 2, 0, d.size()), PYRT_EINVAL);
    EXPECT_EQ(add(0, 0, 3, d.size()), PYRT_EINVAL);
    EXPECT_EQ(add(0, 0, 0, d.size() - 1), PYRT_EINVAL);
    EXPECT_EQ(add(0, 0, 0, d.size()), PYRT_OK);
    EXPECT_EQ(status_of([&] { writer.commit(); }), PYRT_ESTATE);  // the layer is not whole
    EXPECT_FALSE(fs::exists(path_));
  }
  EXPECT_TRUE(fs::is_empty(folder_));
  StoreInfo info = small_info();
  info.bits[0][1] = 3;
  EXPECT_EQ(status_of([&] { StoreWriter writer(path_, info); }), PYRT_EINVAL);
  EXPECT_EQ(status_of([&] { StoreWriter writer((folder_ / "no" / "a").string(), small_info()); }),
            PYRT_EIO);
}

TEST_F(MoeStore, AnInterruptedRewriteKeepsTheOldStore) {
  write(path_);
  const auto before = fs::file_size(path_);
  {
    StoreWriter writer(path_, small_info());
  }
  EXPECT_EQ(fs::file_size(path_), before);
  Store store(path_);
  store.verify();
}

}  // namespace
}  // namespace pyruntime::moe
