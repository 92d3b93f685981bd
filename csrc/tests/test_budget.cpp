// The budget's order of asking, its messages, and what may be called from where.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "pyruntime/pool.h"

namespace {

constexpr uint64_t kUnit = PYRT_BUDGET_UNIT_BYTES;

struct Client {
  Client(pyrt_budget* budget, const char* given_name, int32_t priority, std::string* log)
      : name(given_name), asked(log) {
    EXPECT_EQ(pyrt_budget_register(budget, given_name, priority, &reclaim, this, &handle), PYRT_OK);
  }
  ~Client() { EXPECT_EQ(pyrt_budget_unregister(handle, 1), PYRT_OK); }

  pyrt_status reserve(uint64_t units) { return pyrt_budget_reserve(handle, units * kUnit); }
  pyrt_budget_client_statistics statistics() const {
    pyrt_budget_client_statistics s;
    s.struct_size = sizeof s;
    EXPECT_EQ(pyrt_budget_client_get_statistics(handle, &s), PYRT_OK);
    return s;
  }
  static uint64_t reclaim(void* user, uint64_t bytes) {
    auto* self = static_cast<Client*>(user);
    *self->asked += self->name + std::to_string(bytes / kUnit) + " ";
    if (self->in_callback != nullptr) self->in_callback(*self);
    const uint64_t given = std::min(self->gives * kUnit, bytes);
    EXPECT_EQ(pyrt_budget_give_back(self->handle, given), PYRT_OK) << pyrt_last_error();
    self->gives -= given / kUnit;
    return given;
  }

  std::string name;
  std::string* asked;
  uint64_t gives = 0;  // units it is willing to give up
  void (*in_callback)(Client& self) = nullptr;
  pyrt_budget_client* handle = nullptr;
};

struct Budget {
  explicit Budget(uint64_t units) {
    EXPECT_EQ(pyrt_budget_create(units * kUnit + 5, &handle), PYRT_OK);
  }
  ~Budget() { EXPECT_EQ(pyrt_budget_destroy(handle), PYRT_OK) << pyrt_last_error(); }
  uint64_t available() const {
    pyrt_budget_statistics s;
    s.struct_size = sizeof s;
    EXPECT_EQ(pyrt_budget_get_statistics(handle, &s), PYRT_OK);
    return s.available_bytes / kUnit;
  }
  pyrt_budget* handle = nullptr;
};

TEST(Budget, AsksLowerThenEqualTheBiggestFirstNeverHigherNorItself) {
  std::string asked;
  Budget budget(10);
  Client low(budget.handle, "low", -1, &asked);
  Client small(budget.handle, "small", 0, &asked);
  Client big(budget.handle, "big", 0, &asked);
  Client high(budget.handle, "high", 1, &asked);
  Client mine(budget.handle, "mine", 0, &asked);
  ASSERT_EQ(low.reserve(1), PYRT_OK);
  ASSERT_EQ(small.reserve(2), PYRT_OK);
  ASSERT_EQ(big.reserve(3), PYRT_OK);
  ASSERT_EQ(high.reserve(2), PYRT_OK);
  ASSERT_EQ(mine.reserve(2), PYRT_OK);
  low.gives = 1;
  big.gives = 1;
  small.gives = 2;
  high.gives = mine.gives = 2;
  ASSERT_EQ(mine.reserve(3), PYRT_OK);
  EXPECT_EQ(asked, "low3 big2 small1 ");
  EXPECT_EQ(budget.available(), 0u);
  asked.clear();
  EXPECT_EQ(mine.reserve(3), PYRT_EFULL);  // only one unit is still given up, and nobody takes it
  EXPECT_EQ(budget.available(), 1u);
  EXPECT_EQ(mine.statistics().reserved_bytes, 5 * kUnit);
  EXPECT_EQ(mine.statistics().failures, 1u);
  EXPECT_EQ(big.statistics().freed_bytes, kUnit);
  EXPECT_EQ(small.statistics().peak_bytes, 2 * kUnit);
  EXPECT_EQ(small.statistics().freed_bytes, 2 * kUnit);
  const std::string message = pyrt_last_error();
  EXPECT_NE(message.find(std::to_string(3 * kUnit)), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(kUnit)), std::string::npos) << message;
  EXPECT_NE(message.find("mine"), std::string::npos) << message;
}

TEST(Budget, MoreThanTheLimitAsksNobody) {
  std::string asked;
  Budget budget(2);
  Client low(budget.handle, "low", 0, &asked);
  Client mine(budget.handle, "mine", 1, &asked);
  ASSERT_EQ(low.reserve(1), PYRT_OK);
  low.gives = 1;
  EXPECT_EQ(mine.reserve(3), PYRT_EFULL);
  EXPECT_EQ(asked, "");
}

TEST(Budget, ACallbackCannotUnregisterItselfNorSetOffOthers) {
  std::string asked;
  Budget budget(4);
  Client other(budget.handle, "other", 0, &asked);
  Client low(budget.handle, "low", 0, &asked);
  Client mine(budget.handle, "mine", 1, &asked);
  ASSERT_EQ(low.reserve(3), PYRT_OK);
  ASSERT_EQ(other.reserve(1), PYRT_OK);
  low.gives = 2;
  low.in_callback = [](Client& self) {
    EXPECT_EQ(pyrt_budget_unregister(self.handle, 1), PYRT_ESTATE);
    EXPECT_EQ(self.reserve(1), PYRT_EFULL);
  };
  EXPECT_EQ(mine.reserve(2), PYRT_OK);
  EXPECT_EQ(asked, "low2 ");
}

TEST(Budget, AForkedChildIsRefused) {
  std::string asked;
  Budget budget(2);
  Client mine(budget.handle, "mine", 0, &asked);
  ASSERT_EQ(mine.reserve(1), PYRT_OK);
  const pid_t child = fork();
  if (child == 0) {
    const bool refused = mine.reserve(1) == PYRT_ESTATE &&
                         pyrt_budget_give_back(mine.handle, kUnit) == PYRT_ESTATE &&
                         pyrt_budget_unregister(mine.handle, 1) == PYRT_ESTATE &&
                         pyrt_budget_destroy(budget.handle) == PYRT_ESTATE;
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(budget.available(), 1u);
}

}  // namespace
