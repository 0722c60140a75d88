// Packing: keys and values of one head, columns permuted, into the panels of `product`. Included by kernel.inl.

template <class E>
inline int64_t panel_size(int64_t columns, int64_t depth) { return round_up(columns * steps_of<E>(depth), 16); }

// Keys: a column is a row of memory.
template <class E>
inline void pack_keys(const Attention& a, const typename E::Scalar* key, const int32_t* order, float* panel) {
  const int count = tiles(a.N);
  const int64_t steps = steps_of<E>(a.D);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(a.N, count, i);
    for (int64_t first = 0; first < size; first += W) {
      const int here = static_cast<int>(at_most(W, size - first));
      for (int64_t s = 0; s < steps; s += W) {
        const int left = static_cast<int>(a.D - s * E::per_step);
        F r[W];
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) {
          r[c] = E::load(key + order[first + (c < here ? c : 0)] * a.key.stride[2] + s * E::per_step, left);
        }
        transpose(r);
        const int64_t deep = at_most(W, steps - s);
        for (int64_t k = 0; k < deep; ++k) V::store_n(panel + (s + k) * size + first, r[k], here);
      }
    }
    panel += size * steps;
    order += size;
  }
}

// Values: a column is a column of memory.
template <class E>
inline void pack_values(const Attention& a, const typename E::Scalar* value, const int32_t* order, float* panel) {
  const int count = tiles(a.Dv);
  for (int i = 0; i < count; ++i) {
    const int size = tile_size(a.Dv, count, i);
    for (int64_t n = 0; n < a.N; n += E::per_step) {
      const auto* low = value + order[n] * a.value.stride[2];
      const auto* high = n + E::per_step <= a.N ? value + order[n + E::per_step - 1] * a.value.stride[2] : nullptr;
      for (int c = 0; c < size; c += W) {
        const int here = size - c < W ? size - c : W;
        V::store_n(panel + c, E::load_both(low + c, high ? high + c : nullptr, here), here);
      }
      panel += size;
    }
    value += size;
  }
}

template <class E>
void pack_head(const Job& job, char* to, int64_t b, int64_t h) {
  using Scalar = typename E::Scalar;
  const Attention& a = *job.call;
  const int32_t* order = job.entries[b].order;
  float* packed = reinterpret_cast<float*>(to + (b * a.H + h) * job.packed_bytes);
  pack_keys<E>(a, static_cast<const Scalar*>(a.key.data) + b * a.key.stride[0] + h * a.key.stride[1], order, packed);
  pack_values<E>(a, static_cast<const Scalar*>(a.value.data) + b * a.value.stride[0] + h * a.value.stride[1], order,
                 packed + panel_size<E>(a.N, a.D));
}

template <class E>
inline size_t packed_bytes_of(const Attention& a) {
  static_assert(sizeof(typename E::Element) == sizeof(float), "panels are written by lanes");
  return static_cast<size_t>(panel_size<E>(a.N, a.D) + panel_size<E>(a.Dv, a.N)) * sizeof(float);
}
