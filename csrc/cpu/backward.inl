// Gradients of a block of rows. Included by kernel.inl: same lanes, same panels, same columns.
//
// The row is computed again from the logits, with the forward pass's decisions; then, with dA = dO V^T, down the columns
// in the reverse order of the steps to dS. Three of the five products, S, dA and dQ, are `product`, one lane a row. dK and
// dV sum over rows, so there a lane is a channel: `add_outer`.

// ---- Sums over rows -------------------------------------------------------------------------------------------------

constexpr int outer_lanes = V::tile == 12 ? 5 : 2;  // vectors of channels at a time, at most
constexpr int outer_columns(int lanes) { return (V::tile == 12 ? 27 : 12) / lanes < 12 ? (V::tile == 12 ? 27 : 12) / lanes : 12; }

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

// ---- Layout ---------------------------------------------------------------------------------------------------------

struct BackwardSpace {
  size_t query, grad, p, a, g, pairs, output, query_rows, grad_rows, kept, bytes;
};

inline BackwardSpace backward_space(const Backward& w) {
  const Attention& f = w.forward;
  const auto floats = [](int64_t n) { return static_cast<size_t>(n * R * sizeof(float)); };
  BackwardSpace s;
  s.query = 0;
  s.grad = s.query + floats(f.D);
  s.p = s.grad + floats(f.Dv);
  s.a = s.p + floats(f.N);
  s.g = s.a + floats(f.N);
  s.pairs = s.g + floats(f.N);
  s.output = s.pairs + floats((f.N + 1) / 2);
  s.query_rows = s.output + floats(round_up(f.D, W));
  s.grad_rows = s.query_rows + floats(round_up(f.D, W));
  s.kept = s.grad_rows + floats(round_up(f.Dv, W));
  s.bytes = s.kept + floats((f.N + 31) / 32);
  return s;
}

// A chunk's sums, in floats: of dK and dV by column, of the gate's and the bias's by column and lane.
struct Sums {
  int64_t key, value, gate, bias, floats;
};

inline Sums sums_of(const Backward& w) {
  const Attention& f = w.forward;
  Sums s;
  s.key = 0;
  s.value = s.key + (w.grad_key.data ? f.N * round_up(f.D, W) : 0);
  s.gate = s.value + (w.grad_value.data ? f.N * round_up(f.Dv, W) : 0);
  s.bias = s.gate + (w.grad_gate ? f.N * W : 0);
  s.floats = s.bias + (w.grad_bias_of_tokens ? f.N * W : 0);
  return s;
}

// `product`'s view of two of the operands: S = Q K^T and dQ = dS K, and dA = dO V^T.
inline Attention as_query(const Backward& w) {
  Attention a = w.forward;
  a.value = a.key;
  a.Dv = a.D;
  a.out = w.grad_query;
  return a;
}

inline Attention as_gradient(const Backward& w) {
  Attention a = w.forward;
  a.query = w.grad_out;
  a.key = a.value;
  a.D = a.Dv;
  return a;
}

template <class E>
inline size_t backward_packed_bytes_of(const Backward& w) {
  const Attention& f = w.forward;
  return static_cast<size_t>(panel_size<E>(f.N, f.D) + panel_size<E>(f.D, f.N) + panel_size<E>(f.N, f.Dv)) * sizeof(float);
}

template <class E>
void backward_pack_head(const BackwardJob& job, char* to, int64_t b, int64_t h) {
  using Scalar = typename E::Scalar;
  const Attention q = as_query(*job.call), g = as_gradient(*job.call);
  const int32_t* order = job.entries[b].order;
  float* panel = reinterpret_cast<float*>(to + (b * q.H + h) * job.packed_bytes);
  const auto* key = static_cast<const Scalar*>(q.key.data) + b * q.key.stride[0] + h * q.key.stride[1];
  const auto* value = static_cast<const Scalar*>(g.key.data) + b * g.key.stride[0] + h * g.key.stride[1];
  pack_keys<E>(q, key, order, panel);
  panel += panel_size<E>(q.N, q.D);
  pack_values<E>(q, key, order, panel);
  panel += panel_size<E>(q.D, q.N);
  pack_keys<E>(g, value, order, panel);
}

// to[row][channel], float32, from a tensor's rows; channels past the last are zero.
template <class Scalar>
inline void widen_rows(const Tensor4& x, int64_t b, int64_t h, int64_t m, int64_t rows, int64_t channels, float* to) {
  const auto* from = static_cast<const Scalar*>(x.data) + b * x.stride[0] + h * x.stride[1] + m * x.stride[2];
  for (int64_t r = 0; r < rows; ++r, from += x.stride[2]) {
    for (int64_t c = 0; c < channels; c += W, to += W) {
      V::store(to, load_widened(from + c, static_cast<int>(at_most(W, channels - c))));
    }
  }
}

// ---- The row, in reverse ----------------------------------------------------------------------------------------------

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

// Steps 2 to 6 again, for W rows: a from p, given the decisions. Step 6 made a = y * factor of what steps 2 to 5 left, y,
// so dy = (da - mean) * factor; with "content" the mean is the gradient of the mass to regain, too.
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
  for (int64_t c = 0; c < columns; ++c) V::store(sum + c * W, V::load(sum + c * W) + V::load(x + c * R) + V::load(x + c * R + W));
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
inline void reverse_row(const BackwardJob& job, const uint32_t* words, const F* mass, int64_t content, int64_t b, int64_t h,
                        int64_t m, int64_t rows, const float* p, float* a, float* g, float* gate_sums) {
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

// ---- A block, a chunk -----------------------------------------------------------------------------------------------

template <class E>
void backward_block(const BackwardJob& job, char* base, float* sums, int64_t b, int64_t h, int64_t m, int64_t rows) {
  using Scalar = typename E::Scalar;
  using Element = typename E::Element;
  const Backward& w = *job.call;
  const Attention &f = w.forward, as_q = as_query(w), as_g = as_gradient(w);
  const Entry& entry = job.entries[b];
  const BackwardSpace space = backward_space(w);
  const Sums at = sums_of(w);
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  float *p = floats(space.p), *a = floats(space.a), *g = floats(space.g);
  const uint8_t mode = f.program.head_mode ? f.program.head_mode[h] : static_cast<uint8_t>(head_program);
  const int64_t content = mode == head_program ? entry.content : 0;
  const char* keys = job.packed + (b * f.H + h) * job.packed_bytes;
  const auto* values = reinterpret_cast<const Element*>(keys) + panel_size<E>(f.N, f.D) + panel_size<E>(f.D, f.N);

  load_query<E>(as_q, b, h, m, rows, R * f.query.stride[2], floats(space.query));
  first_product<E>(as_q, entry, keys, floats(space.query), b, h, m, rows, p);
  F sum[2], mass[2];
  exponentials(p, f.N, content, nullptr, sum, mass);
  for (int i = 0; i < 2; ++i) {
    // Lanes past the last row repeat it; as zeros they add nothing to any sum.
    float ones[W];
    for (int r = 0; r < W; ++r) ones[r] = i * W + r < rows ? 1.0f : 0.0f;
    const F by = V::select(V::eq(sum[i], V::set(0.0f)), V::set(0.0f), V::load(ones) / sum[i]);
    mass[i] = mass[i] * by;
    for (int64_t c = 0; c < f.N; ++c) V::store(p + c * R + i * W, V::load(p + c * R + i * W) * by);
  }

  load_query<E>(as_g, b, h, m, rows, R * w.grad_out.stride[2], floats(space.grad));
  const F one[2] = {V::set(1.0f), V::set(1.0f)};
  product<E>(values, f.N, steps_of<E>(f.Dv), floats(space.grad), one, g);

  uint32_t* words = f.bits && content ? reinterpret_cast<uint32_t*>(base + space.kept) : nullptr;
  if (words) load_words(f, b, h, m, rows, words);
  reverse_row(job, words, mass, content, b, h, m, rows, p, a, g, w.grad_gate ? sums + at.gate : nullptr);

  if (w.grad_bias_of_tokens) add_lanes(g, f.N, sums + at.bias);
  if (w.grad_bias.data) add_grad_of_bias(w.grad_bias, entry, f.N, b, h, m, rows, g);
  if (w.grad_value.data) {
    widen_rows<Scalar>(w.grad_out, b, h, m, rows, f.Dv, floats(space.grad_rows));
    add_outer(a, f.N, rows, floats(space.grad_rows), round_up(f.Dv, W), sums + at.value);
  }
  if (w.grad_key.data) {
    widen_rows<Scalar>(f.query, b, h, m, rows, f.D, floats(space.query_rows));
    add_outer(g, f.N, rows, floats(space.query_rows), round_up(f.D, W), sums + at.key);
  }
  if (w.grad_query.data) {
    const F scale[2] = {V::set(f.scale), V::set(f.scale)};
    Workspace second;
    second.scores = space.g, second.pairs = space.pairs, second.output = space.output;
    second_product<E>(as_q, keys, second, base, scale, false);
    store_output<E>(as_q, b, h, m, rows, floats(space.output));
  }
}

template <class E>
void backward_rows_of(const BackwardJob& job, void* memory, char* to, int64_t b, int64_t h, int64_t m, int64_t rows) {
  const Backward& w = *job.call;
  const RowProgram& p = w.forward.program;
  if (p.head_mode && p.head_mode[h] == head_zero) {
    if (w.grad_query.data) {
      Attention a = as_query(w);
      zero_rows(a, b, h, m, rows);
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += R) {
    backward_block<E>(job, static_cast<char*>(memory), reinterpret_cast<float*>(to), b, h, m + i, at_most(R, rows - i));
  }
}

// The chunks' sums, added up in order and brought back from columns to tokens. `sums` becomes the total.
template <class E>
void backward_reduce_of(const BackwardJob& job, char* from, int64_t chunks, int64_t b, int64_t h) {
  using Scalar = typename E::Scalar;
  const Backward& w = *job.call;
  const Attention& f = w.forward;
  const Entry& entry = job.entries[b];
  const Sums at = sums_of(w);
  float* total = reinterpret_cast<float*>(from);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* more = total + chunk * at.floats;
    for (int64_t i = 0; i < at.floats; i += W) V::store(total + i, V::load(total + i) + V::load(more + i));
  }
  const auto store = [&](const Tensor4& grad, const float* sum, int64_t channels, float scale) {
    auto* to = static_cast<Scalar*>(grad.data) + b * grad.stride[0] + h * grad.stride[1];
    for (int64_t c = 0; c < f.N; ++c) {
      for (int64_t d = 0; d < channels; d += W, sum += W) {
        const int n = static_cast<int>(at_most(W, channels - d));
        E::store(to + entry.order[c] * grad.stride[2] + d, V::load(sum) * V::set(scale), n);
      }
    }
  };
  const auto add_up = [&](float* grad, const float* sum) {
    for (int64_t c = 0; c < f.N; ++c) {
      float all = 0.0f;
      for (int i = 0; i < W; ++i) all += sum[c * W + i];
      grad[(b * f.H + h) * f.N + entry.order[c]] = all;
    }
  };
  if (w.grad_key.data) store(w.grad_key, total + at.key, f.D, f.scale);
  if (w.grad_value.data) store(w.grad_value, total + at.value, f.Dv, 1.0f);
  if (w.grad_gate) add_up(w.grad_gate, total + at.gate);
  if (w.grad_bias_of_tokens) add_up(w.grad_bias_of_tokens, total + at.bias);
}

// ---- For the table ----------------------------------------------------------------------------------------------------

inline size_t backward_packed_bytes(const Backward& w) {
  return w.forward.dtype == bfloat16 ? backward_packed_bytes_of<Bfloat16>(w) : backward_packed_bytes_of<Float32>(w);
}

inline size_t backward_bytes(const Backward& w) { return backward_space(w).bytes; }

inline size_t backward_sums_bytes(const Backward& w) { return static_cast<size_t>(sums_of(w).floats) * sizeof(float); }

void backward_pack(const BackwardJob& job, char* to, int64_t b, int64_t h) {
  job.call->forward.dtype == bfloat16 ? backward_pack_head<Bfloat16>(job, to, b, h)
                                      : backward_pack_head<Float32>(job, to, b, h);
}

void backward_rows(const BackwardJob& job, void* workspace, char* sums, int64_t b, int64_t h, int64_t m, int64_t rows) {
  job.call->forward.dtype == bfloat16 ? backward_rows_of<Bfloat16>(job, workspace, sums, b, h, m, rows)
                                      : backward_rows_of<Float32>(job, workspace, sums, b, h, m, rows);
}

void backward_reduce(const BackwardJob& job, char* sums, int64_t chunks, int64_t b, int64_t h) {
  job.call->forward.dtype == bfloat16 ? backward_reduce_of<Bfloat16>(job, sums, chunks, b, h)
                                      : backward_reduce_of<Float32>(job, sums, chunks, b, h);
}
