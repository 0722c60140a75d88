// The k-th largest entry of a row, exactly and with multiplicity: docs/design.md, "Step 4: salience dropout".
//
// In the layout of a tensor-core product a row lies in the four lanes of a quad. Small k: each lane sorts what it has
// by a network, keeping the largest 4, 8 or 16, and two bitonic merges across the quad leave the row's in every lane.
// Counted for 80 columns in one row: 16 kept take 63 + 5 + 32 comparators in a lane and 2 x (16 shuffles + 16 maxima +
// 32 comparators), 20 instructions a column, about what products, softmax and output take together; 4 of 16 columns
// take 10 + 2 x 16, or 2 a column of 80. Beyond, bisection on the bits of floats >= 0, which order as integers do; it
// ends as soon as every row of the warp has exactly k entries above its bound, after 8 to 12 of at most 31 rounds on
// rows without ties. Counting ranks, radix digits and a row a thread were all dearer.
#pragma once

#include "machine.h"

namespace sdattn::cuda {

SDATTN_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
SDATTN_DEVICE float smaller(float a, float b) { return fminf(a, b); }

SDATTN_DEVICE float quad_max(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}

SDATTN_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Descending.
SDATTN_DEVICE void order(float& a, float& b) {
  const float most = larger(a, b);
  b = smaller(a, b);
  a = most;
}

// Batcher's odd-even merge sort, descending. SIZE a power of two. By templates, for loops in loops may not be unrolled,
// and then the list is in memory.
template <int SIZE, int P = 1, int K = P>
SDATTN_DEVICE void sort(float (&x)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE - K; ++i) {
    const bool starts = i % (2 * K) >= K % P && (i - K % P) % (2 * K) < K;
    if (starts && i / (2 * P) == (i + K) / (2 * P)) order(x[i], x[i + K]);
  }
  if constexpr (K > 1) {
    sort<SIZE, P, K / 2>(x);
  } else if constexpr (2 * P < SIZE) {
    sort<SIZE, 2 * P>(x);
  }
}

template <int SIZE, int K = SIZE / 2>
SDATTN_DEVICE void sort_bitonic(float (&x)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    if ((i & K) == 0) order(x[i], x[i + K]);
  }
  if constexpr (K > 1) sort_bitonic<SIZE, K / 2>(x);
}

// The largest KEPT entries of the quad's rows, descending, in every lane.
template <int KEPT, int SIZE, class X>
SDATTN_DEVICE void largest_of_row(const X& x, float (&kept)[KEPT]) {
  static_assert(SIZE >= KEPT && SIZE % 4 == 0 && KEPT % 4 == 0, "whole lists");
#pragma unroll
  for (int i = 0; i < KEPT; ++i) kept[i] = x[i];
  sort(kept);
  constexpr int step = (SIZE - KEPT) % KEPT == 0 ? KEPT : 4;
#pragma unroll
  for (int first = KEPT; first < SIZE; first += step) {
    float more[step];
#pragma unroll
    for (int i = 0; i < step; ++i) more[i] = x[first + i];
    sort(more);
#pragma unroll
    for (int i = 0; i < step; ++i) kept[KEPT - 1 - i] = larger(kept[KEPT - 1 - i], more[i]);
    sort_bitonic(kept);
  }
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    float other[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; ++i) other[i] = shuffle_xor(kept[KEPT - 1 - i], lanes);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = larger(kept[i], other[i]);
    sort_bitonic(kept);
  }
}

template <int KEPT, int SIZE, class X>
SDATTN_DEVICE float kth_by_lists(const X& x, int k) {
  float kept[KEPT];
  largest_of_row<KEPT, SIZE>(x, kept);
  float kth = kept[0];
#pragma unroll
  for (int i = 1; i < KEPT; ++i) kth = k > i ? kept[i] : kth;
  return kth;
}

template <int SIZE, class X>
SDATTN_DEVICE float kth_by_bisection(const X& x, int k) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < SIZE; ++i) most = larger(most, x[i]);
  // At least k entries are >= low, fewer than k are >= high.
  int low = 0, high = float_bits(quad_max(most)) + 1;
  bool found = high <= 1;
  while (any(!found)) {
    const int middle = low + (high - low) / 2;
    int count = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) count += float_bits(x[i]) >= middle ? 1 : 0;
    count += shuffle_xor(count, 1);
    count += shuffle_xor(count, 2);
    if (!found) {
      (count >= k ? low : high) = middle;
      found = count == k || high - low <= 1;
    }
  }
  float least = most;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) least = float_bits(x[i]) >= low ? smaller(least, x[i]) : least;
  // A lane may have none above the bound: its own maximum is no candidate then.
  least = float_bits(most) >= low ? least : bits_float(0x7f800000);
  least = smaller(least, shuffle_xor(least, 1));
  return smaller(least, shuffle_xor(least, 2));
}

// x: SIZE floats by index, >= 0, or negative for entries that do not count. 1 <= k <= most, and k entries or more
// count; `most` is the same for all rows of a launch. A row with a NaN gets some number.
template <int SIZE, class X>
SDATTN_DEVICE float kth_largest(const X& x, int k, int most) {
  if (most == 1) {
    float highest = x[0];
#pragma unroll
    for (int i = 1; i < SIZE; ++i) highest = larger(highest, x[i]);
    return quad_max(highest);
  }
  if constexpr (SIZE <= 8) {
    if (most <= 4) return kth_by_lists<4, SIZE>(x, k);
  }
  if constexpr (SIZE >= 8) {
    if (most <= 8) return kth_by_lists<8, SIZE>(x, k);
  }
  if constexpr (SIZE == 20) {
    if (most <= 16) return kth_by_lists<16, SIZE>(x, k);
  }
  return kth_by_bisection<SIZE>(x, k);
}

}  // namespace sdattn::cuda
