// Step 7: Gaussian smoothing of an output. Included by kernel.inl.
//
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
