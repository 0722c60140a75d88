// The two products, as one matrix product over packed panels, and how numbers are stored and multiplied in it. Included
// by kernel.inl.
//
// product<E>: out[c][R] = factor[R] * sum_k panel(k, c) * x[k][R], with `add` added to what is there. Columns c go in
// tiles of at most T, as even as can be; a tile's panel is stored [k][c]. E says how numbers are stored and multiplied:
// Scalar is what a tensor holds, Element what a panel holds, per_step scalars of depth at a time. load reads elements
// whose depth runs along memory, load_both those whose depth runs over rows: the first row and, for pairs, the second
// (null: zeros).

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

// A sum's depth in steps of E.
template <class E>
inline int64_t steps_of(int64_t depth) { return (depth + E::per_step - 1) / E::per_step; }

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
void product(const typename E::Element* panel, int64_t columns, int64_t steps, const float* x, const F* factor,
             float* out) {
  const int count = tiles(columns);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(columns, count, i);
    product_tile_of<E, add>(size, panel, steps, x, factor, out);
    panel += size * steps;
    out += size * R;
  }
}
