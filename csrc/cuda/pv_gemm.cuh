// The second product, O = P V: the values come from their planes in shared memory.
#pragma once

#include "epilogue.cuh"
#include "kernel_traits.cuh"
#include "tf32x3.cuh"

namespace sdattn::cuda::rows {

// Probabilities in the layout of the first factor of mma.sync, rounded to T.
template <class T, int TILES, int BLOCKS>
SDATTN_DEVICE void pack_rows(const float (&p)[2 * TILES][4 * BLOCKS],
                             uint32_t (&packed)[TILES][BLOCKS][is_float<T> ? 8 : 4]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const float(&low)[4 * BLOCKS] = p[2 * tile], (&high)[4 * BLOCKS] = p[2 * tile + 1];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 4 * block + 2 * half;
        if constexpr (is_float<T>) {
          uint32_t* to = &packed[tile][block][4 * half];
          to[0] = float_bits(low[i]), to[1] = float_bits(high[i]);
          to[2] = float_bits(low[i + 1]), to[3] = float_bits(high[i + 1]);
        } else {
          packed[tile][block][2 * half] = pack2<T>(low[i], low[i + 1]);
          packed[tile][block][2 * half + 1] = pack2<T>(high[i], high[i + 1]);
        }
      }
    }
  }
}

// Fragments of 16 keys of C planes of 16-bit values, by ldmatrix; from: this lane's row of the first plane.
template <int C>
SDATTN_DEVICE void load_values_transposed(const Launch& l, const unsigned char* from, int lane, uint32_t (&v)[2 * C]) {
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
}

// o += p times the values of block `block` of 16 keys, by 3xTF32.
template <int C, int TILES, int BLOCKS>
SDATTN_DEVICE void multiply_block_tf32(const Launch& l, const unsigned char* values, int block, int lane,
                                       const uint32_t (&p)[TILES][BLOCKS][8], float (&o)[TILES][C][4]) {
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
}

// The same for 16-bit numbers.
template <class T, int C, int TILES, int BLOCKS>
SDATTN_DEVICE void multiply_block(const Launch& l, const unsigned char* values, int block, int lane,
                                  const uint32_t (&p)[TILES][BLOCKS][4], float (&o)[TILES][C][4]) {
  uint32_t v[2 * C];
  load_values_transposed<C>(l, values + (16 * block + (lane & 15)) * 16, lane, v);
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

// Columns first .. first + 8 * C - 1 of the output, stored; values: their planes.
template <class T, int C, int KIND, int TILES, int BLOCKS>
SDATTN_DEVICE void multiply_values(const Launch& l, const Head& head, const unsigned char* values, int m, int first,
                                   const uint32_t (&p)[TILES][BLOCKS][is_float<T> ? 8 : 4],
                                   const float (&after)[2 * TILES]) {
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
      multiply_block_tf32(l, values, block, lane, p, o);
    } else {
      multiply_block<T>(l, values, block, lane, p, o);
    }
  }
  store_output<T, C, KIND>(l, head, m, first, o, after);
}

}  // namespace sdattn::cuda::rows
