// The first product, S = Q K^T: the query comes from global memory, the keys from their planes in shared memory.
#pragma once

#include "kernel_traits.cuh"
#include "tf32x3.cuh"

namespace sdattn::cuda::rows {

// A lane's share of a piece of two rows of the query, 8 apart: WORDS 4-byte units each.
template <int WORDS>
struct Share {
  uint32_t low[WORDS], high[WORDS];
};

template <class T, int KIND, int WORDS>
SDATTN_DEVICE void load_row(const Launch& l, const Head& head, int m, int first, uint32_t (&to)[WORDS]) {
  const Attention& a = l.call.attention;
  constexpr int each = 4 * WORDS / static_cast<int>(sizeof(T));
  const int element = first / static_cast<int>(sizeof(T)) + (thread_index() & 3) * each;
  const T* from = at<T>(a.query, head) + m * a.query.stride[2] + element;
  if (KIND < any_shape && m >= a.M) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) to[w] = 0;
    return;
  }
  if (KIND < any_shape || (m < a.M && l.whole_query && element + each <= a.D)) {
    if constexpr (WORDS == 4) {
      const uint4 x = load16(from);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else if constexpr (WORDS == 2) {
      const uint2 x = load8(from);
      to[0] = x.x, to[1] = x.y;
    } else {
      to[0] = load4(from);
    }
    return;
  }
  T elements[each];
#pragma unroll
  for (int e = 0; e < each; ++e) elements[e] = m < a.M && element + e < a.D ? from[e] : from_float<T>(0.0f);
#pragma unroll
  for (int w = 0; w < WORDS; ++w) to[w] = word_of<T>(&elements[w * (4 / sizeof(T))]);
}

template <class T, int KIND, int WORDS, int TILES>
SDATTN_DEVICE void load_share(const Launch& l, const Head& head, int m, int first, Share<WORDS> (&to)[TILES]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    load_row<T, KIND>(l, head, m + 16 * tile, first, to[tile].low);
    load_row<T, KIND>(l, head, m + 16 * tile + 8, first, to[tile].high);
  }
}

// A lane's share of eight keys of a plane, in one access.
template <int WORDS>
SDATTN_DEVICE void load_words(const unsigned char* from, uint32_t (&to)[WORDS]) {
  if constexpr (WORDS == 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (WORDS == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// c += 16 rows of a piece of the query times the same piece of eight keys; of_query: the rows split, for float32.
template <class T, int WORDS, int SPLITS>
SDATTN_DEVICE void multiply_tile(const Share<WORDS>& q, const Split (&of_query)[SPLITS], const uint32_t (&k)[WORDS],
                                 float& c0, float& c1, float& c2, float& c3) {
  if constexpr (WORDS == 1) {
    mma_k8<T>(c0, c1, c2, c3, q.low[0], q.high[0], k[0]);
  } else {
#pragma unroll
    for (int w = 0; w < WORDS; w += 2) {
      if constexpr (is_float<T>) {
        multiply_split(c0, c1, c2, c3, of_query[w / 2], k[w], k[w + 1]);
      } else {
        mma_k16<T>(c0, c1, c2, c3, q.low[w], q.high[w], q.low[w + 1], q.high[w + 1], k[w], k[w + 1]);
      }
    }
  }
}

// Adds the product of a piece of the query with the same piece of the keys; keys: the plane.
template <class T, int WORDS, int TILES, int VALUES>
SDATTN_DEVICE void multiply_keys(const Launch& l, const Share<WORDS> (&q)[TILES], const unsigned char* keys,
                                 float (&p)[2 * TILES][VALUES]) {
  const int lane = thread_index() & 31;
  constexpr int splits = is_float<T> ? WORDS / 2 : 1;
  Split of_query[TILES][splits];
  if constexpr (is_float<T>) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int w = 0; w < splits; ++w) {
        const Share<WORDS>& x = q[tile];
        of_query[tile][w] = split(x.low[2 * w], x.high[2 * w], x.low[2 * w + 1], x.high[2 * w + 1]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < VALUES / 2; ++j) {
    if (VALUES > 20 && 8 * j >= l.columns) break;
    uint32_t k[WORDS];
    const unsigned char* from = keys + (32 * j + lane) * 4 * WORDS;
    load_words(from, k);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float &c0 = p[2 * tile][2 * j], &c1 = p[2 * tile][2 * j + 1];
      float &c2 = p[2 * tile + 1][2 * j], &c3 = p[2 * tile + 1][2 * j + 1];
      multiply_tile<T>(q[tile], of_query[tile], k, c0, c1, c2, c3);
    }
  }
}

}  // namespace sdattn::cuda::rows
