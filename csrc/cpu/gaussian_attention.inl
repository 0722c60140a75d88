// out_i = sum_j exp2(-|f_i - f_j|^2) v_j over all pixels j, the filter of a fully connected CRF, without a P x P array.
// Included by kernel.inl.
//
// R rows are lanes; keys come in blocks of `gaussian_keys`, whose weights fill a tile of the first cache, and the product
// with their values is `product`, as in attention. Distances are sums of squared differences: the dot product of features
// as large as these (colours over a few units) would lose four digits to cancellation. A pair of blocks whose boxes lie
// farther apart than the cutoff is left out: the caller chooses it so that all that is left out together is below
// rounding, and orders the pixels so that blocks are small.

constexpr int64_t gaussian_keys = 64;

using sdattn::cpu::GaussianAttention;

inline int64_t gaussian_blocks(const GaussianAttention& g) { return (g.P + gaussian_keys - 1) / gaussian_keys; }

// The packed keys: a panel of values (gaussian_keys, L) a block, then a box, low and high corner, a block.
inline size_t gaussian_packed_bytes(const GaussianAttention& g) {
  return static_cast<size_t>(gaussian_blocks(g) * (gaussian_keys * g.L + 2 * g.d) * 4);
}
inline float* gaussian_box(const GaussianAttention& g, char* packed, int64_t block) {
  return reinterpret_cast<float*>(packed) + gaussian_blocks(g) * gaussian_keys * g.L + block * 2 * g.d;
}

inline void find_box(const GaussianAttention& g, int64_t first, int64_t last, float* box) {
  for (int64_t k = 0; k < g.d; ++k) {
    float low = g.features[first * g.d + k], high = low;
    for (int64_t j = first + 1; j < last; ++j) {
      const float f = g.features[j * g.d + k];
      low = f < low ? f : low;
      high = f > high ? f : high;
    }
    box[k] = low;
    box[g.d + k] = high;
  }
}

void gaussian_pack(const GaussianAttention& g, char* packed, int64_t block) {
  const int64_t first = block * gaussian_keys, here = at_most(gaussian_keys, g.P - first);
  float* panel = reinterpret_cast<float*>(packed) + first * g.L;
  const int count = tiles(g.L);
  for (int i = 0, column = 0; i < count; ++i) {
    const int size = tile_size(g.L, count, i);
    for (int64_t j = 0; j < gaussian_keys; ++j, panel += size) {
      for (int c = 0; c < size; ++c) panel[c] = j < here ? g.values[(first + j) * g.L + column + c] : 0.0f;
    }
    column += size;
  }
  find_box(g, first, first + here, gaussian_box(g, packed, block));
}

inline float squared_distance(const float* a, const float* b, int64_t d) {
  float sum = 0.0f;
  for (int64_t k = 0; k < d; ++k) {
    const float apart = a[k] > b[d + k] ? a[k] - b[d + k] : b[k] > a[d + k] ? b[k] - a[d + k] : 0.0f;
    sum += apart * apart;
  }
  return sum;
}

// weights[j][R] for `here` keys; x is (d, R).
template <int D>
inline void gaussian_weights(const float* keys, int64_t here, const float* x, float* weights) {
  F rows[D][2];
#pragma GCC unroll 8
  for (int k = 0; k < D; ++k) rows[k][0] = V::load(x + k * R), rows[k][1] = V::load(x + k * R + W);
  for (int64_t j = 0; j < here; ++j, keys += D, weights += R) {
    F sum[2] = {V::set(0.0f), V::set(0.0f)};
#pragma GCC unroll 8
    for (int k = 0; k < D; ++k) {
      const F key = V::set(keys[k]);
      const F apart[2] = {rows[k][0] - key, rows[k][1] - key};
      sum[0] = V::fma(apart[0], apart[0], sum[0]);
      sum[1] = V::fma(apart[1], apart[1], sum[1]);
    }
    V::store(weights, exp2_negative(V::set(0.0f) - sum[0]));
    V::store(weights + W, exp2_negative(V::set(0.0f) - sum[1]));
  }
}

template <int D = 8>
inline void gaussian_weights_of(int64_t d, const float* keys, int64_t here, const float* x, float* weights) {
  if constexpr (D > 0) {
    if (d == D) return gaussian_weights<D>(keys, here, x, weights);
    gaussian_weights_of<D - 1>(d, keys, here, x, weights);
  }
}

size_t gaussian_bytes(const GaussianAttention& g) {
  return static_cast<size_t>((g.d + gaussian_keys + g.L) * R + 2 * g.d) * sizeof(float);
}

// Rows from `m` on.
void gaussian(const GaussianAttention& g, char* packed, void* workspace, int64_t m) {
  float* x = static_cast<float*>(workspace);
  float* weights = x + g.d * R;
  float* o = weights + gaussian_keys * R;
  float* box = o + g.L * R;
  const int64_t rows = at_most(R, g.P - m);
  for (int64_t k = 0; k < g.d; ++k) {
    for (int64_t r = 0; r < R; ++r) x[k * R + r] = g.features[(m + at_most(r, rows - 1)) * g.d + k];
  }
  find_box(g, m, m + rows, box);
  std::memset(o, 0, g.L * R * sizeof(float));
  const F one[2] = {V::set(1.0f), V::set(1.0f)};
  for (int64_t block = 0; block < gaussian_blocks(g); ++block) {
    if (squared_distance(box, gaussian_box(g, packed, block), g.d) > g.cutoff) continue;
    const int64_t first = block * gaussian_keys, here = at_most(gaussian_keys, g.P - first);
    gaussian_weights_of(g.d, g.features + first * g.d, here, x, weights);
    if (here < gaussian_keys) std::memset(weights + here * R, 0, (gaussian_keys - here) * R * sizeof(float));
    product<Float32, true>(reinterpret_cast<float*>(packed) + first * g.L, g.L, gaussian_keys, weights, one, o);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < g.L; ++l) g.out[(m + r) * g.L + l] = o[l * R + r];
  }
}
