// Steps 1 to 8 for programs that look over the picture: a rank or a maximum over a token's map (axis "space"), or a
// smoothed map that is suppressed and renormalised again. Included by kernel.inl.
//
// A thread takes one head and keeps that head's map, a column of pixels a token, in its workspace: M * N floats, 1.3 MB
// at 64x64 pixels and 77 tokens, which lies in the second and third cache; never B * H * M * N. In that layout a token's
// map is a small picture (16 KB), so smoothing, ranks and maxima over it run in the first cache, and blocks of rows are
// columns of R pixels for everything that runs along the tokens. Tiles with a halo would compute the first product
// (1 + 2 * radius * steps / tile)^2 times, and the convolution as a matrix product costs height + width multiplications
// an entry against 2 * (radius + 1) here.
//
// With one round the map is not kept where it is larger than `largest_map`: each pass over the picture computes it anew,
// which takes about twice as long (128x128 pixels, 15 content tokens: 13.7 against 26 to 30 ms), so that memory is bounded
// whatever the picture. Between rounds it must be kept.

constexpr int64_t largest_map = 4 << 20;  // bytes

inline bool keeps_map(const Attention& a) {
  return a.picture->steps > 1 || a.M * a.N * static_cast<int64_t>(sizeof(float)) <= largest_map;
}

// From one token's pixels to the next's. A power of two would put a block's columns into one set of the cache.
inline int64_t map_stride(const Attention& a) { return round_up(a.M, R) + 16; }

// The k-th largest of non-negative floats, exactly, by three histograms of their bits, which order as the numbers do.
// NaN ranks above all, as in torch.sort.
struct Rank {
  static constexpr int levels = 3, bins = 2048;
  static constexpr int shift[levels] = {20, 10, 0}, bits[levels] = {11, 10, 10};

  uint32_t found = 0;  // the upper bits that are settled
  int64_t k = 0;       // how many of the entries that share them are to be passed

  static void count(const float* x, int64_t n, int level, uint32_t found, uint32_t* histogram) {
    const uint32_t mask = (1u << bits[level]) - 1u;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t key;
      std::memcpy(&key, x + i, 4);
      key &= 0x7fffffffu;
      if (level == 0 || key >> (shift[level] + bits[level]) == found) ++histogram[key >> shift[level] & mask];
    }
  }
  void settle(int level, const uint32_t* histogram) {
    uint32_t bin = (1u << bits[level]) - 1u;
    for (; bin > 0 && k > histogram[bin]; --bin) k -= histogram[bin];
    found = found << bits[level] | bin;
  }
  float value() const {
    float x;
    std::memcpy(&x, &found, 4);
    return x;
  }
};

struct PictureSpace {
  size_t map, smoothed, line, mass, kth, lower, ranks, histograms, bytes;
};

inline PictureSpace picture_space_of(const Attention& a) {
  const auto aligned = [](int64_t bytes) { return static_cast<size_t>(round_up(bytes, 64)); };
  const int64_t pixels = map_stride(a), width = a.picture->width + 2 * a.picture->radius + 2 * W;
  PictureSpace s;
  s.map = aligned(static_cast<int64_t>(workspace_of(a).bytes));
  s.smoothed = s.map + (keeps_map(a) ? aligned(pixels * a.N * 4) : 0);
  s.line = s.smoothed + (a.picture->steps > 1 ? aligned(pixels * 4) : 0);
  s.mass = s.line + (a.picture->steps > 1 ? aligned(width * 4) : 0);
  s.kth = s.mass + aligned(pixels * 4);
  s.lower = s.kth + aligned(a.N * 4);
  s.ranks = s.lower + aligned(a.N * 4);
  s.histograms = s.ranks + aligned(a.N * static_cast<int64_t>(sizeof(Rank)));
  s.bytes = s.histograms + aligned(Rank::bins * 4 * (keeps_map(a) ? 1 : a.N));
  return s;
}

// 0 where v >= bound, and where v <= bound; NaN stays.
inline F zero_from(F v, F bound) { return V::select(V::le(bound, v), V::set(0.0f), v); }
inline F zero_up_to(F v, F bound) { return V::select(V::le(v, bound), V::set(0.0f), v); }

// One head of one entry. maps: where its captured tokens' maps (T, M) go, or null.
template <class E>
struct Picture {
  const Job& job;
  const Attention& a;
  const Entry& entry;
  const PictureProgram& over;
  const int64_t b, h;
  char* const base;
  float* const maps;
  const Workspace w;
  const PictureSpace space;
  const char* const packed;
  const bool programmed;
  const int64_t content;  // columns
  float* const s;
  float* const map;

  Picture(const Job& job, char* base, int64_t b, int64_t h, float* maps)
      : job(job), a(*job.call), entry(job.entries[b]), over(*a.picture), b(b), h(h), base(base), maps(maps),
        w(workspace_of(a)), space(picture_space_of(a)), packed(job.packed + (b * a.H + h) * job.packed_bytes),
        programmed((!a.program.head_mode || a.program.head_mode[h] == head_program) && (!over.active || over.active[b])),
        content(programmed ? entry.content : 0), s(at(w.scores)), map(at(space.map)) {}

  float* at(size_t offset) const { return reinterpret_cast<float*>(base + offset); }
  bool captures(bool final) const { return maps && a.program.capture_final == final; }

  void run() {
    if ((a.program.head_mode && a.program.head_mode[h] == head_zero) || a.N == 0) {
      if (maps) std::memset(maps, 0, a.program.capture_count * a.M * sizeof(float));
      return zero_rows(a, b, h, 0, a.M);
    }
    if (!programmed) {
      return each_block([&](int64_t m, int64_t rows) { begin(m, rows), finish(m, rows); });
    }
    const bool kept = keeps_map(a);
    if (kept) {
      each_block([&](int64_t m, int64_t rows) { begin(m, rows), keep(m); });
    }
    const bool dropping = over.drop > 0 && content > 0;
    if (dropping) rank(kept);
    for (int64_t step = 0; step < over.steps; ++step) {
      const bool first = step == 0, last = step + 1 == over.steps, drop = first && dropping;
      if (over.nms && content > 0) find_lower(kept, drop);
      each_block([&](int64_t m, int64_t rows) {
        kept ? take(m) : begin(m, rows);
        refine(m, first, drop);
        last ? finish(m, rows) : keep(m);
      });
      if (!last && over.radius > 0) {
        for (int64_t n = 0; n < a.N; ++n) smooth(map + n * map_stride(a));
      }
    }
  }

  template <class Body>
  void each_block(const Body& body) const {
    for (int64_t m = 0; m < a.M; m += R) body(m, at_most(R, a.M - m));
  }

  // ---- A block between the products ----

  // Steps 1 to 4 but for a rank over the picture: the block's probabilities in s, its content's mass before the gate.
  void begin(int64_t m, int64_t rows) {
    float* x = at(w.query);
    load_query<E>(a, b, h, m, rows, R * a.query.stride[2], x);
    first_product<E>(a, entry, packed, x, b, h, m, rows, s);
    const float* gate = entry.gate && content ? entry.gate + (a.program.gate_heads == 1 ? 0 : h) * a.N : nullptr;
    F sum[2], mass[2];
    exponentials(s, a.N, content, captures(false) ? nullptr : gate, sum, mass);
    for (int i = 0; i < 2; ++i) {
      const F factor = V::select(V::eq(sum[i], V::set(0.0f)), V::set(0.0f), V::set(1.0f) / sum[i]);
      for (int64_t c = 0; c < a.N; ++c) V::store(s + c * R + i * W, V::load(s + c * R + i * W) * factor);
      V::store(at(space.mass) + m + i * W, mass[i] * factor);
    }
    if (captures(false)) {
      capture(m, rows);
      if (gate) gate_columns(s, gate, content);
    }
    if (content == 0) return;
    for (int i = 0; i < 2; ++i) {
      float* x = s + i * W;
      if (entry.phrases) phrase_means(x, entry);
      if (a.program.random_ratio >= 0.0f) {
        drop_at_random(a, entry, b, h, m + i * W, x);
        for (int64_t c = 0; c < content; ++c) V::store(x + c * R, V::max(V::set(0.0f), V::load(x + c * R)));
      }
      if (entry.drop > 0) {
        const F kth = kth_largest(x, content, entry.drop).kth;
        for (int64_t c = 0; c < content; ++c) V::store(x + c * R, zero_from(V::load(x + c * R), kth));
      }
    }
  }

  // Steps 5 and 6 on s, and what step 4 drops over the picture.
  void refine(int64_t m, bool first, bool drop) {
    const RowProgram& p = a.program;
    const float* kth = at(space.kth);
    const float* lower = at(space.lower);
    const F zero = V::set(0.0f), one = V::set(1.0f);
    if (content == 0 && p.renormalize != renormalize_row) return;
    for (int i = 0; i < 2; ++i) {
      float* x = s + i * W;
      F mass = zero, highest = zero, left = zero;
      for (int64_t c = 0; c < content; ++c) {
        F v = V::load(x + c * R);
        if (drop) V::store(x + c * R, v = zero_from(v, V::set(kth[c])));
        mass = mass + v;
        highest = V::max(v, highest);
      }
      if (first) mass = V::load(at(space.mass) + m + i * W);
      const F bound = V::set(p.threshold) * highest;
      for (int64_t c = 0; c < content; ++c) {
        F v = V::load(x + c * R);
        if (p.threshold >= 0.0f) V::store(x + c * R, v = zero_up_to(v, over.nms ? V::set(lower[c]) : bound));
        left = left + v;
      }
      if (p.renormalize == renormalize_none) continue;
      const bool row = p.renormalize == renormalize_row;
      const F total = row ? left + sum_of(x + content * R, a.N - content) : left;
      const F factor = V::select(V::lt(total, V::set(least_sum)), row ? one : zero, (row ? one : mass) / total);
      for (int64_t c = 0; c < (row ? a.N : content); ++c) V::store(x + c * R, V::load(x + c * R) * factor);
    }
  }

  void finish(int64_t m, int64_t rows) {
    if (captures(true)) capture(m, rows);
    const F one[2] = {V::set(1.0f), V::set(1.0f)};
    second_product<E>(a, packed, w, base, one, false);
    store_output<E>(a, b, h, m, rows, at(w.output));
  }

  void capture(int64_t m, int64_t rows) const {
    for (int64_t t = 0; t < a.program.capture_count; ++t) {
      const float* column = s + entry.position[a.program.capture_tokens[t]] * R;
      for (int half = 0; half < 2 && half * W < rows; ++half) {
        const int n = static_cast<int>(at_most(W, rows - half * W));
        V::store_n(maps + t * a.M + m + half * W, V::load(column + half * W), n);
      }
    }
  }

  void keep(int64_t m) const {
    for (int64_t n = 0; n < a.N; ++n) {
      V::store(map + n * map_stride(a) + m, V::load(s + n * R));
      V::store(map + n * map_stride(a) + m + W, V::load(s + n * R + W));
    }
  }
  void take(int64_t m) const {
    for (int64_t n = 0; n < a.N; ++n) {
      V::store(s + n * R, V::load(map + n * map_stride(a) + m));
      V::store(s + n * R + W, V::load(map + n * map_stride(a) + m + W));
    }
  }

  // ---- Over the picture ----

  // each(column, its pixels, how many) for every content column: whole maps, or block by block where none is kept.
  template <class Each>
  void each_column(bool kept, const Each& each) {
    if (kept) {
      for (int64_t c = 0; c < content; ++c) each(c, map + c * map_stride(a), a.M);
      return;
    }
    each_block([&](int64_t m, int64_t rows) {
      begin(m, rows);
      for (int64_t c = 0; c < content; ++c) each(c, s + c * R, rows);
    });
  }

  // Step 4 on axis "space": the k-th largest of each content token's map.
  void rank(bool kept) {
    Rank* ranks = reinterpret_cast<Rank*>(base + space.ranks);
    uint32_t* histograms = reinterpret_cast<uint32_t*>(base + space.histograms);
    const int64_t apart = kept ? 0 : Rank::bins;
    for (int64_t c = 0; c < content; ++c) ranks[c] = {0, over.drop};
    for (int level = 0; level < Rank::levels; ++level) {
      if (!kept) std::memset(histograms, 0, content * Rank::bins * sizeof(uint32_t));
      each_column(kept, [&](int64_t c, const float* x, int64_t n) {
        if (kept) std::memset(histograms, 0, Rank::bins * sizeof(uint32_t));
        Rank::count(x, n, level, ranks[c].found, histograms + c * apart);
        if (kept) ranks[c].settle(level, histograms);
      });
      for (int64_t c = 0; !kept && c < content; ++c) ranks[c].settle(level, histograms + c * apart);
    }
    for (int64_t c = 0; c < content; ++c) at(space.kth)[c] = ranks[c].value();
  }

  // Step 5 on axis "space": threshold times the maximum of each content token's map, of what step 4 left.
  void find_lower(bool kept, bool drop) {
    float* lower = at(space.lower);
    const float* kth = at(space.kth);
    for (int64_t c = 0; c < content; ++c) lower[c] = 0.0f;
    each_column(kept, [&](int64_t c, const float* x, int64_t n) {
      F highest = V::set(lower[c]);
      for (int64_t i = 0; i < n; i += W) {
        const F v = V::load_n(x + i, static_cast<int>(at_most(W, n - i)));
        highest = V::max(drop ? zero_from(v, V::set(kth[c])) : v, highest);
      }
      float lanes[W];
      V::store(lanes, highest);
      for (float v : lanes) lower[c] = v > lower[c] ? v : lower[c];
    });
    for (int64_t c = 0; c < content; ++c) lower[c] *= a.program.threshold;
  }

  // Step 7 on one token's map.
  void smooth(float* picture) const {
    const int64_t height = over.height, width = over.width, radius = over.radius;
    const float* weights = over.weights + radius;
    float* line = at(space.line) + radius;
    float* to = at(space.smoothed);
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; x += W) {
        const int n = static_cast<int>(at_most(W, width - x));
        F sum = V::load_n(picture + y * width + x, n) * V::set(weights[0]);
        for (int64_t k = 1; k <= radius; ++k) {
          const float* above = picture + (y >= k ? y - k : reflected(y - k, height)) * width + x;
          const float* below = picture + (y + k < height ? y + k : reflected(y + k, height)) * width + x;
          sum = V::fma(V::load_n(above, n) + V::load_n(below, n), V::set(weights[k]), sum);
        }
        V::store_n(line + x, sum, n);
      }
      for (int64_t k = 1; k <= radius; ++k) {
        line[-k] = line[reflected(-k, width)];
        line[width - 1 + k] = line[reflected(width - 1 + k, width)];
      }
      for (int64_t x = 0; x < width; x += W) {
        const int n = static_cast<int>(at_most(W, width - x));
        F sum = V::load_n(line + x, n) * V::set(weights[0]);
        for (int64_t k = 1; k <= radius; ++k) {
          sum = V::fma(V::load_n(line + x - k, n) + V::load_n(line + x + k, n), V::set(weights[k]), sum);
        }
        V::store_n(to + y * width + x, sum, n);
      }
    }
    std::memcpy(picture, to, height * width * sizeof(float));
  }
};

size_t picture_bytes(const Attention& a) { return picture_space_of(a).bytes; }

void picture(const Job& job, void* workspace, int64_t b, int64_t h, float* maps) {
  char* base = static_cast<char*>(workspace);
  job.call->dtype == bfloat16 ? Picture<Bfloat16>(job, base, b, h, maps).run()
                              : Picture<Float32>(job, base, b, h, maps).run();
}
