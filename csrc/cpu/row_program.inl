// Steps 2 to 6: content columns only, W rows at a time; x points at the first column, columns are R apart. Included by
// kernel.inl.
//
// Everything runs on unnormalised probabilities: each decision compares entries of one row, so a common factor is
// nothing to it. Entries are >= 0; one dropped at random is -1 until step 5 has decided.

inline F sum_of(const float* x, int64_t columns) {
  F sum = V::set(0.0f);
  for (int64_t c = 0; c < columns; ++c) sum = sum + V::load(x + c * R);
  return sum;
}

inline void gate_columns(float* x, const float* gate, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    V::store(x + c * R, V::load(x + c * R) * V::set(gate[c]));
    V::store(x + c * R + W, V::load(x + c * R + W) * V::set(gate[c]));
  }
}

inline void phrase_means(float* x, const Entry& entry) {
  for (int32_t g = 0; g < entry.phrases; ++g) {
    const int32_t first = entry.phrase_start[g], last = entry.phrase_start[g + 1];
    F sum = V::set(0.0f);
    for (int32_t i = first; i < last; ++i) sum = sum + V::load(x + entry.phrase_member[i] * R);
    const F mean = sum * V::set(1.0f / static_cast<float>(last - first));
    for (int32_t i = first; i < last; ++i) V::store(x + entry.phrase_member[i] * R, mean);
  }
}

inline void drop_at_random(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, float* x) {
  const RowProgram& p = a.program;
  const auto seed = static_cast<uint64_t>(p.seeds[b]);
  for (int32_t c = 0; c < entry.content; ++c) {
    float u[W];
    for (int i = 0; i < W; ++i) {
      u[i] = philox_uniform(seed, static_cast<uint32_t>(entry.order[c]), static_cast<uint32_t>(m + i),
                            static_cast<uint32_t>(h));
    }
    float* at = x + c * R;
    V::store(at, V::select(V::lt(V::load(u), V::set(p.random_ratio)), V::set(-1.0f), V::load(at)));
  }
}

// Steps 3 to 6 for W rows from pixel m on. x: all columns' exponentials, gated; sum and mass: of all and of the content
// before the gate. Returns the factor that turns what is left in x into the program's probabilities. kept: (content, R)
// ones and zeros, or null.
inline F program(const Attention& a, const Entry& entry, int64_t b, int64_t h, int64_t m, F sum, F mass, float* x,
                 float* kept) {
  const RowProgram& p = a.program;
  const int64_t columns = entry.content;
  const F zero = V::set(0.0f), one = V::set(1.0f);
  if (entry.phrases) phrase_means(x, entry);
  if (p.random_ratio >= 0.0f) drop_at_random(a, entry, b, h, m, x);

  Kth found = {V::set(infinity), zero};
  if (entry.drop > 0) found = kth_largest(x, columns, entry.drop);
  F lower = V::set(-0.5f);  // kept: lower < x < kth
  if (p.threshold >= 0.0f) {
    if (!V::all(V::lt(zero, found.next))) found.next = largest_below(x, columns, found.kth);
    lower = V::set(p.threshold) * found.next;
  }

  F left = zero;
  for (int64_t c = 0; c < columns; ++c) {
    const F v = V::load(x + c * R);
    const F y = V::if_between(lower, v, found.kth);
    V::store(x + c * R, y);
    left = left + y;
    if (kept) V::store(kept + c * R, V::if_between(lower, v, found.kth, one));
  }

  if (p.renormalize == renormalize_row) {
    const F total = left + sum_of(x + columns * R, a.N - columns);
    // sum - sum: NaN for a row that had one, also where it was dropped.
    return V::select(V::lt(total, V::set(least_sum)), zero, one / total) + (sum - sum);
  }
  const F factor = V::select(V::eq(sum, zero), zero, one / sum);
  if (p.renormalize != renormalize_content) return factor;
  const F regain = V::select(V::lt(left, V::set(least_sum)), zero, mass / left);
  if (columns == a.N) return factor * regain + (sum - sum);
  for (int64_t c = 0; c < columns; ++c) V::store(x + c * R, V::load(x + c * R) * regain);
  return factor;
}
