// The row in reverse: from the gradient of the program's probabilities to that of the logits, given the forward pass's
// decisions. Included by kernel.inl.

// x where the row's entry of this token was kept, else 0, R rows. words: [word][R].
inline void keep(float* x, const uint32_t* words, int32_t token) {
  const uint32_t* word = words + token / 32 * R;
  uint32_t u[R];
  std::memcpy(u, x, sizeof u);
  for (int r = 0; r < R; ++r) u[r] &= 0u - (word[r] >> (token % 32) & 1u);
  std::memcpy(x, u, sizeof u);
}

inline void load_words(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t rows, uint32_t* words) {
  const int64_t count = (a.N + 31) / 32;
  const auto* from = reinterpret_cast<const uint32_t*>(a.bits) + ((b * a.H + h) * a.M + m) * count;
  for (int64_t w = 0; w < count; ++w) {
    for (int64_t r = 0; r < R; ++r) words[w * R + r] = from[at_most(r, rows - 1) * count + w];
  }
}

// column[R] += weight * grad[rows]
inline void add_map(float* column, const float* grad, int64_t rows, float weight) {
  for (int half = 0; half < 2 && half * W < rows; ++half) {
    const F v = V::load_n(grad + half * W, static_cast<int>(at_most(W, rows - half * W)));
    V::store(column + half * W, V::fma(v, V::set(weight), V::load(column + half * W)));
  }
}

// The captured maps' gradients, added to the columns of g.
inline void add_grad_of_maps(const BackwardJob& job, int64_t b, int64_t h, int64_t m, int64_t rows, float* g) {
  const Attention& f = job.call->forward;
  const RowProgram& p = f.program;
  const float* grad = job.call->grad_maps + (p.capture_mean ? b : b * f.H + h) * p.capture_count * f.M + m;
  for (int64_t t = 0; t < p.capture_count; ++t, grad += f.M) {
    add_map(g + job.entries[b].position[p.capture_tokens[t]] * R, grad, rows, p.capture_mean ? job.head_weight : 1.0f);
  }
}

// Steps 2 to 6 again, for W rows: a from p, given the decisions. Step 6 made a = y * factor of what steps 2 to 5 left,
// y, so dy = (da - mean) * factor; with "content" the mean is the gradient of the mass to regain, too.
struct Regain {
  F factor, mean;
};

inline Regain renormalised(const Attention& f, int64_t content, F mass, const float* g, float* a) {
  const F zero = V::set(0.0f), one = V::set(1.0f);
  const int32_t how = f.program.renormalize;
  if (how == renormalize_none) return {one, zero};
  const int64_t columns = how == renormalize_row ? f.N : content;
  F left = zero, dot = zero;
  for (int64_t c = 0; c < columns; ++c) {
    const F y = V::load(a + c * R);
    left = left + y;
    dot = V::fma(V::load(g + c * R), y, dot);
  }
  const auto nothing = V::lt(left, V::set(least_sum));
  const F by = V::select(nothing, one, one / left);
  const F factor = how == renormalize_row ? by : mass * by;
  for (int64_t c = 0; c < columns; ++c) V::store(a + c * R, V::load(a + c * R) * factor);
  return {factor, V::select(nothing, zero, dot * by)};
}

// relevance += max(g, 0) * a, summed over the heads that come here: relevance as GradCAM has it.
inline void add_relevance(const Backward& w, const Entry& entry, int64_t b, int64_t m, int64_t rows, const float* a,
                          const float* g) {
  float* to = w.relevance + b * w.relevance_count * w.forward.M + m;
  for (int64_t t = 0; t < w.relevance_count; ++t, to += w.forward.M) {
    const int64_t column = entry.position[w.relevance_tokens[t]] * R;
    for (int half = 0; half < 2 && half * W < rows; ++half) {
      const int n = static_cast<int>(at_most(W, rows - half * W));
      const F positive = V::max(V::load(g + column + half * W), V::set(0.0f));
      V::store_n(to + half * W, V::fma(positive, V::load(a + column + half * W), V::load_n(to + half * W, n)), n);
    }
  }
}

// sum[column][W] += x[column][R], both halves.
inline void add_lanes(const float* x, int64_t columns, float* sum) {
  for (int64_t c = 0; c < columns; ++c) {
    V::store(sum + c * W, V::load(sum + c * W) + V::load(x + c * R) + V::load(x + c * R + W));
  }
}

inline void add_grad_of_bias(const Tensor4& grad, const Entry& entry, int64_t columns, int64_t b, int64_t h, int64_t m,
                             int64_t rows, const float* g) {
  float* to = static_cast<float*>(grad.data) + b * grad.stride[0] + h * grad.stride[1] + m * grad.stride[2];
  for (int64_t r = 0; r < rows; ++r, to += grad.stride[2]) {
    for (int64_t c = 0; c < columns; ++c) to[entry.order[c] * grad.stride[3]] += g[c * R + r];
  }
}

// p, probabilities, and g, the gradient of the program's, to a, the program's probabilities, and to g, the gradient of
// the logits. Steps 2 to 6 forward, given the decisions, then backward.
inline void reverse_row(const BackwardJob& job, const uint32_t* words, const F* mass, int64_t content, int64_t b,
                        int64_t h, int64_t m, int64_t rows, const float* p, float* a, float* g, float* gate_sums) {
  const Backward& w = *job.call;
  const Attention& f = w.forward;
  const Entry& entry = job.entries[b];
  const float* gate = entry.gate ? entry.gate + (f.program.gate_heads == 1 ? 0 : h) * f.N : nullptr;
  const bool counts = !f.program.head_mode || f.program.head_mode[h] == head_program || !f.program.capture_mean;
  const bool maps = w.grad_maps && counts;
  if (maps && f.program.capture_final) add_grad_of_maps(job, b, h, m, rows, g);

  std::memcpy(a, p, static_cast<size_t>(f.N * R) * sizeof(float));
  if (gate && content) gate_columns(a, gate, content);
  if (entry.phrases && content) {
    phrase_means(a, entry);
    phrase_means(a + W, entry);
  }
  const auto decide = [&](float* x) {
    for (int64_t c = 0; words && c < content; ++c) keep(x + c * R, words, entry.order[c]);
  };
  decide(a);
  Regain regain[2] = {{V::set(1.0f), V::set(0.0f)}, {V::set(1.0f), V::set(0.0f)}};
  for (int i = 0; i < 2 && content; ++i) regain[i] = renormalised(f, content, mass[i], g + i * W, a + i * W);
  if (w.relevance && (!w.relevance_heads || w.relevance_heads[h])) add_relevance(w, entry, b, m, rows, a, g);

  if (content && f.program.renormalize != renormalize_none) {
    const int64_t columns = f.program.renormalize == renormalize_row ? f.N : content;
    for (int64_t c = 0; c < columns; ++c) {
      for (int i = 0; i < 2; ++i) {
        float* at = g + c * R + i * W;
        V::store(at, (V::load(at) - regain[i].mean) * regain[i].factor);
      }
    }
  }
  decide(g);
  if (entry.phrases && content) {  // a mean is its own transpose
    phrase_means(g, entry);
    phrase_means(g + W, entry);
  }
  if (gate && content) {
    for (int64_t c = 0; gate_sums && c < content; ++c) {
      const F both = V::fma(V::load(p + c * R), V::load(g + c * R), V::load(p + c * R + W) * V::load(g + c * R + W));
      V::store(gate_sums + c * W, V::load(gate_sums + c * W) + both);
    }
    gate_columns(g, gate, content);
  }
  if (content && f.program.renormalize == renormalize_content) {
    for (int64_t c = 0; c < content; ++c) {
      for (int i = 0; i < 2; ++i) V::store(g + c * R + i * W, V::load(g + c * R + i * W) + regain[i].mean);
    }
  }
  if (maps && !f.program.capture_final) add_grad_of_maps(job, b, h, m, rows, g);

  for (int i = 0; i < 2; ++i) {
    const float* q = p + i * W;
    float* d = g + i * W;
    F dot = V::set(0.0f);
    for (int64_t c = 0; c < f.N; ++c) dot = V::fma(V::load(q + c * R), V::load(d + c * R), dot);
    for (int64_t c = 0; c < f.N; ++c) V::store(d + c * R, V::load(q + c * R) * (V::load(d + c * R) - dot));
  }
}
