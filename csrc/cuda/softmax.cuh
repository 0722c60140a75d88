// The bias of a logit.
#pragma once

#include "kernel_traits.cuh"

namespace sdattn::cuda::rows {

// Out of line: it stands at every value of a row.
SDATTN_APART float bias_at(const void* bias, DType dtype, int64_t place) {
  if (dtype == float32) return static_cast<const float*>(bias)[place];
  if (dtype == float16) return to_float(static_cast<const half_t*>(bias)[place]);
  return to_float(static_cast<const bfloat16_t*>(bias)[place]);
}

}  // namespace sdattn::cuda::rows
