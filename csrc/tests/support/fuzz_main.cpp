// Drives an LLVMFuzzerTestOneInput where there is no libFuzzer: every corpus file as it is, then
// mutations of them, the same ones in the same order everywhere.
//
//   fuzz_x [--runs=N] [--seconds=S] [--seed=K] [--only=R] [CORPUS_DIRECTORY_OR_FILE ...]
//
// Run r depends on the seed, r and the corpus alone; --seconds only cuts the sequence off, so that
// slow sanitizers do not make slow tests. A death reports its r, which --only replays; the input
// itself goes to ./fuzz-crash.bin. Under clang the same target builds with -fsanitize=fuzzer.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" __attribute__((weak)) int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<uint8_t>;
constexpr size_t kMaxBytes = 4096;

// What a dying process reports.
long current_run = -1;
uint64_t current_seed = 0;
Bytes current_input;

void report() {
  std::fprintf(stderr, "fuzz: died in run %ld (--seed=%llu --only=%ld), %zu bytes\n", current_run,
               static_cast<unsigned long long>(current_seed), current_run, current_input.size());
  if (FILE* file = std::fopen("fuzz-crash.bin", "wb")) {
    std::fwrite(current_input.data(), 1, current_input.size(), file);
    std::fclose(file);
  }
}

void on_signal(int number) {
  report();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// Directories are listed in no order: sorted, so that run r is the same input everywhere.
std::vector<Bytes> load(const std::vector<std::string>& places) {
  std::vector<std::filesystem::path> files;
  for (const std::filesystem::path place : places) {
    if (!std::filesystem::is_directory(place)) {
      files.push_back(place);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(place)) {
      if (entry.is_regular_file()) files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<Bytes> corpus;
  for (const auto& file : files) corpus.push_back(read(file));
  return corpus;
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  Bytes make(const std::vector<Bytes>& corpus) {
    Bytes input = corpus.empty() ? Bytes() : corpus[below(corpus.size())];
    if (input.empty() || below(8) == 0) {
      input.resize(below(257));
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(random_());
    }
    if (corpus.size() > 1 && below(4) == 0) {
      const Bytes& other = corpus[below(corpus.size())];
      input.resize(below(input.size() + 1));
      input.insert(input.end(), other.begin() + static_cast<ptrdiff_t>(below(other.size() + 1)),
                   other.end());
    }
    for (uint64_t changes = 1 + below(6); changes > 0; --changes) change(input);
    if (input.size() > kMaxBytes) input.resize(kMaxBytes);
    return input;
  }

 private:
  // Not std::uniform_int_distribution, whose sequence differs between libraries.
  uint64_t below(uint64_t n) { return random_() % n; }

  void change(Bytes& input) {
    const size_t at = below(input.size() + 1);
    const auto here = input.begin() + static_cast<ptrdiff_t>(at);
    const size_t left = input.size() - at;
    switch (below(6)) {
      case 0:
        if (left > 0) *here ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (left > 0) *here = static_cast<uint8_t>(random_());
        break;
      case 2:
        input.insert(here, 1 + below(8), static_cast<uint8_t>(random_()));
        break;
      case 3:
        input.erase(here, here + static_cast<ptrdiff_t>(std::min<size_t>(left, 1 + below(8))));
        break;
      case 4:
        input.resize(at);
        break;
      case 5: {  // a number that tends to be a limit
        static constexpr uint64_t kLimits[] = {0,          1,          0x7f,       0x80,
                                               0xff,       0x7fff,     0x8000,     0xffff,
                                               0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
                                               1ull << 62, 1ull << 63, ~0ull,      ~0ull >> 1};
        const uint64_t value = kLimits[below(std::size(kLimits))] + below(3) - 1;
        const size_t bytes = std::min<size_t>(left, size_t{1} << below(4));
        if (bytes > 0) std::memcpy(input.data() + at, &value, bytes);
        break;
      }
    }
  }

  std::mt19937_64 random_;
};

void run(long number, uint64_t seed, const Bytes& input) {
  current_run = number;
  current_seed = seed;
  current_input = input;
  // A heap block of the exact size: reading past the input is found.
  const Bytes exact(current_input);
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (LLVMFuzzerInitialize != nullptr) LLVMFuzzerInitialize(&argc, &argv);
  long runs = 1'000'000, only = -1;
  double seconds = 5;
  uint64_t seed = 1;
  std::vector<std::string> places;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](const char* name) -> const char* {
      const size_t length = std::strlen(name);
      return argument.compare(0, length, name) == 0 ? argument.c_str() + length : nullptr;
    };
    if (const char* v = value("--runs=")) {
      runs = std::atol(v);
    } else if (const char* v = value("--seconds=")) {
      seconds = std::atof(v);
    } else if (const char* v = value("--seed=")) {
      seed = std::strtoull(v, nullptr, 10);
    } else if (const char* v = value("--only=")) {
      only = std::atol(v);
    } else {
      places.push_back(argument);
    }
  }
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(report);
  } else {
    for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(number, on_signal);
  }
  std::signal(SIGABRT, on_signal);

  const std::vector<Bytes> corpus = load(places);
  const auto planned = static_cast<long>(corpus.size()) + runs;
  const auto start = std::chrono::steady_clock::now();
  long done = 0;
  for (long r = only < 0 ? 0 : only; r < planned; ++r) {
    const auto index = static_cast<size_t>(r);
    run(r, seed,
        index < corpus.size() ? corpus[index]
                              : Mutator(seed * 0x9e3779b97f4a7c15 + index).make(corpus));
    ++done;
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    if (only >= 0 || (index >= corpus.size() && spent.count() > seconds)) break;
  }
  std::printf("fuzz: %ld runs, %zu of them the corpus\n", done, corpus.size());
  return 0;
}
