#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "pyruntime/pyruntime.h"

namespace {

TEST(Abi, VersionsAndNames) {
  EXPECT_EQ(pyrt_abi_version(), PYRT_ABI_VERSION);
  EXPECT_STREQ(pyrt_status_name(PYRT_OK), "PYRT_OK");
  EXPECT_STREQ(pyrt_status_name(PYRT_EINTERNAL), "PYRT_EINTERNAL");
  EXPECT_STREQ(pyrt_status_name(1), "unknown status");
  EXPECT_STREQ(pyrt_status_name(-1000), "unknown status");
}

TEST(Abi, LastErrorBelongsToItsThread) {
  ASSERT_EQ(pyrt_stop_create(nullptr), PYRT_EINVAL);
  EXPECT_EQ(std::string(pyrt_last_error()), "out must not be NULL");
  std::thread([] { EXPECT_STREQ(pyrt_last_error(), ""); }).join();
}

TEST(Abi, StopFlag) {
  pyrt_stop* stop = nullptr;
  ASSERT_EQ(pyrt_stop_create(&stop), PYRT_OK);
  EXPECT_EQ(pyrt_stop_is_set(stop), 0);
  pyrt_stop_set(stop, 1);
  EXPECT_EQ(pyrt_stop_is_set(stop), 1);
  pyrt_stop_set(stop, 0);
  EXPECT_EQ(pyrt_stop_is_set(stop), 0);
  pyrt_stop_destroy(stop);
  pyrt_stop_set(nullptr, 1);
  EXPECT_EQ(pyrt_stop_is_set(nullptr), 0);
  pyrt_stop_destroy(nullptr);
}

TEST(Abi, ThreadsResizeChecksItsRange) {
  EXPECT_EQ(pyrt_threads_resize(0), PYRT_EINVAL);
  EXPECT_EQ(pyrt_threads_resize(2), PYRT_OK);
  EXPECT_EQ(pyrt_threads_size(), 2);
}

}  // namespace
