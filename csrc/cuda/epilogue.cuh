// The epilogue: the rows of the output from registers to global memory, and those of a head that gives zeros.
#pragma once

#include "kernel_traits.cuh"

namespace sdattn::cuda::rows {

// Columns first .. first + 8 * C - 1 of a warp's rows of the output, this lane's from m on, times each row's `after`.
template <class T, int C, int KIND, int TILES>
SDATTN_DEVICE void store_output(const Launch& l, const Head& head, int m, int first, const float (&o)[TILES][C][4],
                                const float (&after)[2 * TILES]) {
  const Attention& a = l.call.attention;
  const int t = thread_index() & 3;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m + 16 * tile + 8 * half;
      if (row >= a.M) continue;
      T* to = at<T>(a.out, head) + row * a.out.stride[2] + first;
      const float factor = after[2 * tile + half];
      if (KIND < any_shape || (l.whole_out && first + 8 * C <= a.Dv)) {
        if constexpr (is_float<T>) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const float x = o[tile][c][2 * half] * factor, y = o[tile][c][2 * half + 1] * factor;
            store8(to + 8 * c + 2 * t,
                   uint2{static_cast<uint32_t>(float_bits(x)), static_cast<uint32_t>(float_bits(y))});
          }
        } else {
          uint32_t packed[C];
#pragma unroll
          for (int c = 0; c < C; ++c) {
            packed[c] = pack2<T>(o[tile][c][2 * half] * factor, o[tile][c][2 * half + 1] * factor);
          }
          if constexpr (C == 4) store16(to + 8 * t, uint4{packed[0], packed[1], packed[2], packed[3]});
          if constexpr (C == 2) store8(to + 4 * t, uint2{packed[0], packed[1]});
          if constexpr (C == 1) store4(to + 2 * t, packed[0]);
        }
        continue;
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = is_float<T> ? 8 * c + 2 * t + e : 2 * C * t + 2 * c + e;
          if (first + d < a.Dv) to[d] = from_float<T>(o[tile][c][2 * half + e] * factor);
        }
      }
    }
  }
}

// A head that gives zeros, and so do its maps and bits: `count` rows from m on.
template <class T, int KIND>
SDATTN_DEVICE void zero_head(const Launch& l, const Head& head, int64_t m, int64_t count) {
  const Attention& a = l.call.attention;
  count = m + count < a.M ? count : a.M - m;
  const int64_t bh = head.b * a.H + head.h, tokens = a.program.capture_count, words = (a.N + 31) / 32;
#pragma unroll 1
  for (int64_t i = thread_index(); i < count * a.Dv; i += threads_of_block()) {
    at<T>(a.out, head)[(m + i / a.Dv) * a.out.stride[2] + i % a.Dv] = from_float<T>(0.0f);
  }
  if constexpr (KIND == bare) return;
  const bool first_of_mean = l.mean && head.h == 0;
#pragma unroll 1
  for (int64_t i = thread_index(); a.maps != nullptr && (!l.mean || first_of_mean) && i < count * tokens;
       i += threads_of_block()) {
    a.maps[((l.mean ? head.b : bh) * tokens + i / count) * a.M + m + i % count] = 0.0f;
  }
#pragma unroll 1
  for (int64_t i = thread_index(); a.bits != nullptr && i < count * words; i += threads_of_block()) {
    a.bits[(bh * a.M + m) * words + i] = 0;
  }
}

}  // namespace sdattn::cuda::rows
