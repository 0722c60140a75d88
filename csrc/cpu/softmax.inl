// Step 1: bias and softmax of a block of rows, on columns of lanes. Included by kernel.inl.

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
