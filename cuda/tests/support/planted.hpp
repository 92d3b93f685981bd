// Planted faults: programs (planted_<core>.cpp) with one fault per name, which a sanitizer or the
// shim must find. They run as processes of their own, so that a report ends them and not the test.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace pyruntime::planted {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddress = true, kThread = false;
#elif defined(__SANITIZE_THREAD__)
inline constexpr bool kAddress = false, kThread = true;
#else
inline constexpr bool kAddress = false, kThread = false;
#endif

struct Outcome {
  bool failed;  // by an exit status that is not 0, or a signal
  std::string output;
  bool says(const char* text) const { return output.find(text) != std::string::npos; }
};

inline Outcome run(const std::string& program, const std::string& fault) {
  int ends[2];
  if (pipe(ends) != 0) return {false, "no pipe"};
  const std::string path =
      std::filesystem::read_symlink("/proc/self/exe").replace_filename(program);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1);
    dup2(ends[1], 2);
    close(ends[0]);
    close(ends[1]);
    // The first report ends the process; symbols are not needed and cost seconds.
    setenv("TSAN_OPTIONS", "halt_on_error=1:symbolize=0:report_thread_leaks=0:atexit_sleep_ms=0",
           1);
    setenv("ASAN_OPTIONS", "symbolize=0:detect_leaks=0", 1);
    execl(path.c_str(), path.c_str(), fault.c_str(), nullptr);
    _exit(0);
  }
  close(ends[1]);
  Outcome outcome{};
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
    outcome.output.append(buffer, static_cast<size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  if (child > 0) waitpid(child, &status, 0);
  outcome.failed = child > 0 && status != 0;
  return outcome;
}

}  // namespace pyruntime::planted
