// The k-th largest content entry of each row, one lane a row: docs/design.md, "Step 4: salience dropout". Included by
// kernel.inl.

inline void exchange(F& high, F& low) {
  const F larger = V::max(high, low), smaller = V::min(high, low);
  high = larger;
  low = smaller;
}

// Sixteen vectors, largest first, lane by lane: Green's network of 60 exchanges.
inline void sort16(F* x) {
  static constexpr signed char network[60][2] = {
      {0, 1},  {2, 3},   {4, 5},   {6, 7},   {8, 9},   {10, 11}, {12, 13}, {14, 15}, {0, 2},   {4, 6},
      {8, 10}, {12, 14}, {1, 3},   {5, 7},   {9, 11},  {13, 15}, {0, 4},   {8, 12},  {1, 5},   {9, 13},
      {2, 6},  {10, 14}, {3, 7},   {11, 15}, {0, 8},   {1, 9},   {2, 10},  {3, 11},  {4, 12},  {5, 13},
      {6, 14}, {7, 15},  {5, 10},  {6, 9},   {3, 12},  {13, 14}, {4, 8},   {7, 11},  {1, 2},   {1, 4},
      {7, 13}, {2, 8},   {11, 14}, {5, 6},   {9, 10},  {2, 4},   {11, 13}, {3, 8},   {7, 12},  {6, 8},
      {10, 12}, {3, 5},  {7, 9},   {3, 4},   {5, 6},   {7, 8},   {9, 10},  {11, 12}, {6, 7},   {8, 9}};
#pragma GCC unroll 60
  for (int i = 0; i < 60; ++i) exchange(x[network[i][0]], x[network[i][1]]);
}

// Of two sorted sixteens, the sixteen largest, sorted.
inline void merge16(F* best, const F* more) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) best[i] = V::max(best[i], more[15 - i]);
#pragma GCC unroll 4
  for (int gap = 8; gap > 0; gap /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & gap) == 0) exchange(best[i], best[i + gap]);
    }
  }
}

inline void load16(F* x, const float* from, int64_t columns) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = i < columns ? V::load(from + i * R) : V::set(-1.0f);
}

// The k-th largest entry and the largest below it, 0 where that was not seen on the way.
struct Kth {
  F kth, next;
};

// k <= 16: groups of sixteen sorted, the best sixteen kept.
inline Kth kth_by_network(const float* x, int64_t columns, int32_t k) {
  F best[16];
  load16(best, x, columns);
  sort16(best);
  for (int64_t c = 16; c < columns; c += 16) {
    F more[16];
    load16(more, x + c * R, columns - c);
    sort16(more);
    merge16(best, more);
  }
  float sorted[16 * W];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) V::store(sorted + i * W, best[i]);
  Kth found = {V::load(sorted + (k - 1) * W), V::set(0.0f)};
  for (int i = k; i < 16; ++i) found.next = V::max(V::if_below(V::load(sorted + i * W), found.kth), found.next);
  return found;
}

// k <= 4: a sorted list of k + 1, every entry sinking into it.
template <int K>
inline Kth kth_by_insertion(const float* x, int64_t columns) {
  F best[K + 1];
  for (int i = 0; i <= K; ++i) best[i] = V::set(-1.0f);
  for (int64_t c = 0; c < columns; ++c) {
    F v = V::load(x + c * R);
#pragma GCC unroll 5
    for (int i = 0; i <= K; ++i) exchange(best[i], v);
  }
  return {best[K - 1], V::if_below(best[K], best[K - 1])};
}

// Any k: bisection on the bits of the numbers, which order as the numbers do since none is negative. Exact.
inline Kth kth_by_bisection(const float* x, int64_t columns, int32_t k) {
  alignas(64) uint32_t low[W];
  alignas(64) float bound[W], count[W];
  for (int i = 0; i < W; ++i) low[i] = 0;
  for (int bit = 30; bit >= 0; --bit) {
    for (int i = 0; i < W; ++i) {
      const uint32_t candidate = low[i] | 1u << bit;
      std::memcpy(&bound[i], &candidate, 4);
    }
    const F at = V::load(bound);
    F above = V::set(0.0f);
    for (int64_t c = 0; c < columns; ++c) {
      above = above + V::select(V::le(at, V::load(x + c * R)), V::set(1.0f), V::set(0.0f));
    }
    V::store(count, above);
    for (int i = 0; i < W; ++i) low[i] |= count[i] >= static_cast<float>(k) ? 1u << bit : 0u;
  }
  std::memcpy(bound, low, sizeof low);
  return {V::load(bound), V::set(0.0f)};
}

inline Kth kth_largest(const float* x, int64_t columns, int32_t k) {
  switch (k) {
    case 1: return kth_by_insertion<1>(x, columns);
    case 2: return kth_by_insertion<2>(x, columns);
    case 3: return kth_by_insertion<3>(x, columns);
    case 4: return kth_by_insertion<4>(x, columns);
  }
  return k <= 16 ? kth_by_network(x, columns, k) : kth_by_bisection(x, columns, k);
}

inline F largest_below(const float* x, int64_t columns, F bound) {
  F largest = V::set(0.0f);
  for (int64_t c = 0; c < columns; ++c) largest = V::max(V::if_below(V::load(x + c * R), bound), largest);
  return largest;
}
