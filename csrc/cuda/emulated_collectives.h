// What a warp of the emulated machine does together, as meetings of its lanes: shuffles, votes, matrix products and
// ldmatrix.
#pragma once

#include <cstring>

#include "emulated_numbers.h"
#include "emulated_simt.h"

namespace sdattn::cuda::emulated {

// Matrices. (row, column) of a fragment's parts by lane: g = lane / 4, t = lane % 4.

typedef float Row __attribute__((vector_size(32), aligned(4)));  // of the 8 columns of c

// c (16, 8) += a (16, K) b (K, 8): exact products, added in the order of k, in float32.
template <int K>
inline void multiply(const float (&a)[16][K], const float (&b)[K][8], Lane* lanes) {
  for (int m = 0; m < 16; ++m) {
    alignas(32) float row[8];
    for (int t = 0; t < 4; ++t) {
      const Lane& lane = lanes[4 * (m % 8) + t];
      row[2 * t] = *lane.c[m / 8 * 2];
      row[2 * t + 1] = *lane.c[m / 8 * 2 + 1];
    }
    Row sum;
    std::memcpy(&sum, row, sizeof sum);
    for (int k = 0; k < K; ++k) {
      Row of_b;
      std::memcpy(&of_b, b[k], sizeof of_b);
      sum += a[m][k] * of_b;
    }
    std::memcpy(row, &sum, sizeof sum);
    for (int t = 0; t < 4; ++t) {
      const Lane& lane = lanes[4 * (m % 8) + t];
      *lane.c[m / 8 * 2] = row[2 * t];
      *lane.c[m / 8 * 2 + 1] = row[2 * t + 1];
    }
  }
}

// K = 16 or 8, of 16-bit numbers, two in a register.
template <int K, float (*to_float)(uint16_t)>
inline void multiply_halves(Lane* lanes) {
  float a[16][K], b[K][8];
  for (int i = 0; i < warp_size; ++i) {
    const int g = i / 4, t = i % 4;
    const uint32_t* in = lanes[i].in;
    for (int part = 0; part < K / 8; ++part) {
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * part + 2 * t + e;
        a[g][k] = to_float(static_cast<uint16_t>(in[2 * part] >> (16 * e)));
        a[g + 8][k] = to_float(static_cast<uint16_t>(in[2 * part + 1] >> (16 * e)));
        b[k][g] = to_float(static_cast<uint16_t>(in[4 + part] >> (16 * e)));
      }
    }
  }
  multiply<K>(a, b, lanes);
}

inline void multiply_tf32(Lane* lanes) {
  float a[16][8], b[8][8];
  for (int i = 0; i < warp_size; ++i) {
    const int g = i / 4, t = i % 4;
    const uint32_t* in = lanes[i].in;
    for (int part = 0; part < 2; ++part) {
      a[g][4 * part + t] = tf32_to_float(in[2 * part]);
      a[g + 8][4 * part + t] = tf32_to_float(in[2 * part + 1]);
      b[4 * part + t][g] = tf32_to_float(in[4 + part]);
    }
  }
  multiply<8>(a, b, lanes);
}

template <int MATRICES>
inline void load_matrices(Lane* lanes) {
  for (int i = 0; i < warp_size; ++i) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const auto* row = static_cast<const unsigned char*>(lanes[8 * matrix + 2 * (i % 4) + e].address);
        std::memcpy(&pair[e], row + 2 * (i / 4), 2);
      }
      lanes[i].out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

inline void warp_meets(Lane*) {}

inline void shuffle(Lane* lanes) {
  for (int i = 0; i < warp_size; ++i) lanes[i].out[0] = lanes[i ^ (lanes[i].in[1] & 31)].in[0];
}

inline void vote(Lane* lanes) {
  uint32_t votes = 0;
  for (int i = 0; i < warp_size; ++i) votes |= lanes[i].in[0] << i;
  for (int i = 0; i < warp_size; ++i) lanes[i].out[0] = votes;
}

inline constexpr Meeting of_warp{"sync_warp", warp_meets};
inline constexpr Meeting of_shuffle{"shuffle_xor", shuffle};
inline constexpr Meeting of_ballot{"ballot", vote}, of_any{"any", vote}, of_all{"all", vote};
inline constexpr Meeting of_halves_16{"mma_k16<half_t>", multiply_halves<16, half_to_float>};
inline constexpr Meeting of_halves_8{"mma_k8<half_t>", multiply_halves<8, half_to_float>};
inline constexpr Meeting of_bfloats_16{"mma_k16<bfloat16_t>", multiply_halves<16, bfloat16_to_float>};
inline constexpr Meeting of_bfloats_8{"mma_k8<bfloat16_t>", multiply_halves<8, bfloat16_to_float>};
inline constexpr Meeting of_tf32{"mma_tf32", multiply_tf32};
inline constexpr Meeting of_matrices_4{"load_matrix_x4_trans", load_matrices<4>};
inline constexpr Meeting of_matrices_2{"load_matrix_x2_trans", load_matrices<2>};

inline uint32_t exchange(const Meeting& what, uint32_t x, int other, int line) {
  Lane& lane = *machine.lane;
  lane.in[0] = x;
  lane.in[1] = static_cast<uint32_t>(other);
  meet(what, line);
  return lane.out[0];
}

// Registers are set by place: a0 a1 a2 a3 b0 b1.
inline void product(const Meeting& what, int line, float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1,
                    uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Lane& lane = *machine.lane;
  float c[4] = {c0, c1, c2, c3};
  const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 4; ++i) lane.c[i] = &c[i];
  std::memcpy(lane.in, in, sizeof in);
  meet(what, line);
  c0 = c[0];
  c1 = c[1];
  c2 = c[2];
  c3 = c[3];
}

inline void load_matrix(const Meeting& what, int matrices, uint32_t* r, const void* row, int line) {
  Lane& lane = *machine.lane;
  if (lane.index % warp_size < 8 * matrices) {
    check_aligned(row, 16, what.name, line);
    check_shared(row, 16, what.name, line);
  }
  lane.address = row;
  meet(what, line);
  for (int i = 0; i < matrices; ++i) r[i] = lane.out[i];
}

}  // namespace sdattn::cuda::emulated
