// Rows of memory into lanes and back, widened and transposed: the query, and the output. Included by kernel.inl.

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline F load_widened(const float* p, int n) { return V::load_n(p, n); }
inline F load_widened(const uint16_t* p, int n) { return V::load_bf16_n(p, n); }
inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return from_bf16(x); }

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

// x[step][R] from the block's rows of the query. Lanes past the last row repeat it. The block that this thread takes
// next is fetched meanwhile, `ahead` scalars on: the query is read once, from memory, and its rows are short.
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
