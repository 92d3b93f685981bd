// The filter's launchers in libpyruntime_cuda.so; the arguments are checked by csrc/capi.
#pragma once

#include "filter/layout.hpp"

extern "C" {
// `left` is scratch of n + 1 words. Statuses as in core.hpp.
int pyrt_cuda_filter_insert(const pyruntime::filter::View* view, int bits, int slots,
                            const uint64_t* keys, uint64_t n, uint8_t* status, uint64_t* left,
                            void* stream) noexcept;
int pyrt_cuda_filter_contains(const pyruntime::filter::View* view, int bits, int slots,
                              const uint64_t* keys, uint64_t n, uint8_t* out,
                              void* stream) noexcept;
int pyrt_cuda_filter_remove(const pyruntime::filter::View* view, int bits, int slots,
                            const uint64_t* keys, uint64_t n, uint8_t* status,
                            void* stream) noexcept;
}
