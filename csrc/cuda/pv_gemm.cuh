// The second product, O = P V, and the rows of the output.
#pragma once

#include "kernel_traits.cuh"
#include "tf32x3.cuh"

namespace sdattn::cuda::rows {

// Columns first .. first + 8 * C - 1 of the output; values: their planes.
template <class T, int C, int KIND, int TILES, int BLOCKS>
SDATTN_DEVICE void multiply_values(const Launch& l, const Head& head, const unsigned char* values, int m, int first,
                                   const uint32_t (&p)[TILES][BLOCKS][is_float<T> ? 8 : 4],
                                   const float (&after)[2 * TILES]) {
  const Attention& a = l.call.attention;
  const int lane = thread_index() & 31;
  float o[TILES][C][4];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int c = 0; c < C; ++c) o[tile][c][0] = o[tile][c][1] = o[tile][c][2] = o[tile][c][3] = 0.0f;
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (BLOCKS > 5 && 16 * block >= l.columns) break;
    if constexpr (is_float<T>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split of_row[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint32_t* x = &p[tile][block][4 * half];
          of_row[tile] = split(x[0], x[1], x[2], x[3]);
        }
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const auto* v = reinterpret_cast<const uint32_t*>(values + c * l.columns * 32 + (16 * block + 8 * half) * 32);
          const uint32_t b0 = v[(lane & 3) * 8 + (lane >> 2)], b1 = v[((lane & 3) + 4) * 8 + (lane >> 2)];
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            float(&x)[4] = o[tile][c];
            multiply_split(x[0], x[1], x[2], x[3], of_row[tile], b0, b1);
          }
        }
      }
    } else {
      uint32_t v[2 * C];
      const unsigned char* from = values + (16 * block + (lane & 15)) * 16;
      if constexpr (C == 1) {
        load_matrix_x2_trans(v, from);
      } else {
#pragma unroll
        for (int c = 0; c < C; c += 2) {
          uint32_t four[4];
          load_matrix_x4_trans(four, from + (c + (lane >> 4)) * l.columns * 16);
          v[2 * c] = four[0], v[2 * c + 1] = four[1], v[2 * c + 2] = four[2], v[2 * c + 3] = four[3];
        }
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          float(&x)[4] = o[tile][c];
          const uint32_t(&of)[4] = p[tile][block];
          mma_k16<T>(x[0], x[1], x[2], x[3], of[0], of[1], of[2], of[3], v[2 * c], v[2 * c + 1]);
        }
      }
    }
  }
  const int t = lane & 3;
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
            store8(to + 8 * c + 2 * t, uint2{static_cast<uint32_t>(float_bits(x)), static_cast<uint32_t>(float_bits(y))});
          }
        } else {
          uint32_t packed[C];
#pragma unroll
          for (int c = 0; c < C; ++c) packed[c] = pack2<T>(o[tile][c][2 * half] * factor, o[tile][c][2 * half + 1] * factor);
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

}  // namespace sdattn::cuda::rows
