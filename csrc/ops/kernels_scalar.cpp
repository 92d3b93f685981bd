#include "base/half.hpp"
#include "ops/kernels.hpp"

namespace pyruntime::ops {
namespace {
#include "ops/vec_scalar.hpp"
//
#include "ops/kernels.inc.hpp"
}  // namespace

const Kernels kScalarKernels = {linear,
                                rms_norm,
                                silu_mul,
                                combine,
                                dot_run<float>,
                                dot_run<uint16_t>,
                                weighted_run<float>,
                                weighted_run<uint16_t>,
                                max_of,
                                exp_sum,
                                scale_by,
                                sum_exp,
                                exp_scaled};

}  // namespace pyruntime::ops
