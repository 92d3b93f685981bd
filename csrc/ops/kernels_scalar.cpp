#include "base/half.hpp"
#include "ops/kernels.hpp"

namespace pyruntime::ops {
namespace {
#include "ops/vec_scalar.hpp"
//
#include "ops/kernels.inc.hpp"
}  // namespace

const Kernels kScalarKernels = kTable;

}  // namespace pyruntime::ops
