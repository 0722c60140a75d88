// Step 1 on one row, which is whole in the registers of a quad: bias and softmax.
#pragma once

#include "kernel_traits.cuh"
#include "select.cuh"

namespace sdattn::cuda::rows {

// Out of line: it stands at every value of a row.
SDATTN_APART float bias_at(const void* bias, DType dtype, int64_t place) {
  if (dtype == float32) return static_cast<const float*>(bias)[place];
  if (dtype == float16) return to_float(static_cast<const half_t*>(bias)[place]);
  return to_float(static_cast<const bfloat16_t*>(bias)[place]);
}

// The logits in units of ln 2, with their bias.
template <int VALUES>
SDATTN_DEVICE void add_bias(const Launch& l, const Head& head, const unsigned char* shared, int row,
                            float (&x)[VALUES]) {
  const Attention& a = l.call.attention;
  const auto* order = reinterpret_cast<const int16_t*>(shared + l.order);
  const int64_t here = head.b * a.bias.stride[0] + head.h * a.bias.stride[1] + row * a.bias.stride[2];
  const bool biased = a.bias.data != nullptr && row < a.M;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int column = column_of(i, thread_index() & 31);
    if (column >= a.N) continue;
    x[i] *= l.scale;
    if (!biased) continue;
    in_order();
    const float more = bias_at(a.bias.data, a.bias_dtype, here + order[column] * a.bias.stride[3]);
    x[i] = fmaf(more, 1.44269504088896340736f, x[i]);
  }
}

// x becomes exp2 of its distance to the row's largest entry; the sum of these over the row, and `factor`, its inverse.
template <int KIND, int VALUES>
SDATTN_DEVICE float softmax(const Launch& l, float (&x)[VALUES], float& factor) {
  float most = x[0], total = 0.0f;
#pragma unroll
  for (int i = 1; i < VALUES; ++i) most = larger(most, x[i]);
  most = quad_max(most);
  // In units of ln 2, for exp2. Where there may be a bias, logits have the scale already.
  const float scale = KIND == bare ? l.scale : 1.0f;
  most = most == bits_float(0xff800000) ? 0.0f : most * scale;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    x[i] = exp2_fast(KIND == bare ? fmaf(x[i], scale, -most) : x[i] - most);
    total += x[i];
  }
  total = quad_sum(total);
  factor = total == 0.0f ? 0.0f : reciprocal(total);
  return total;
}

}  // namespace sdattn::cuda::rows
