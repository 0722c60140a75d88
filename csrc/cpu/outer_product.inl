// Sums over rows of outer products, for dK and dV: a lane is a channel here. Included by kernel.inl.

constexpr int outer_lanes = V::tile == 12 ? 5 : 2;  // vectors of channels at a time, at most
constexpr int outer_columns(int lanes) {
  return (V::tile == 12 ? 27 : 12) / lanes < 12 ? (V::tile == 12 ? 27 : 12) / lanes : 12;
}

// out[c][channel] += sum over rows of s[c][row] * x[row][channel].
template <int C, int X>
inline void outer_tile(const float* s, int64_t rows, const float* x, int64_t stride, float* out) {
  F acc[C][X];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) acc[c][i] = V::set(0.0f);
  }
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    F v[X];
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) v[i] = V::load(x + i * W);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const F by = V::set(s[c * R + r]);
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) acc[c][i] = V::fma(by, v[i], acc[c][i]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) {
      float* to = out + c * stride + i * W;
      V::store(to, V::load(to) + acc[c][i]);
    }
  }
}

template <int X, int C = outer_columns(X)>
inline void outer_tile_of(int size, const float* s, int64_t rows, const float* x, int64_t stride, float* out) {
  if constexpr (C > 0) {
    if (size == C) return outer_tile<C, X>(s, rows, x, stride, out);
    outer_tile_of<X, C - 1>(size, s, rows, x, stride, out);
  }
}

template <int X>
inline void outer_lanes_of(const float* s, int64_t columns, int64_t rows, const float* x, int64_t stride, float* out) {
  const int most = outer_columns(X), count = static_cast<int>((columns + most - 1) / most);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(columns, count, i);
    outer_tile_of<X>(size, s, rows, x, stride, out);
    s += size * R;
    out += size * stride;
  }
}

template <int X = outer_lanes>
inline void outer_lanes_by_size(int size, const float* s, int64_t columns, int64_t rows, const float* x, int64_t stride,
                                float* out) {
  if constexpr (X > 0) {
    if (size == X) return outer_lanes_of<X>(s, columns, rows, x, stride, out);
    outer_lanes_by_size<X - 1>(size, s, columns, rows, x, stride, out);
  }
}

// s (columns, R), x (rows, stride), out (columns, stride); stride counts whole vectors.
inline void add_outer(const float* s, int64_t columns, int64_t rows, const float* x, int64_t stride, float* out) {
  const int64_t vectors = stride / W;
  const int count = static_cast<int>((vectors + outer_lanes - 1) / outer_lanes);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(vectors, count, i);
    outer_lanes_by_size(size, s, columns, rows, x, stride, out);
    x += size * W;
    out += size * W;
  }
}
