// What is returned beside the output: the captured tokens' maps, and the bits of what survived; and the zeros of a head
// that gives none. Included by kernel.inl.

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
