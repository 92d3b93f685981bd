#include "ops/kernels.hpp"

namespace pyruntime::ops {
namespace {
#include "ops/vec_scalar.hpp"
//
#include "ops/kernels.inc.hpp"
}  // namespace

const Kernels kScalarKernels = {linear, rms_norm, silu_mul, combine, dot_run,   weighted_run,
                                max_of, exp_sum,  scale_by, sum_exp, exp_scaled};

}  // namespace pyruntime::ops
