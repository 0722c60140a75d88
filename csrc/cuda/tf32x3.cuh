// 3xTF32: products of float32 to float32's accuracy by three of TF32.
#pragma once

#include "machine.h"

namespace sdattn::cuda::rows {

// Four float32 of a factor, each as the sum of two TF32.
struct Split {
  uint32_t high[4], low[4];
};

SDATTN_DEVICE Split split(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
  const uint32_t a[4] = {a0, a1, a2, a3};
  Split s;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s.high[i] = to_tf32(bits_float(a[i]));
    s.low[i] = to_tf32(bits_float(a[i]) - bits_float(s.high[i]));
  }
  return s;
}

// A product of float32 to float32's accuracy by three of TF32.
SDATTN_DEVICE void multiply_split(float& c0, float& c1, float& c2, float& c3, const Split& a, uint32_t b0,
                                  uint32_t b1) {
  const uint32_t h0 = to_tf32(bits_float(b0)), h1 = to_tf32(bits_float(b1));
  const uint32_t l0 = to_tf32(bits_float(b0) - bits_float(h0)), l1 = to_tf32(bits_float(b1) - bits_float(h1));
  mma_tf32(c0, c1, c2, c3, a.low[0], a.low[1], a.low[2], a.low[3], h0, h1);
  mma_tf32(c0, c1, c2, c3, a.high[0], a.high[1], a.high[2], a.high[3], l0, l1);
  mma_tf32(c0, c1, c2, c3, a.high[0], a.high[1], a.high[2], a.high[3], h0, h1);
}

}  // namespace sdattn::cuda::rows
