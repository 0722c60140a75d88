// The 16 * TILES rows of a warp from their logits to their output: both products, and the row program between them.
// Keys and values are in shared memory, or pass through it piece by piece.
#pragma once

#include "capture.cuh"
#include "pv_gemm.cuh"
#include "qk_gemm.cuh"
#include "row_program.cuh"
#include "softmax.cuh"
#include "staging.cuh"

namespace sdattn::cuda::rows {

template <class T, int BLOCKS, int A, int TILES, int KIND>
struct Warp {
  static constexpr int values = 4 * BLOCKS;  // of a row, in one lane

  const Launch& l;
  const Head& head;
  unsigned char* shared;
  int m;  // this lane's first row; it has m, m + 8, m + 16, ...
  float p[2 * TILES][values];
  float after[2 * TILES];

  SDATTN_DEVICE void logits(Share<4> (&first)[TILES]) {
    const Attention& a = l.call.attention;
    // The keys beyond the last are zeros, so what their columns start with stays.
#pragma unroll
    for (int i = 0; i < values; ++i) {
      const bool inside = (KIND == bare && i < 16) || column_of(i, thread_index() & 31) < a.N;
#pragma unroll
      for (int r = 0; r < 2 * TILES; ++r) p[r][i] = inside ? 0.0f : bits_float(0xff800000);
    }
    const int bytes = l.key_bytes;
    const unsigned char* keys = shared;
    Share<4> next[TILES];
    int done = 0;
    if constexpr (KIND >= any_shape) {
      // One width of everything: here the code is to be short.
      for (; done < bytes; done += 32) {
        Share<2> q[TILES];
        load_share<T, KIND>(l, head, m, done, q);
        bring_keys(done, 32);
        multiply_keys<T>(l, q, keys, p);
        if (!l.stream) keys += 32 * l.columns;
      }
      return;
    }
    for (; done + 64 <= bytes; done += 64) {
      if (done + 128 <= bytes) load_share<T, KIND>(l, head, m, done + 64, next);
      multiply_keys<T>(l, first, keys, p);
      keys += 64 * l.columns;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) first[tile] = next[tile];
    }
    if ((bytes & 32) != 0) {
      Share<2> q[TILES];
      load_share<T, KIND>(l, head, m, done, q);
      multiply_keys<T>(l, q, keys, p);
      keys += 32 * l.columns;
      done += 32;
    }
    if constexpr (!is_float<T>) {
      if ((bytes & 16) != 0) {
        Share<1> q[TILES];
        load_share<T, KIND>(l, head, m, done, q);
        multiply_keys<T>(l, q, keys, p);
      }
    }
  }

  // Row by row. Where speed is not all, one copy of the code serves them in turn.
  SDATTN_DEVICE void rows() {
    constexpr bool rolled = KIND > bare || BLOCKS > 5;
#pragma unroll(rolled ? 1 : 2 * TILES)
    for (int r = 0; r < 2 * TILES; ++r) {
      row(p[rolled ? 0 : r], after[rolled ? 0 : r], m + 8 * r);
      if constexpr (rolled) rotate();
    }
  }

  SDATTN_DEVICE void output() {
    const Attention& a = l.call.attention;
    uint32_t packed[TILES][BLOCKS][is_float<T> ? 8 : 4];
    pack_rows<T>(p, packed);
    const int planes = static_cast<int>(a.Dv + 7) / 8;
    const unsigned char* from = shared + l.values;
    int plane = 0;
    if constexpr (KIND >= any_shape) {
      for (; plane < planes; ++plane) from = group<1>(from, plane, packed);
      return;
    }
    for (; plane + 4 <= planes; plane += 4) from = group<4>(from, plane, packed);
    if ((planes & 2) != 0) from = group<2>(from, plane, packed), plane += 2;
    if ((planes & 1) != 0) group<1>(from, plane, packed);
  }

 private:
  template <int C>
  SDATTN_DEVICE const unsigned char* group(const unsigned char* values, int plane,
                                           const uint32_t (&packed)[TILES][BLOCKS][is_float<T> ? 8 : 4]) {
    if (KIND >= any_shape && l.stream) {
      sync_block();
      load_values<T, C, KIND>(l, head, shared, shared + l.values, 8 * plane);
      arrive();
    }
    multiply_values<T, C, KIND>(l, head, values, m, 8 * plane, packed, after);
    return KIND >= any_shape && l.stream ? values : values + C * value_plane<T> * l.columns;
  }

  SDATTN_DEVICE void bring_keys(int first, int width) {
    if (KIND < any_shape || !l.stream) return;
    sync_block();
    load_keys<T, KIND>(l, head, shared, shared, first, width);
    arrive();
  }

  SDATTN_DEVICE void arrive() {
    commit_copies();
    wait_copies<0>();
    sync_block();
  }

  // Step 1, steps 2 to 6, the map and the bits.
  SDATTN_DEVICE void row(float (&x)[values], float& factor, int row) {
    const Attention& a = l.call.attention;
    if constexpr (KIND >= equipped) add_bias(l, head, shared, row, x);
    const float total = softmax<KIND>(l, x, factor);
    const auto decide = [&] {
      if (numbers().content == 0) return;
      row_program<A, KIND>(l, shared, head.b, head.h, row, total, x, factor);
    };
    if constexpr (KIND == bare) {
      decide();
      return;
    }
#pragma unroll 1
    for (int final = 0; final < 2; ++final) {
      if (final != 0) decide();
      if (a.maps != nullptr && a.program.capture_final == (final != 0) && row < a.M) map(x, factor, row);
    }
    if (a.bits != nullptr) {
      int32_t* to = a.bits + ((head.b * a.H + head.h) * a.M + row) * ((a.N + 31) / 32);
      store_bits(l, shared, x, row < a.M, to);
    }
  }

  SDATTN_DEVICE const Numbers& numbers() const { return *reinterpret_cast<const Numbers*>(shared + l.numbers); }

  SDATTN_DEVICE void rotate() {
#pragma unroll
    for (int r = 0; r + 1 < 2 * TILES; ++r) {
#pragma unroll
      for (int i = 0; i < values; ++i) {
        const float x = p[r][i];
        p[r][i] = p[r + 1][i];
        p[r + 1][i] = x;
      }
      const float x = after[r];
      after[r] = after[r + 1];
      after[r + 1] = x;
    }
  }

  SDATTN_DEVICE void map(const float (&x)[values], float factor, int row) {
    const Attention& a = l.call.attention;
    const int64_t which = l.mean ? head.b : head.b * a.H + head.h;
    float* to = a.maps + which * a.program.capture_count * a.M + row;
    // Heads come in order, and this block alone has these rows: the same sum every time.
    const float share = numbers().share;
    if (l.mean) factor = share > 0.0f ? factor * share : 0.0f;
    if (!l.mean || head.h == 0 || share > 0.0f) store_map(l, shared, x, factor, to, l.mean && head.h > 0);
  }
};

}  // namespace sdattn::cuda::rows
