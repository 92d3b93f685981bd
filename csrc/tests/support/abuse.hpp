// Bad input at every entry of the C ABI, as tables: null, zero, huge, misaligned, foreign, twice.
// Each row gives the documented status and a message. A function of a header that no row names is a
// failure, so that a new one comes with its rows.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "pyruntime/pyruntime.h"

namespace pyruntime::abuse {

inline constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;
inline constexpr size_t kHugeSize = std::numeric_limits<size_t>::max() / 2;

struct Row {
  const char* function;
  const char* what;
  std::function<pyrt_status()> call;
  pyrt_status expected = PYRT_EINVAL;
};

inline void run(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    SCOPED_TRACE(std::string(row.function) + ": " + row.what);
    const pyrt_status status = row.call();
    EXPECT_EQ(status, row.expected)
        << pyrt_status_name(status) << ", message: " << pyrt_last_error();
    if (status != PYRT_OK) {
      EXPECT_STRNE(pyrt_last_error(), "");
    }
  }
}

// For functions that give something else than a status: PYRT_OK when the answer is right.
inline pyrt_status ok_if(bool right) { return right ? PYRT_OK : PYRT_EINTERNAL; }

template <class T>
T* misaligned(T* pointer) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + 1);
}

// Looks for the header from the working directory upwards: build trees lie inside the source tree.
inline std::string read_header(const std::string& name) {
  for (auto at = std::filesystem::current_path();; at = at.parent_path()) {
    std::ifstream file(at / "csrc" / "include" / "pyruntime" / name);
    if (file) return {std::istreambuf_iterator<char>(file), {}};
    if (at == at.parent_path()) return {};
  }
}

inline void expect_covered(const std::string& header, const std::vector<Row>& rows) {
  const std::string text = read_header(header);
  ASSERT_FALSE(text.empty()) << "run this inside the source tree: no " << header;
  // Not <regex>, which this compiler cannot instantiate without warnings under sanitizers.
  for (size_t at = text.find("PYRT_API "); at != std::string::npos;
       at = text.find("PYRT_API ", at + 1)) {
    const size_t end = text.find('(', at);
    size_t begin = std::min(end, text.size());
    while (begin > at && (std::isalnum(text[begin - 1]) || text[begin - 1] == '_')) --begin;
    const std::string name = text.substr(begin, end - begin);
    if (name.rfind("pyrt_", 0) != 0) continue;  // the macro's own definition
    EXPECT_TRUE(
        std::any_of(rows.begin(), rows.end(), [&](const Row& r) { return name == r.function; }))
        << name << " of " << header << " has no row";
  }
}

}  // namespace pyruntime::abuse
