// Gradients of a block of rows. Included by kernel.inl: same lanes, same panels, same columns.
//
// The row is computed again from the logits, with the forward pass's decisions; then, with dA = dO V^T, down the
// columns in the reverse order of the steps to dS (backward_row.inl). Three of the five products, S, dA and dQ, are
// `product`, one lane a row. dK and dV sum over rows, so there a lane is a channel: `add_outer` (outer_product.inl).

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
  const int64_t floats = panel_size<E>(f.N, f.D) + panel_size<E>(f.D, f.N) + panel_size<E>(f.N, f.Dv);
  return static_cast<size_t>(floats) * sizeof(float);
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

// ---- For the table --------------------------------------------------------------------------------------------------

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
