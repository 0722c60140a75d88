// Steps 1 to 6 and 8 for one block of rows, in one pass: the map never exists.
//
// Included by one translation unit per instruction set, after its vector type V (vec_*.h). Everything here has internal
// linkage: a function shared with another translation unit could be that unit's, compiled for another machine.
//
// A block is R rows (pixels), one lane each, so whatever the program does along the tokens is vertical and needs no
// shuffle: S^T[n][R] = K Q^T, the program down the columns of S^T, O^T[dv][R] = V^T P^T. Both products are one routine,
// `product`, over packed panels. Columns are permuted, content first, so that the program touches those alone.

#include <cstddef>
#include <cstring>

#include "isa.h"

namespace {

using namespace sdattn;
using sdattn::cpu::Backward;
using sdattn::cpu::BackwardJob;
using sdattn::cpu::Entry;
using sdattn::cpu::Isa;
using sdattn::cpu::Job;
using sdattn::cpu::Smoothing;
using F = V::F;

constexpr int W = V::width;
constexpr int R = 2 * W;  // rows a block
constexpr int T = V::tile;

constexpr float log2_e = 1.44269504088896340736f;
constexpr float infinity = __builtin_inff();

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// ---- The products -------------------------------------------------------------------------------------------------
//
// product<E>: out[c][R] = factor[R] * sum_k panel(k, c) * x[k][R], with `add` added to what is there. Columns c go in tiles of at most T, as even as can be;
// a tile's panel is stored [k][c]. E says how numbers are stored and multiplied: Scalar is what a tensor holds, Element
// what a panel holds, per_step scalars of depth at a time. load reads elements whose depth runs along memory, load_both
// those whose depth runs over rows: the first row and, for pairs, the second (null: zeros).

struct Float32 {
  using Scalar = float;
  using Element = float;
  static constexpr int per_step = 1;
  static F multiply_add(F x, Element y, F acc) { return V::fma(x, V::set(y), acc); }
  static F load(const Scalar* p, int n) { return V::load_n(p, n); }
  static F load_both(const Scalar* p, const Scalar*, int n) { return V::load_n(p, n); }
  static void store(Scalar* p, F v, int n) { V::store_n(p, v, n); }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 as vdpbf16ps takes them.
struct Bfloat16 {
  using Scalar = uint16_t;
  using Element = uint32_t;
  static constexpr int per_step = 2;
  static F multiply_add(F x, Element y, F acc) { return V::dot_bf16(x, y, acc); }
  static F load(const Scalar* p, int n) { return V::load_pairs_n(p, n); }
  static F load_both(const Scalar* low, const Scalar* high, int n) {
    return V::round_pairs(V::load_bf16_n(low, n), high ? V::load_bf16_n(high, n) : V::set(0.0f));
  }
  static void store(Scalar* p, F v, int n) { V::store_bf16_n(p, v, n); }
};
#else
// Widened on the way in, float32 from there on.
struct Bfloat16 {
  using Scalar = uint16_t;
  using Element = float;
  static constexpr int per_step = 1;
  static F multiply_add(F x, Element y, F acc) { return V::fma(x, V::set(y), acc); }
  static F load(const Scalar* p, int n) { return V::load_bf16_n(p, n); }
  static F load_both(const Scalar* p, const Scalar*, int n) { return V::load_bf16_n(p, n); }
  static void store(Scalar* p, F v, int n) { V::store_bf16_n(p, v, n); }
};
#endif

inline int tiles(int64_t columns) { return static_cast<int>((columns + T - 1) / T); }
inline int tile_size(int64_t columns, int count, int i) {
  return static_cast<int>(columns / count + (i < columns % count ? 1 : 0));
}

// Longer sums go in parts: a single chain of 256 roundings would lose to torch's blocked sums.
constexpr int64_t longest_chain = 128;

template <class E, bool add, int C>
inline void product_tile(const typename E::Element* panel, int64_t steps, const float* x, const F* factor, float* out) {
  const int64_t parts = steps > longest_chain ? (steps + longest_chain - 1) / longest_chain : 1;
  for (int64_t part = 0; part < parts; ++part) {
    F acc[C][2];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) acc[c][0] = acc[c][1] = V::set(0.0f);
    const int64_t here = steps * (part + 1) / parts - steps * part / parts;
    for (int64_t k = 0; k < here; ++k, panel += C, x += R) {
      const F x0 = V::load(x), x1 = V::load(x + W);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        acc[c][0] = E::multiply_add(x0, panel[c], acc[c][0]);
        acc[c][1] = E::multiply_add(x1, panel[c], acc[c][1]);
      }
    }
    if (add) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        V::store(out + c * R, V::fma(acc[c][0], factor[0], V::load(out + c * R)));
        V::store(out + c * R + W, V::fma(acc[c][1], factor[1], V::load(out + c * R + W)));
      }
      continue;
    }
    if (part > 0) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        acc[c][0] = acc[c][0] + V::load(out + c * R);
        acc[c][1] = acc[c][1] + V::load(out + c * R + W);
      }
    }
    const F by0 = part + 1 == parts ? factor[0] : V::set(1.0f), by1 = part + 1 == parts ? factor[1] : V::set(1.0f);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      V::store(out + c * R, acc[c][0] * by0);
      V::store(out + c * R + W, acc[c][1] * by1);
    }
  }
}

template <class E, bool add, int C = T>
inline void product_tile_of(int size, const typename E::Element* panel, int64_t steps, const float* x, const F* factor,
                            float* out) {
  if constexpr (C > 0) {
    if (size == C) return product_tile<E, add, C>(panel, steps, x, factor, out);
    product_tile_of<E, add, C - 1>(size, panel, steps, x, factor, out);
  }
}

template <class E, bool add = false>
void product(const typename E::Element* panel, int64_t columns, int64_t steps, const float* x, const F* factor, float* out) {
  const int count = tiles(columns);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(columns, count, i);
    product_tile_of<E, add>(size, panel, steps, x, factor, out);
    panel += size * steps;
    out += size * R;
  }
}

// W vectors of W lanes, transposed: log2(W) perfect shuffles.
inline void transpose(F* r) {
#pragma GCC unroll 4
  for (int pass = 1; pass < W; pass *= 2) {
    F t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = V::zip_low(r[i], r[i + W / 2]);
      t[2 * i + 1] = V::zip_high(r[i], r[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// ---- Packing: keys and values of one head, columns permuted, into panels --------------------------------------------

template <class E>
inline int64_t steps_of(int64_t depth) { return (depth + E::per_step - 1) / E::per_step; }

template <class E>
inline int64_t panel_size(int64_t columns, int64_t depth) { return round_up(columns * steps_of<E>(depth), 16); }

// Keys: a column is a row of memory.
template <class E>
inline void pack_keys(const Attention& a, const typename E::Scalar* key, const int32_t* order, float* panel) {
  const int count = tiles(a.N);
  const int64_t steps = steps_of<E>(a.D);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(a.N, count, i);
    for (int64_t first = 0; first < size; first += W) {
      const int here = static_cast<int>(at_most(W, size - first));
      for (int64_t s = 0; s < steps; s += W) {
        const int left = static_cast<int>(a.D - s * E::per_step);
        F r[W];
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) {
          r[c] = E::load(key + order[first + (c < here ? c : 0)] * a.key.stride[2] + s * E::per_step, left);
        }
        transpose(r);
        const int64_t deep = at_most(W, steps - s);
        for (int64_t k = 0; k < deep; ++k) V::store_n(panel + (s + k) * size + first, r[k], here);
      }
    }
    panel += size * steps;
    order += size;
  }
}

// Values: a column is a column of memory.
template <class E>
inline void pack_values(const Attention& a, const typename E::Scalar* value, const int32_t* order, float* panel) {
  const int count = tiles(a.Dv);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(a.Dv, count, i);
    for (int64_t n = 0; n < a.N; n += E::per_step) {
      const auto* low = value + order[n] * a.value.stride[2];
      const auto* high = n + E::per_step <= a.N ? value + order[n + E::per_step - 1] * a.value.stride[2] : nullptr;
      for (int c = 0; c < size; c += W) {
        const int here = size - c < W ? size - c : W;
        V::store_n(panel + c, E::load_both(low + c, high ? high + c : nullptr, here), here);
      }
      panel += size;
    }
    value += size;
  }
}

template <class E>
void pack_head(const Job& job, char* to, int64_t b, int64_t h) {
  using Scalar = typename E::Scalar;
  const Attention& a = *job.call;
  const int32_t* order = job.entries[b].order;
  float* packed = reinterpret_cast<float*>(to + (b * a.H + h) * job.packed_bytes);
  pack_keys<E>(a, static_cast<const Scalar*>(a.key.data) + b * a.key.stride[0] + h * a.key.stride[1], order, packed);
  pack_values<E>(a, static_cast<const Scalar*>(a.value.data) + b * a.value.stride[0] + h * a.value.stride[1], order,
                 packed + panel_size<E>(a.N, a.D));
}

// ---- Rows into lanes and back ---------------------------------------------------------------------------------------

// x[step][R] from the block's rows of the query. Lanes past the last row repeat it. The block that this thread takes next
// is fetched meanwhile, `ahead` scalars on: the query is read once, from memory, and its rows are short.
template <class E>
inline void load_query(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t rows, int64_t ahead, float* x) {
  using Scalar = typename E::Scalar;
  const auto* query = static_cast<const Scalar*>(a.query.data) + b * a.query.stride[0] + h * a.query.stride[1];
  const int64_t steps = steps_of<E>(a.D);
  for (int64_t s = 0; s < steps; s += W) {
    const int64_t wide = at_most(W, steps - s);
    const int left = static_cast<int>(a.D - s * E::per_step);
    for (int half = 0; half < 2; ++half) {
      F r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const auto* row = query + (m + at_most(half * W + i, rows - 1)) * a.query.stride[2] + s * E::per_step;
        r[i] = E::load(row, left);
        __builtin_prefetch(row + ahead);
      }
      transpose(r);
      if (wide == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) V::store(x + (s + i) * R + half * W, r[i]);
      } else {
        for (int64_t i = 0; i < wide; ++i) V::store(x + (s + i) * R + half * W, r[i]);
      }
    }
  }
}

// The block's rows of the output from o[dv][R], which has room for round_up(Dv, W) rows.
template <class E>
inline void store_output(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t rows, const float* o) {
  using Scalar = typename E::Scalar;
  auto* out = static_cast<Scalar*>(a.out.data) + b * a.out.stride[0] + h * a.out.stride[1] + m * a.out.stride[2];
  for (int64_t d = 0; d < a.Dv; d += W) {
    const int wide = static_cast<int>(at_most(W, a.Dv - d));
    for (int half = 0; half < 2 && half * W < rows; ++half) {
      F r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = V::load(o + (d + i) * R + half * W);
      transpose(r);
      Scalar* to = out + half * W * a.out.stride[2] + d;
      const int64_t here = at_most(W, rows - half * W);
      if (here == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i, to += a.out.stride[2]) {
          E::store(to, r[i], wide);
        }
      } else {
        for (int64_t i = 0; i < here; ++i, to += a.out.stride[2]) {
          E::store(to, r[i], wide);
        }
      }
    }
  }
}

// ---- Step 1 -----------------------------------------------------------------------------------------------------

// 2**x for x <= 0 (NaN stays, -inf gives 0): 2**round(x) times a polynomial of degree 6 on [-1/2, 1/2].
inline F exp2_negative(F x) {
  x = V::max(V::set(-160.0f), x);  // the second operand wins where either is NaN
  const F shifted = x + V::set(12582912.0f);
  const F r = x - (shifted - V::set(12582912.0f));
  F y = V::set(1.5403530e-4f);
  y = V::fma(y, r, V::set(1.3333558e-3f));
  y = V::fma(y, r, V::set(9.6181291e-3f));
  y = V::fma(y, r, V::set(5.5504109e-2f));
  y = V::fma(y, r, V::set(2.4022651e-1f));
  y = V::fma(y, r, V::set(6.9314718e-1f));
  y = V::fma(y, r, V::set(1.0f));
  return V::scale_by_power(y, x, shifted);
}

inline F load_widened(const float* p, int n) { return V::load_n(p, n); }
inline F load_widened(const uint16_t* p, int n) { return V::load_bf16_n(p, n); }
inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return from_bf16(x); }

// s[column of n][R] += log2(e) * bias[R][n], for a bias of one number a token, of contiguous rows, of any strides.
template <class Scalar>
inline void add_bias(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, int64_t rows, float* s) {
  const int64_t* stride = a.bias.stride;
  const auto* bias = static_cast<const Scalar*>(a.bias.data) + b * stride[0] + h * stride[1] + m * stride[2];
  if (stride[2] == 0) {
    for (int64_t n = 0; n < a.N; ++n) {
      float* to = s + entry.position[n] * R;
      const F all = V::set(log2_e * widened(bias[n * stride[3]]));
      V::store(to, V::load(to) + all);
      V::store(to + W, V::load(to + W) + all);
    }
  } else if (stride[3] == 1) {
    for (int64_t n = 0; n < a.N; n += W) {
      const int wide = static_cast<int>(at_most(W, a.N - n));
      for (int half = 0; half < 2; ++half) {
        F r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = load_widened(bias + at_most(half * W + i, rows - 1) * stride[2] + n, wide);
        transpose(r);
        for (int i = 0; i < wide; ++i) {
          float* to = s + entry.position[n + i] * R + half * W;
          V::store(to, V::fma(r[i], V::set(log2_e), V::load(to)));
        }
      }
    }
  } else {
    for (int64_t n = 0; n < a.N; ++n) {
      float* to = s + entry.position[n] * R;
      for (int64_t r = 0; r < rows; ++r) to[r] += log2_e * widened(bias[r * stride[2] + n * stride[3]]);
    }
  }
}

// s becomes e = exp2(s - max), in the first `content` columns times their gate, if there is one. sum[2]: of e over the
// row; mass[2]: over the content. A row of -inf alone gives zeros, and the sum 0.
inline void exponentials(float* s, int64_t columns, int64_t content, const float* gate, F* sum, F* mass) {
  F top[2] = {V::set(-infinity), V::set(-infinity)};
  for (int64_t c = 0; c < columns; ++c) {
    top[0] = V::max(top[0], V::load(s + c * R));
    top[1] = V::max(top[1], V::load(s + c * R + W));
  }
  for (int i = 0; i < 2; ++i) {
    top[i] = V::select(V::eq(top[i], V::set(-infinity)), V::set(0.0f), top[i]);
    sum[i] = V::set(0.0f);
  }
  const auto each = [&](int64_t c, F by) {
    float* at = s + c * R;
    const F e0 = exp2_negative(V::load(at) - top[0]);
    const F e1 = exp2_negative(V::load(at + W) - top[1]);
    V::store(at, e0 * by);
    V::store(at + W, e1 * by);
    sum[0] = sum[0] + e0;
    sum[1] = sum[1] + e1;
  };
  for (int64_t c = 0; c < content; ++c) each(c, V::set(gate ? gate[c] : 1.0f));
  mass[0] = sum[0];
  mass[1] = sum[1];
  for (int64_t c = content; c < columns; ++c) each(c, V::set(1.0f));
}

// ---- Steps 2 to 6: content columns only, W rows at a time; x points at the first column, columns are R apart ---------
//
// Everything runs on unnormalised probabilities: each decision compares entries of one row, so a common factor is
// nothing to it. Entries are >= 0; one dropped at random is -1 until step 5 has decided.

inline F sum_of(const float* x, int64_t columns) {
  F sum = V::set(0.0f);
  for (int64_t c = 0; c < columns; ++c) sum = sum + V::load(x + c * R);
  return sum;
}

inline void gate_columns(float* x, const float* gate, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    V::store(x + c * R, V::load(x + c * R) * V::set(gate[c]));
    V::store(x + c * R + W, V::load(x + c * R + W) * V::set(gate[c]));
  }
}

inline void phrase_means(float* x, const Entry& entry) {
  for (int32_t g = 0; g < entry.phrases; ++g) {
    const int32_t first = entry.phrase_start[g], last = entry.phrase_start[g + 1];
    F sum = V::set(0.0f);
    for (int32_t i = first; i < last; ++i) sum = sum + V::load(x + entry.phrase_member[i] * R);
    const F mean = sum * V::set(1.0f / static_cast<float>(last - first));
    for (int32_t i = first; i < last; ++i) V::store(x + entry.phrase_member[i] * R, mean);
  }
}

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

inline void drop_at_random(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, float* x) {
  const RowProgram& p = a.program;
  for (int32_t c = 0; c < entry.content; ++c) {
    float u[W];
    for (int i = 0; i < W; ++i) {
      u[i] = philox_uniform(p.seed, static_cast<uint32_t>(entry.order[c]), static_cast<uint32_t>(m + i),
                            static_cast<uint32_t>(h), static_cast<uint32_t>(b));
    }
    float* at = x + c * R;
    V::store(at, V::select(V::lt(V::load(u), V::set(p.random_ratio)), V::set(-1.0f), V::load(at)));
  }
}

inline F largest_below(const float* x, int64_t columns, F bound) {
  F largest = V::set(0.0f);
  for (int64_t c = 0; c < columns; ++c) largest = V::max(V::if_below(V::load(x + c * R), bound), largest);
  return largest;
}

// Steps 3 to 6 for W rows from pixel m on. x: all columns' exponentials, gated; sum and mass: of all and of the content
// before the gate. Returns the factor that turns what is left in x into the program's probabilities. kept: (content, R)
// ones and zeros, or null.
inline F program(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, F sum, F mass, float* x,
                 float* kept) {
  const RowProgram& p = a.program;
  const int64_t columns = entry.content;
  const F zero = V::set(0.0f), one = V::set(1.0f);
  if (entry.phrases) phrase_means(x, entry);
  if (p.random_ratio >= 0.0f) drop_at_random(a, entry, b, h, m, x);

  Kth found = {V::set(infinity), zero};
  if (entry.drop > 0) found = kth_largest(x, columns, entry.drop);
  F lower = V::set(-0.5f);  // kept: lower < x < kth
  if (p.threshold >= 0.0f) {
    if (!V::all(V::lt(zero, found.next))) found.next = largest_below(x, columns, found.kth);
    lower = V::set(p.threshold) * found.next;
  }

  F left = zero;
  for (int64_t c = 0; c < columns; ++c) {
    const F v = V::load(x + c * R);
    const F y = V::if_between(lower, v, found.kth);
    V::store(x + c * R, y);
    left = left + y;
    if (kept) V::store(kept + c * R, V::if_between(lower, v, found.kth, one));
  }

  if (p.renormalize == renormalize_row) {
    const F total = left + sum_of(x + columns * R, a.N - columns);
    // sum - sum: NaN for a row that had one, also where it was dropped.
    return V::select(V::lt(total, V::set(least_sum)), zero, one / total) + (sum - sum);
  }
  const F factor = V::select(V::eq(sum, zero), zero, one / sum);
  if (p.renormalize != renormalize_content) return factor;
  const F regain = V::select(V::lt(left, V::set(least_sum)), zero, mass / left);
  if (columns == a.N) return factor * regain + (sum - sum);
  for (int64_t c = 0; c < columns; ++c) V::store(x + c * R, V::load(x + c * R) * regain);
  return factor;
}

// ---- What is returned beside the output -----------------------------------------------------------------------------

inline void zero_rows(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t rows) {
  const int64_t size = a.dtype == bfloat16 ? 2 : 4;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = b * a.out.stride[0] + h * a.out.stride[1] + (m + r) * a.out.stride[2];
    std::memset(static_cast<char*>(a.out.data) + at * size, 0, a.Dv * size);
  }
}

// The captured tokens' probabilities x * factor into the maps; with the mean over heads, added to what is there.
inline void capture(const Job& job, int64_t b, int64_t h, int64_t m, int64_t rows, const float* x, const F* factor) {
  const Attention& a = *job.call;
  const RowProgram& p = a.program;
  const bool mean = p.capture_mean;
  const F weight = V::set(mean ? job.head_weight : 1.0f);
  float* maps = a.maps + (mean ? b : b * a.H + h) * p.capture_count * a.M + m;
  for (int64_t t = 0; t < p.capture_count; ++t, maps += a.M) {
    const float* column = x + job.entries[b].position[p.capture_tokens[t]] * R;
    for (int half = 0; half < 2 && half * W < rows; ++half) {
      const int n = static_cast<int>(at_most(W, rows - half * W));
      float* to = maps + half * W;
      const F v = V::load(column + half * W) * factor[half] * weight;
      V::store_n(to, mean ? V::load_n(to, n) + v : v, n);
    }
  }
}

inline void zero_maps(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t rows) {
  const RowProgram& p = a.program;
  float* maps = a.maps + (p.capture_mean ? b : b * a.H + h) * p.capture_count * a.M + m;
  for (int64_t t = 0; t < p.capture_count; ++t, maps += a.M) std::memset(maps, 0, rows * sizeof(float));
}

// value: -1 for every token's bit set (then `kept` clears content that is gone), 0 for none.
inline void store_bits(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, int64_t rows,
                       int32_t content, const float* kept, bool all) {
  const int64_t words = (a.N + 31) / 32;
  uint32_t* to = reinterpret_cast<uint32_t*>(a.bits) + ((b * a.H + h) * a.M + m) * words;
  for (int64_t r = 0; r < rows; ++r, to += words) {
    for (int64_t w = 0; w < words; ++w) {
      const int64_t here = a.N - 32 * w;
      to[w] = !all ? 0u : here >= 32 ? 0xffffffffu : (1u << here) - 1u;
    }
    for (int32_t c = 0; c < content; ++c) {
      if (kept[c * R + r] == 0.0f) to[entry.order[c] / 32] &= ~(1u << (entry.order[c] % 32));
    }
  }
}

// ---- A block of rows ------------------------------------------------------------------------------------------------

struct Workspace {
  size_t query, scores, pairs, output, kept, bytes;
};

inline Workspace workspace_of(const Attention& a) {
  const auto floats = [](int64_t n) { return static_cast<size_t>(n * R * sizeof(float)); };
  Workspace w;
  w.query = 0;
  w.scores = w.query + floats(a.D);
  w.pairs = w.scores + floats(a.N);
  w.output = w.pairs + floats((a.N + 1) / 2);
  w.kept = w.output + floats(round_up(a.Dv, W));
  w.bytes = w.kept + (a.bits ? floats(a.N) : 0);
  return w;
}

// The logits s, in units of ln 2, of a block whose query is x.
template <class E>
void first_product(const Attention& a, const Entry& entry, const char* packed, const float* x, int64_t b, int64_t h,
                   int64_t m, int64_t rows, float* s) {
  const F to_log2[2] = {V::set(a.scale * log2_e), V::set(a.scale * log2_e)};
  product<E>(reinterpret_cast<const typename E::Element*>(packed), a.N, steps_of<E>(a.D), x, to_log2, s);
  if (a.bias.data && a.bias_dtype == bfloat16) add_bias<uint16_t>(a, entry, b, h, m, rows, s);
  if (a.bias.data && a.bias_dtype == float32) add_bias<float>(a, entry, b, h, m, rows, s);
}

// o, in the workspace, from the probabilities s there, times factor; added to what is there if `add`.
template <class E>
void second_product(const Attention& a, const char* packed, const Workspace& w, char* base, const F* factor, bool add) {
  const auto* value = reinterpret_cast<const typename E::Element*>(packed) + panel_size<E>(a.N, a.D);
  float* s = reinterpret_cast<float*>(base + w.scores);
  float* o = reinterpret_cast<float*>(base + w.output);
#if defined(__AVX512BF16__)
  if constexpr (E::per_step == 2) {
    float* pairs = reinterpret_cast<float*>(base + w.pairs);
    for (int64_t n = 0; n < a.N; n += 2) {
      for (int half = 0; half < R; half += W) {
        const F high = n + 1 < a.N ? V::load(s + (n + 1) * R + half) : V::set(0.0f);
        V::store(pairs + n / 2 * R + half, V::round_pairs(V::load(s + n * R + half), high));
      }
    }
    s = pairs;
  }
#endif
  if (add) {
    product<E, true>(value, a.Dv, steps_of<E>(a.N), s, factor, o);
  } else {
    product<E>(value, a.Dv, steps_of<E>(a.N), s, factor, o);
  }
}

template <class E>
void head(const Job& job, char* base, int64_t b, int64_t h, int64_t m, int64_t rows, bool add);

// Heads h to h + heads - 1 of the rows from m on. What the heads share, a query or an output, is read or written once.
template <class E>
void block(const Job& job, void* memory, int64_t b, int64_t h, int64_t heads, int64_t m) {
  const Attention& a = *job.call;
  const Workspace w = workspace_of(a);
  char* base = static_cast<char*>(memory);
  float* x = reinterpret_cast<float*>(base + w.query);
  float* o = reinterpret_cast<float*>(base + w.output);
  const bool one_query = a.query.stride[1] == 0, one_output = a.out.stride[1] == 0;
  const int64_t rows = at_most(R, a.M - m);
  const int64_t ahead = job.heads_first && !one_query ? a.query.stride[1] : R * a.query.stride[2];
  if (one_output) {
    for (int64_t c = 0; c < a.Dv; ++c) {
      const F start = V::set(a.out_bias ? a.out_bias[c] : 0.0f);
      V::store(o + c * R, start);
      V::store(o + c * R + W, start);
    }
  }
  bool loaded = false;
  for (int64_t i = h; i < h + heads; ++i) {
    const uint8_t mode = a.program.head_mode ? a.program.head_mode[i] : static_cast<uint8_t>(head_program);
    if (a.maps && (!a.program.capture_mean || i == 0)) zero_maps(a, b, i, m, rows);
    if (mode == head_zero || a.N == 0) {
      if (!one_output) zero_rows(a, b, i, m, rows);
      if (a.bits) store_bits(a, job.entries[b], b, i, m, rows, 0, nullptr, mode != head_zero);
      continue;
    }
    if (!loaded) load_query<E>(a, b, i, m, rows, ahead, x);
    loaded = one_query;
    head<E>(job, base, b, i, m, rows, one_output);
    if (!one_output) store_output<E>(a, b, i, m, rows, o);
  }
  if (one_output) store_output<E>(a, b, 0, m, rows, o);
}

// One head of a block whose query is loaded; its output is left in the workspace, added to what is there if `add`.
template <class E>
void head(const Job& job, char* base, int64_t b, int64_t h, int64_t m, int64_t rows, bool add) {
  const Attention& a = *job.call;
  const Entry& entry = job.entries[b];
  const Workspace w = workspace_of(a);
  const uint8_t mode = a.program.head_mode ? a.program.head_mode[h] : static_cast<uint8_t>(head_program);
  const float* x = reinterpret_cast<float*>(base + w.query);
  float* s = reinterpret_cast<float*>(base + w.scores);
  float* kept = a.bits ? reinterpret_cast<float*>(base + w.kept) : nullptr;
  const char* packed = job.packed + (b * a.H + h) * job.packed_bytes;
  first_product<E>(a, entry, packed, x, b, h, m, rows, s);

  const int32_t content = mode == head_program ? entry.content : 0;
  const bool captured = a.maps && (!a.program.capture_mean || mode == head_program);
  const bool early = captured && !a.program.capture_final;  // the map is wanted as it was before the gate
  const float* gate = entry.gate ? entry.gate + (a.program.gate_heads == 1 ? 0 : h) * a.N : nullptr;
  F sum[2], mass[2], factor[2];
  exponentials(s, a.N, content, early ? nullptr : gate, sum, mass);
  for (int i = 0; i < 2; ++i) factor[i] = V::select(V::eq(sum[i], V::set(0.0f)), V::set(0.0f), V::set(1.0f) / sum[i]);
  if (early) {
    capture(job, b, h, m, rows, s, factor);
    if (gate) gate_columns(s, gate, content);
  }
  if (content > 0) {
    for (int i = 0; i < 2; ++i) {
      factor[i] = program(a, entry, b, h, m + i * W, sum[i], mass[i], s + i * W, kept ? kept + i * W : nullptr);
    }
  }
  if (captured && a.program.capture_final) capture(job, b, h, m, rows, s, factor);
  if (a.bits) store_bits(a, entry, b, h, m, rows, content, kept, true);

  second_product<E>(a, packed, w, base, factor, add);
}

// ---- Step 7 -----------------------------------------------------------------------------------------------------

// One (b, h) and one block of channels at a time: two buffers of pixels x channels, both passes vertical in memory.

constexpr int64_t smooth_channels = 32;

inline size_t smooth_bytes(const Smoothing& s) {
  return static_cast<size_t>(2 * s.height * s.width * at_most(smooth_channels, s.C) * sizeof(float));
}

inline int64_t smooth_blocks(const Smoothing& s) { return (s.C + smooth_channels - 1) / smooth_channels; }

inline int64_t reflected(int64_t i, int64_t length) {
  i %= 2 * length;
  if (i < 0) i += 2 * length;
  return i < length ? i : 2 * length - 1 - i;
}

// to[i] = weight * (from0[i] + from1[i]), added to what is there unless `first`.
inline void add_scaled(float* to, const float* from0, const float* from1, float weight, int64_t n, bool first) {
  const F by = V::set(weight);
  for (int64_t i = 0; i < n; i += W) {
    const int here = static_cast<int>(at_most(W, n - i));
    const F both = from1 ? V::load_n(from0 + i, here) + V::load_n(from1 + i, here) : V::load_n(from0 + i, here);
    const F v = by * both;
    V::store_n(to + i, first ? v : V::load_n(to + i, here) + v, here);
  }
}

inline void smooth_rows(const Smoothing& s, const float* from, float* to, int64_t channels) {
  const int64_t line = s.width * channels;
  for (int64_t y = 0; y < s.height; ++y) {
    add_scaled(to + y * line, from + y * line, nullptr, s.weights[s.radius], line, true);
    for (int64_t k = 1; k <= s.radius; ++k) {
      add_scaled(to + y * line, from + reflected(y - k, s.height) * line, from + reflected(y + k, s.height) * line,
                 s.weights[s.radius + k], line, false);
    }
  }
}

// Along a line: pixels whose whole window lies inside are one run of contiguous numbers.
inline void smooth_columns(const Smoothing& s, const float* from, float* to, int64_t channels) {
  const int64_t line = s.width * channels;
  for (int64_t y = 0; y < s.height; ++y, from += line, to += line) {
    add_scaled(to, from, nullptr, s.weights[s.radius], line, true);
    for (int64_t k = 1; k <= s.radius; ++k) {
      const float weight = s.weights[s.radius + k];
      const int64_t inside = s.width > 2 * k ? s.width - 2 * k : 0;
      if (inside) {
        add_scaled(to + k * channels, from, from + 2 * k * channels, weight, inside * channels, false);
      }
      for (int64_t x = 0; x < s.width; ++x) {
        if (inside && x == k) x += inside;
        if (x >= s.width) break;
        add_scaled(to + x * channels, from + reflected(x - k, s.width) * channels,
                   from + reflected(x + k, s.width) * channels, weight, channels, false);
      }
    }
  }
}

template <class E>
void smooth_block(const Smoothing& s, void* memory, int64_t bh, int64_t block) {
  using Scalar = typename E::Scalar;
  const int64_t pixels = s.height * s.width, first = block * smooth_channels;
  const int64_t channels = at_most(smooth_channels, s.C - first);
  const auto* x = static_cast<const Scalar*>(s.x) + bh * pixels * s.C + first;
  auto* out = static_cast<Scalar*>(s.out) + bh * pixels * s.C + first;
  if (s.where && !s.where[bh]) {
    for (int64_t i = 0; i < pixels; ++i) std::memcpy(out + i * s.C, x + i * s.C, channels * sizeof(Scalar));
    return;
  }
  float* from = static_cast<float*>(memory);
  float* to = from + pixels * channels;
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < channels; c += W) {
      const int n = static_cast<int>(at_most(W, channels - c));
      V::store_n(from + i * channels + c, load_widened(x + i * s.C + c, n), n);
    }
  }
  for (int64_t time = 0; time < s.times; ++time) {
    smooth_rows(s, from, to, channels);
    smooth_columns(s, to, from, channels);
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < channels; c += W) {
      const int n = static_cast<int>(at_most(W, channels - c));
      E::store(out + i * s.C + c, V::load_n(from + i * channels + c, n), n);
    }
  }
}

#include "backward.inl"
#include "gaussian_attention.inl"
#include "refine.inl"

// ---- The table that attention.cpp calls through -------------------------------------------------------------------

template <class E>
inline size_t packed_bytes_of(const Attention& a) {
  static_assert(sizeof(typename E::Element) == sizeof(float), "panels are written by lanes");
  return static_cast<size_t>(panel_size<E>(a.N, a.D) + panel_size<E>(a.Dv, a.N)) * sizeof(float);
}

size_t packed_bytes(const Attention& a) {
  return a.dtype == bfloat16 ? packed_bytes_of<Bfloat16>(a) : packed_bytes_of<Float32>(a);
}

size_t workspace_bytes(const Attention& a) { return workspace_of(a).bytes; }

void pack(const Job& job, char* to, int64_t b, int64_t h) {
  job.call->dtype == bfloat16 ? pack_head<Bfloat16>(job, to, b, h) : pack_head<Float32>(job, to, b, h);
}

void rows(const Job& job, void* workspace, int64_t b, int64_t h, int64_t heads, int64_t m) {
  job.call->dtype == bfloat16 ? block<Bfloat16>(job, workspace, b, h, heads, m)
                              : block<Float32>(job, workspace, b, h, heads, m);
}

void smooth(const Smoothing& s, void* workspace, int64_t bh, int64_t block) {
  s.dtype == bfloat16 ? smooth_block<Bfloat16>(s, workspace, bh, block) : smooth_block<Float32>(s, workspace, bh, block);
}

constexpr Isa table(const char* name, bool (*runs_here)()) {
  return {name,         runs_here,     R,      packed_bytes, workspace_bytes, pack, rows,
          smooth_bytes, smooth_blocks, smooth, picture_bytes, picture,
          gaussian_packed_bytes, gaussian_blocks, gaussian_pack, gaussian_bytes, gaussian,
          backward_packed_bytes, backward_bytes, backward_sums_bytes, backward_pack, backward_rows, backward_reduce};
}

}  // namespace
