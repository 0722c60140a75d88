// Attention of rows over few keys, with the row program between the two products: steps 1 to 6 and 8 of
// docs/design.md, "The row program".
//
// A warp has 16 rows, or 32; a row of logits lies whole in the registers of four lanes, so there is no online softmax
// and the map never exists in memory. Columns are permuted on the way into shared memory, content tokens first, so that
// tile A (16, 32 or all columns) holds whatever the program decides about. A block keeps keys and values of one head in
// shared memory and walks over tiles of rows; after they have arrived its warps do not wait for one another.
//
// Products along D and sums over keys may go in any order, if both factors agree on it. So a lane's share of a row of
// the query is 16 contiguous bytes in memory, and goes from there to the registers that mma.sync wants; the keys lie in
// planes that give the same share with one conflict-free access; and columns of V are permuted so that a lane's share
// of a row of the output is contiguous as well. D = 40 is 32 + 8: no padding to a power of two.
//
// Tensor cores by mma.sync on every target. wgmma would take both products of 64 rows at once, but at 77 columns they
// are a tenth of the instructions (docs/kernels.md counts them): the rows are what costs.
#pragma once

#include "attention.h"
#include "machine.h"
#include "select.cuh"

#if defined(__CUDACC__)
#pragma nv_diag_suppress 128  // a kernel of one kind never reaches the loops of another
#endif

namespace sdattn::cuda {

// What the host works out once for a launch.
struct Launch {
  Call call;
  float scale = 1.0f;       // times log2(e)
  int32_t columns = 0;      // N rounded up to 16, at least 80
  int32_t key_bytes = 0;    // of one key, D rounded up to what a product takes
  int32_t tiles = 1;        // of rows, that a block walks over
  int32_t groups = 1;       // blocks for one head, or with `mean` for one batch entry
  bool mean = false;        // maps are a mean over heads: a block walks over the heads of one tile of rows
  bool stream = false;      // keys and values do not fit, and pass through shared memory piece by piece
  bool whole_query = false, whole_key = false, whole_value = false, whole_out = false;  // 16 bytes at a time
  // Offsets in shared memory, in bytes; the keys come first.
  int32_t values = 0, order = 0, position = 0, gates = 0, slots = 0, leaders = 0, phrases = 0, masks = 0, numbers = 0;
};

namespace rows {

constexpr int threads = 128;     // of a block, at the most

// What a kernel can do beside the program over whole, aligned rows. Each costs code that the others need not carry.
enum Kind : int {
  bare = 0,    // neither bias nor maps nor bits, no random dropout; a scale above 0, more than 64 columns
  equipped,    // those too
  any_shape,   // and any alignment, any D, keys and values that do not fit into shared memory
};

constexpr int phrase_words = 2;  // a lane has at most 64 columns in tile A

// Blocks that a multiprocessor is to hold: what registers allow without spilling.
constexpr int resident(int size, int blocks, int a, int kind) {
  return blocks > 5 || (size == 4 && kind > bare) ? 2 : size == 4 || a > 2 ? 3 : 4;
}

template <class T>
constexpr bool is_float = sizeof(T) == 4;

// A tensor core takes 16 bytes of a row at the least, of float32 32.
template <class T>
constexpr int granule = is_float<T> ? 32 : 16;

// Bytes of 8 columns of V for one key.
template <class T>
constexpr int value_plane = 8 * static_cast<int>(sizeof(T));

constexpr int side_bytes(int columns) { return columns * (3 * 4 + 4 * 2 + 2 * 4 * phrase_words) + 16; }

SDATTN_DEVICE int count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// The column of value i of a row in this lane.
SDATTN_DEVICE int column_of(int i, int lane) { return 8 * (i / 2) + 2 * (lane & 3) + (i & 1); }

// Which head of which entry.
struct Head {
  int b, h;
};

// What all threads know of a head. It lies in shared memory and is read where it is used: registers are scarcer.
struct Numbers {
  int content;  // columns below are content; 0: plain attention
  int phrases;  // how many
  int drop;     // k of step 4
  float share;  // of this head in a mean over heads, 0 for one that takes no part
};

template <class T>
SDATTN_DEVICE T* at(const Tensor4& x, const Head& head) {
  return static_cast<T*>(x.data) + head.b * x.stride[0] + head.h * x.stride[1];
}

// Of a call.

SDATTN_DEVICE bool is_content(const RowProgram& p, int64_t b, int64_t tokens, int token) {
  return token < tokens && p.content[b * tokens + token] != 0;
}

// Which token is in which column, what its gate, its map's slot and its phrase are, and the head's `Numbers`. Ends with
// all of it visible.
template <int A, int KIND>
SDATTN_DEVICE void token_side(const Launch& l, unsigned char* shared, int b, int h, bool programmed,
                              bool active) {
  const RowProgram& program = l.call.attention.program;
  const int n = static_cast<int>(l.call.attention.N);
  const int lane = thread_index() & 31, threads = threads_of_block();
  auto* order = reinterpret_cast<int16_t*>(shared + l.order);
  auto* position = reinterpret_cast<int16_t*>(shared + l.position);
  auto* gates = reinterpret_cast<float*>(shared + l.gates);
  auto* slots = reinterpret_cast<int32_t*>(shared + l.slots);
  auto* leaders = reinterpret_cast<int16_t*>(shared + l.leaders);
  auto* first_of = reinterpret_cast<int16_t*>(shared + l.phrases);
  auto* masks = reinterpret_cast<uint32_t*>(shared + l.masks);
  auto* numbers = reinterpret_cast<Numbers*>(shared + l.numbers);
  const bool fused = programmed && program.phrases != nullptr;

  if (thread_index() < 32) {
    int all = 0, before = 0, found = 0;
    if (programmed) {
#pragma unroll 1
      for (int first = 0; first < n; first += 32) all += count_bits(ballot(is_content(program, b, n, first + lane)));
    }
    const uint32_t below = (1u << lane) - 1u;
#pragma unroll 1
    for (int first = 0; first < l.columns; first += 32) {
      const int token = first + lane;
      const bool mine = programmed && is_content(program, b, n, token);
      const uint32_t those = ballot(mine);
      const int rank = before + count_bits(those & below);
      if (token < n) {
        const int column = mine ? rank : all + token - rank;
        order[column] = static_cast<int16_t>(token);
        position[token] = static_cast<int16_t>(column);
      } else if (token < l.columns) {
        order[token] = -1;
        position[token] = static_cast<int16_t>(token);
      }
      before += count_bits(those);
      const bool leads = fused && mine && program.phrases[b * n + token] == token;
      const uint32_t leading = ballot(leads);
      if (leads) first_of[found + count_bits(leading & below)] = static_cast<int16_t>(token);
      found += count_bits(leading);
    }
    if (lane == 0) {
      int heads = 0;
#pragma unroll 1
      for (int i = 0; KIND >= equipped && l.mean && i < l.call.attention.H; ++i) {
        heads += program.head_mode == nullptr || program.head_mode[i] == head_program ? 1 : 0;
      }
      const float share = active && heads > 0 ? reciprocal(static_cast<float>(heads)) : 0.0f;
      *numbers = Numbers{all, found, programmed && program.drop != nullptr ? program.drop[b] : 0, share};
    }
  }
  sync_block();
  const int content = numbers->content, phrases = numbers->phrases;

#pragma unroll 1
  for (int column = thread_index(); column < l.columns; column += threads) {
    const int token = order[column];
    const bool decided = column < content;
    const int64_t row = program.gate_heads > 1 ? b * program.gate_heads + h : b;
    gates[column] = decided && program.gate != nullptr ? program.gate[row * n + token] : 1.0f;
    leaders[column] = static_cast<int16_t>(decided && fused ? program.phrases[b * n + token] : -1);
    slots[column] = -1;
  }
  sync_block();
  if (KIND >= equipped && l.call.attention.maps != nullptr) {
#pragma unroll 1
    for (int i = thread_index(); i < program.capture_count; i += threads) slots[position[program.capture_tokens[i]]] = i;
  }
  // Of every phrase, for each lane of a quad: which of its values are members.
#pragma unroll 1
  for (int i = thread_index(); i < 4 * phrases; i += threads) {
    const int leader = first_of[i / 4];
#pragma unroll
    for (int word = 0; word < phrase_words; ++word) {
      uint32_t mask = 0;
#pragma unroll 1
      for (int j = 0; j < 32 && 32 * word + j < 4 * A; ++j) {
        mask |= (leaders[column_of(32 * word + j, i % 4)] == leader ? 1u : 0u) << j;
      }
      masks[phrase_words * i + word] = mask;
    }
  }
  sync_block();
}

// Keys and values into shared memory.

// `width` bytes of every key from byte `first` on, 16 at a time: a plane of (columns, width).
template <class T, int KIND>
SDATTN_DEVICE void load_keys(const Launch& l, const Head& head, const unsigned char* shared, unsigned char* to, int first,
                             int width) {
  const auto* position = reinterpret_cast<const int16_t*>(shared + l.position);
  const Attention& a = l.call.attention;
  const int chunks = width / 16, shift = width == 64 ? 2 : width == 32 ? 1 : 0;
#pragma unroll 1
  for (int i = thread_index(); i < l.columns * chunks; i += threads_of_block()) {
    const int token = i >> shift, chunk = i & (chunks - 1);
    unsigned char* place = to + position[token] * width + chunk * 16;
    const int element = (first + chunk * 16) / static_cast<int>(sizeof(T));
    const T* from = at<T>(a.key, head) + token * a.key.stride[2] + element;
    constexpr int each = 16 / static_cast<int>(sizeof(T));
    if (token < a.N && (KIND < any_shape || (l.whole_key && element + each <= a.D))) {
      copy_async<16>(place, from);
      continue;
    }
    if constexpr (KIND < any_shape) {
      *reinterpret_cast<uint4*>(place) = uint4{0, 0, 0, 0};
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < each; ++e) {
      reinterpret_cast<T*>(place)[e] = token < a.N && element + e < a.D ? from[e] : from_float<T>(0.0f);
    }
  }
}

// Where 4-byte unit `u` (of 4 * C, or 8 * C in float32) of a key's group of C planes goes.
template <class T, int C>
SDATTN_DEVICE int value_place(int columns, int column, int u) {
  if constexpr (is_float<T>) {
    // b0 and b1 of mma are keys 2t and 2t + 1: side by side they would meet in the same banks.
    const int key = (column & ~7) | ((column & 1) << 2) | ((column & 7) >> 1);
    return (u / 8) * columns * 32 + key * 32 + (u % 8) * 4;
  }
  return (u % C) * columns * 16 + column * 16 + (u / C) * 4;
}

// Columns first .. first + 8 * C - 1 of every value.
template <class T, int C, int KIND>
SDATTN_DEVICE void load_values(const Launch& l, const Head& head, const unsigned char* shared, unsigned char* to,
                               int first) {
  const auto* position = reinterpret_cast<const int16_t*>(shared + l.position);
  const Attention& a = l.call.attention;
  constexpr int chunks = C * value_plane<T> / 16, each = 16 / static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int i = thread_index(); i < l.columns * chunks; i += threads_of_block()) {
    const int token = i / chunks, chunk = i % chunks, column = position[token];
    const int element = first + chunk * each;
    const T* from = at<T>(a.value, head) + token * a.value.stride[2] + element;
    if (token < a.N && (KIND < any_shape || (l.whole_value && element + each <= a.Dv))) {
      if constexpr (is_float<T>) {
        copy_async<16>(to + value_place<T, C>(l.columns, column, 4 * chunk), from);
      } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          copy_async<4>(to + value_place<T, C>(l.columns, column, 4 * chunk + u), from + 2 * u);
        }
      }
      continue;
    }
    if constexpr (KIND < any_shape) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        *reinterpret_cast<uint32_t*>(to + value_place<T, C>(l.columns, column, 4 * chunk + u)) = 0;
      }
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < each; ++e) {
      constexpr int in_unit = 4 / static_cast<int>(sizeof(T));
      auto* place = reinterpret_cast<T*>(to + value_place<T, C>(l.columns, column, 4 * chunk + e / in_unit));
      place[e % in_unit] = token < a.N && element + e < a.Dv ? from[e] : from_float<T>(0.0f);
    }
  }
}

// The first product.

// A lane's share of a piece of two rows of the query, 8 apart: WORDS 4-byte units each.
template <int WORDS>
struct Share {
  uint32_t low[WORDS], high[WORDS];
};

template <class T, int KIND, int WORDS>
SDATTN_DEVICE void load_row(const Launch& l, const Head& head, int m, int first, uint32_t (&to)[WORDS]) {
  const Attention& a = l.call.attention;
  constexpr int each = 4 * WORDS / static_cast<int>(sizeof(T));
  const int element = first / static_cast<int>(sizeof(T)) + (thread_index() & 3) * each;
  const T* from = at<T>(a.query, head) + m * a.query.stride[2] + element;
  if (KIND < any_shape && m >= a.M) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) to[w] = 0;
    return;
  }
  if (KIND < any_shape || (m < a.M && l.whole_query && element + each <= a.D)) {
    if constexpr (WORDS == 4) {
      const uint4 x = load16(from);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else if constexpr (WORDS == 2) {
      const uint2 x = load8(from);
      to[0] = x.x, to[1] = x.y;
    } else {
      to[0] = load4(from);
    }
    return;
  }
  T elements[each];
#pragma unroll
  for (int e = 0; e < each; ++e) elements[e] = m < a.M && element + e < a.D ? from[e] : from_float<T>(0.0f);
#pragma unroll
  for (int w = 0; w < WORDS; ++w) to[w] = word_of<T>(&elements[w * (4 / sizeof(T))]);
}

template <class T, int KIND, int WORDS, int TILES>
SDATTN_DEVICE void load_share(const Launch& l, const Head& head, int m, int first, Share<WORDS> (&to)[TILES]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    load_row<T, KIND>(l, head, m + 16 * tile, first, to[tile].low);
    load_row<T, KIND>(l, head, m + 16 * tile + 8, first, to[tile].high);
  }
}

// Four float32 of a factor, each as the sum of two TF32.
struct Split {
  uint32_t high[4], low[4];
};

SDATTN_DEVICE Split split(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
  const uint32_t a[4] = {a0, a1, a2, a3};
  Split s;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s.high[i] = to_tf32(bits_float(a[i]));
    s.low[i] = to_tf32(bits_float(a[i]) - bits_float(s.high[i]));
  }
  return s;
}

// A product of float32 to float32's accuracy by three of TF32.
SDATTN_DEVICE void multiply_split(float& c0, float& c1, float& c2, float& c3, const Split& a, uint32_t b0, uint32_t b1) {
  const uint32_t h0 = to_tf32(bits_float(b0)), h1 = to_tf32(bits_float(b1));
  const uint32_t l0 = to_tf32(bits_float(b0) - bits_float(h0)), l1 = to_tf32(bits_float(b1) - bits_float(h1));
  mma_tf32(c0, c1, c2, c3, a.low[0], a.low[1], a.low[2], a.low[3], h0, h1);
  mma_tf32(c0, c1, c2, c3, a.high[0], a.high[1], a.high[2], a.high[3], l0, l1);
  mma_tf32(c0, c1, c2, c3, a.high[0], a.high[1], a.high[2], a.high[3], h0, h1);
}

// Adds the product of a piece of the query with the same piece of the keys; keys: the plane.
template <class T, int WORDS, int TILES, int VALUES>
SDATTN_DEVICE void multiply_keys(const Launch& l, const Share<WORDS> (&q)[TILES], const unsigned char* keys,
                                 float (&p)[2 * TILES][VALUES]) {
  const int lane = thread_index() & 31;
  constexpr int splits = is_float<T> ? WORDS / 2 : 1;
  Split of_query[TILES][splits];
  if constexpr (is_float<T>) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int w = 0; w < splits; ++w) {
        const Share<WORDS>& x = q[tile];
        of_query[tile][w] = split(x.low[2 * w], x.high[2 * w], x.low[2 * w + 1], x.high[2 * w + 1]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < VALUES / 2; ++j) {
    if (VALUES > 20 && 8 * j >= l.columns) break;
    uint32_t k[WORDS];
    const unsigned char* from = keys + (32 * j + lane) * 4 * WORDS;
    if constexpr (WORDS == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      k[0] = x.x, k[1] = x.y, k[2] = x.z, k[3] = x.w;
    } else if constexpr (WORDS == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      k[0] = x.x, k[1] = x.y;
    } else {
      k[0] = *reinterpret_cast<const uint32_t*>(from);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float &c0 = p[2 * tile][2 * j], &c1 = p[2 * tile][2 * j + 1];
      float &c2 = p[2 * tile + 1][2 * j], &c3 = p[2 * tile + 1][2 * j + 1];
      if constexpr (WORDS == 1) {
        mma_k8<T>(c0, c1, c2, c3, q[tile].low[0], q[tile].high[0], k[0]);
      } else {
#pragma unroll
        for (int w = 0; w < WORDS; w += 2) {
          if constexpr (is_float<T>) {
            multiply_split(c0, c1, c2, c3, of_query[tile][w / 2], k[w], k[w + 1]);
          } else {
            const Share<WORDS>& x = q[tile];
            mma_k16<T>(c0, c1, c2, c3, x.low[w], x.high[w], x.low[w + 1], x.high[w + 1], k[w], k[w + 1]);
          }
        }
      }
    }
  }
}

// Out of line: it stands at every value of a row.
SDATTN_APART float bias_at(const void* bias, DType dtype, int64_t place) {
  if (dtype == float32) return static_cast<const float*>(bias)[place];
  if (dtype == float16) return to_float(static_cast<const half_t*>(bias)[place]);
  return to_float(static_cast<const bfloat16_t*>(bias)[place]);
}

// A row.

// What steps 4 and 5 compare: not an array, which would take as many registers again.
template <int VALUES>
struct Ranks {
  const float (&p)[VALUES];
  int content, lane;
  SDATTN_DEVICE float operator[](int i) const { return column_of(i, lane) < content ? p[i] : -1.0f; }
};

// Steps 2 to 6 on one row: unnormalised probabilities, relative to the row's largest; `total` is their sum. Leaves
// `after`, the factor that makes probabilities of them. What steps 4 and 5 take away is -0, what is left +0 at the least.
//
// Every step is the same for p and for a multiple of p, so the division by the softmax's sum is left to the output.
template <int A, int KIND, int VALUES>
SDATTN_DEVICE void row_program(const Launch& l, const unsigned char* shared, int b, int h, int m, float total,
                               float (&p)[VALUES], float& after) {
  constexpr int decided = 4 * A;
  const RowProgram& program = l.call.attention.program;
  const auto& numbers = *reinterpret_cast<const Numbers*>(shared + l.numbers);
  const int lane = thread_index() & 31, content = numbers.content, phrases = numbers.phrases, drop = numbers.drop;
  const auto is = [&](int i) { return column_of(i, lane) < content; };

  float mass = 0.0f;
  if (program.renormalize == renormalize_content) {
#pragma unroll
    for (int i = 0; i < decided; ++i) mass += is(i) ? p[i] : 0.0f;
    mass = quad_sum(mass);
  }

  // 2 and 3. The gate is 1 off content.
  if (program.gate != nullptr) {
    const auto* gates = reinterpret_cast<const float*>(shared + l.gates);
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] *= gates[column_of(i, lane)];
  }
  for (int phrase = 0; phrase < phrases; ++phrase) {
    const auto* masks = reinterpret_cast<const uint32_t*>(shared + l.masks) + phrase_words * (4 * phrase + (lane & 3));
    const uint32_t mask[2] = {masks[0], masks[1]};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < decided; ++i) sum += mask[i / 32] >> (i % 32) & 1 ? p[i] : 0.0f;
    const float size = quad_sum(static_cast<float>(count_bits(mask[0]) + count_bits(mask[1])));
    const float mean = quad_sum(sum) * reciprocal(size);  // the very same number for all members, so they tie
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] = mask[i / 32] >> (i % 32) & 1 ? mean : p[i];
  }

  // 4 and 5. An entry goes if rank >= kth or rank <= low. What takes no part ranks -1, under any probability.
  const bool random = KIND >= equipped && program.random_ratio >= 0.0f, suppresses = program.threshold >= 0.0f;
  if (random || drop > 0 || suppresses) {
    if (random) {
      const auto* order = reinterpret_cast<const int16_t*>(shared + l.order);
      const uint64_t seed = static_cast<uint64_t>(*l.call.seed);
#pragma unroll 1
      for (int j = 0; j < decided; ++j) {
        // Not unrolled, for the sake of the instruction cache: the array stays in registers by comparing j.
        const int column = column_of(j, lane);
        if (column >= content) continue;
        const float u = philox_uniform(seed, static_cast<uint32_t>(order[column]), static_cast<uint32_t>(m),
                                       static_cast<uint32_t>(h), static_cast<uint32_t>(b));
        if (u >= program.random_ratio) continue;
#pragma unroll
        for (int i = 0; i < decided; ++i) p[i] = i == j ? -0.0f : p[i];
      }
    }
    const Ranks<VALUES> rank{p, content, lane};
    float kth = bits_float(0x7f800000), low = -0.5f;
    if (drop > 0) {
      kth = KIND < any_shape ? kth_largest<decided>(rank, drop, static_cast<int>(l.call.max_drop))
                             : kth_by_bisection<decided>(rank, drop);
    }
    if (suppresses) {
      float highest = 0.0f;
#pragma unroll
      for (int i = 0; i < decided; ++i) highest = rank[i] < kth ? larger(highest, rank[i]) : highest;
      low = program.threshold * quad_max(highest);
    }
#pragma unroll
    for (int i = 0; i < decided; ++i) {
      p[i] = is(i) && (rank[i] >= kth || rank[i] <= low) ? -0.0f : p[i];
    }
  }

  // 6.
  if (program.renormalize == renormalize_content) {
    float left = 0.0f;
#pragma unroll
    for (int i = 0; i < decided; ++i) left += is(i) ? p[i] : 0.0f;
    left = quad_sum(left);
    const float factor = mass * reciprocal(left < least_sum ? 1.0f : left);
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] = is(i) ? p[i] * factor : p[i];
  } else if (program.renormalize == renormalize_row) {
    float left = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) left += p[i];
    left = quad_sum(left);
    // Here, and not after the second product: what is left of a row may be too small for half precision.
    const float factor = left < least_sum ? 0.0f : reciprocal(left);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) p[i] *= factor;
    after = total == total ? 1.0f : total;
  } else if (program.gate != nullptr) {
    // Here too: relative to the row's largest entry, what a gate amplifies may be too large for half precision.
#pragma unroll
    for (int i = 0; i < VALUES; ++i) p[i] *= after;
    after = 1.0f;
  }
}

// Columns of a row to the maps that were asked for, at m of (T, M).
template <int VALUES>
SDATTN_DEVICE void store_map(const Launch& l, const unsigned char* shared, const float (&p)[VALUES], float factor, float* to,
                             bool add) {
  const auto* slots = reinterpret_cast<const int32_t*>(shared + l.slots);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int column = column_of(i, thread_index() & 31);
    if (VALUES > 20 && column >= l.columns) break;
    in_order();
    const int slot = slots[column];
    if (slot < 0) continue;
    float& here = to[slot * l.call.attention.M];
    here = (add ? here : 0.0f) + p[i] * factor;
  }
}

// Which entries survived, 32 tokens a word, in the caller's order of tokens; protected ones always.
template <int VALUES>
SDATTN_DEVICE void store_bits(const Launch& l, const unsigned char* shared, const float (&p)[VALUES], bool inside,
                              int32_t* to) {
  // volatile: else ptxas keeps all of it in registers from one word to the next, and spills.
  const auto* order = reinterpret_cast<const volatile int16_t*>(shared + l.order);
  const int lane = thread_index() & 31, n = static_cast<int>(l.call.attention.N);
  for (int word = 0; word < (n + 31) / 32; ++word) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      const int column = column_of(i, lane);
      if (VALUES > 20 && column >= l.columns) break;
      in_order();
      const int token = order[column];
      if (float_bits(p[i]) != float_bits(-0.0f) && token >= 0 && token / 32 == word) bits |= 1u << (token % 32);
    }
    bits |= shuffle_xor(bits, 1);
    bits |= shuffle_xor(bits, 2);
    if (inside && (lane & 3) == 0) to[word] = static_cast<int32_t>(bits);
  }
}

// The second product.

// Columns first .. first + 8 * C - 1 of the output; values: their planes.
template <class T, int C, int KIND, int TILES, int BLOCKS>
SDATTN_DEVICE void multiply_values(const Launch& l, const Head& head, const unsigned char* values, int m, int first,
                                   const uint32_t (&p)[TILES][BLOCKS][is_float<T> ? 8 : 4],
                                   const float (&after)[2 * TILES]) {
  const Attention& a = l.call.attention;
  const int lane = thread_index() & 31;
  float o[TILES][C][4];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int c = 0; c < C; ++c) o[tile][c][0] = o[tile][c][1] = o[tile][c][2] = o[tile][c][3] = 0.0f;
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (BLOCKS > 5 && 16 * block >= l.columns) break;
    if constexpr (is_float<T>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split of_row[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint32_t* x = &p[tile][block][4 * half];
          of_row[tile] = split(x[0], x[1], x[2], x[3]);
        }
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const auto* v = reinterpret_cast<const uint32_t*>(values + c * l.columns * 32 + (16 * block + 8 * half) * 32);
          const uint32_t b0 = v[(lane & 3) * 8 + (lane >> 2)], b1 = v[((lane & 3) + 4) * 8 + (lane >> 2)];
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            float(&x)[4] = o[tile][c];
            multiply_split(x[0], x[1], x[2], x[3], of_row[tile], b0, b1);
          }
        }
      }
    } else {
      uint32_t v[2 * C];
      const unsigned char* from = values + (16 * block + (lane & 15)) * 16;
      if constexpr (C == 1) {
        load_matrix_x2_trans(v, from);
      } else {
#pragma unroll
        for (int c = 0; c < C; c += 2) {
          uint32_t four[4];
          load_matrix_x4_trans(four, from + (c + (lane >> 4)) * l.columns * 16);
          v[2 * c] = four[0], v[2 * c + 1] = four[1], v[2 * c + 2] = four[2], v[2 * c + 3] = four[3];
        }
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          float(&x)[4] = o[tile][c];
          const uint32_t(&of)[4] = p[tile][block];
          mma_k16<T>(x[0], x[1], x[2], x[3], of[0], of[1], of[2], of[3], v[2 * c], v[2 * c + 1]);
        }
      }
    }
  }
  const int t = lane & 3;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m + 16 * tile + 8 * half;
      if (row >= a.M) continue;
      T* to = at<T>(a.out, head) + row * a.out.stride[2] + first;
      const float factor = after[2 * tile + half];
      if (KIND < any_shape || (l.whole_out && first + 8 * C <= a.Dv)) {
        if constexpr (is_float<T>) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const float x = o[tile][c][2 * half] * factor, y = o[tile][c][2 * half + 1] * factor;
            store8(to + 8 * c + 2 * t, uint2{static_cast<uint32_t>(float_bits(x)), static_cast<uint32_t>(float_bits(y))});
          }
        } else {
          uint32_t packed[C];
#pragma unroll
          for (int c = 0; c < C; ++c) packed[c] = pack2<T>(o[tile][c][2 * half] * factor, o[tile][c][2 * half + 1] * factor);
          if constexpr (C == 4) store16(to + 8 * t, uint4{packed[0], packed[1], packed[2], packed[3]});
          if constexpr (C == 2) store8(to + 4 * t, uint2{packed[0], packed[1]});
          if constexpr (C == 1) store4(to + 2 * t, packed[0]);
        }
        continue;
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = is_float<T> ? 8 * c + 2 * t + e : 2 * C * t + 2 * c + e;
          if (first + d < a.Dv) to[d] = from_float<T>(o[tile][c][2 * half + e] * factor);
        }
      }
    }
  }
}

// All together, for the 16 * TILES rows of a warp.

template <class T, int BLOCKS, int A, int TILES, int KIND>
struct Warp {
  static constexpr int values = 4 * BLOCKS;  // of a row, in one lane

  const Launch& l;
  const Head& head;
  unsigned char* shared;
  int m;  // this lane's first row; it has m, m + 8, m + 16, ...
  float p[2 * TILES][values];
  float after[2 * TILES];

  SDATTN_DEVICE void logits(Share<4> (&first)[TILES]) {
    const Attention& a = l.call.attention;
    // The keys beyond the last are zeros, so what their columns start with stays.
#pragma unroll
    for (int i = 0; i < values; ++i) {
      const bool inside = (KIND == bare && i < 16) || column_of(i, thread_index() & 31) < a.N;
#pragma unroll
      for (int r = 0; r < 2 * TILES; ++r) p[r][i] = inside ? 0.0f : bits_float(0xff800000);
    }
    const int bytes = l.key_bytes;
    const unsigned char* keys = shared;
    Share<4> next[TILES];
    int done = 0;
    if constexpr (KIND >= any_shape) {
      // One width of everything: here the code is to be short.
      for (; done < bytes; done += 32) {
        Share<2> q[TILES];
        load_share<T, KIND>(l, head, m, done, q);
        bring_keys(done, 32);
        multiply_keys<T>(l, q, keys, p);
        if (!l.stream) keys += 32 * l.columns;
      }
      return;
    }
    for (; done + 64 <= bytes; done += 64) {
      if (done + 128 <= bytes) load_share<T, KIND>(l, head, m, done + 64, next);
      multiply_keys<T>(l, first, keys, p);
      keys += 64 * l.columns;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) first[tile] = next[tile];
    }
    if ((bytes & 32) != 0) {
      Share<2> q[TILES];
      load_share<T, KIND>(l, head, m, done, q);
      multiply_keys<T>(l, q, keys, p);
      keys += 32 * l.columns;
      done += 32;
    }
    if constexpr (!is_float<T>) {
      if ((bytes & 16) != 0) {
        Share<1> q[TILES];
        load_share<T, KIND>(l, head, m, done, q);
        multiply_keys<T>(l, q, keys, p);
      }
    }
  }

  // Row by row. Where speed is not all, one copy of the code serves them in turn.
  SDATTN_DEVICE void rows() {
    constexpr bool rolled = KIND > bare || BLOCKS > 5;
#pragma unroll(rolled ? 1 : 2 * TILES)
    for (int r = 0; r < 2 * TILES; ++r) {
      row(p[rolled ? 0 : r], after[rolled ? 0 : r], m + 8 * r);
      if constexpr (rolled) rotate();
    }
  }

  SDATTN_DEVICE void output() {
    const Attention& a = l.call.attention;
    uint32_t packed[TILES][BLOCKS][is_float<T> ? 8 : 4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const float(&low)[values] = p[2 * tile], (&high)[values] = p[2 * tile + 1];
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * block + 2 * half;
          if constexpr (is_float<T>) {
            uint32_t* to = &packed[tile][block][4 * half];
            to[0] = float_bits(low[i]), to[1] = float_bits(high[i]);
            to[2] = float_bits(low[i + 1]), to[3] = float_bits(high[i + 1]);
          } else {
            packed[tile][block][2 * half] = pack2<T>(low[i], low[i + 1]);
            packed[tile][block][2 * half + 1] = pack2<T>(high[i], high[i + 1]);
          }
        }
      }
    }
    const int planes = static_cast<int>(a.Dv + 7) / 8;
    const unsigned char* from = shared + l.values;
    int plane = 0;
    if constexpr (KIND >= any_shape) {
      for (; plane < planes; ++plane) from = group<1>(from, plane, packed);
      return;
    }
    for (; plane + 4 <= planes; plane += 4) from = group<4>(from, plane, packed);
    if ((planes & 2) != 0) from = group<2>(from, plane, packed), plane += 2;
    if ((planes & 1) != 0) group<1>(from, plane, packed);
  }

 private:
  template <int C>
  SDATTN_DEVICE const unsigned char* group(const unsigned char* values, int plane,
                                           const uint32_t (&packed)[TILES][BLOCKS][is_float<T> ? 8 : 4]) {
    if (KIND >= any_shape && l.stream) {
      sync_block();
      load_values<T, C, KIND>(l, head, shared, shared + l.values, 8 * plane);
      arrive();
    }
    multiply_values<T, C, KIND>(l, head, values, m, 8 * plane, packed, after);
    return KIND >= any_shape && l.stream ? values : values + C * value_plane<T> * l.columns;
  }

  SDATTN_DEVICE void bring_keys(int first, int width) {
    if (KIND < any_shape || !l.stream) return;
    sync_block();
    load_keys<T, KIND>(l, head, shared, shared, first, width);
    arrive();
  }

  SDATTN_DEVICE void arrive() {
    commit_copies();
    wait_copies<0>();
    sync_block();
  }

  // Step 1, steps 2 to 6, the map and the bits.
  SDATTN_DEVICE void row(float (&x)[values], float& factor, int row) {
    const Attention& a = l.call.attention;
    if constexpr (KIND >= equipped) {
      const auto* order = reinterpret_cast<const int16_t*>(shared + l.order);
      const int64_t here = head.b * a.bias.stride[0] + head.h * a.bias.stride[1] + row * a.bias.stride[2];
      const bool biased = a.bias.data != nullptr && row < a.M;
#pragma unroll
      for (int i = 0; i < values; ++i) {
        const int column = column_of(i, thread_index() & 31);
        if (column >= a.N) continue;
        x[i] *= l.scale;
        if (!biased) continue;
        in_order();
        const float more = bias_at(a.bias.data, a.bias_dtype, here + order[column] * a.bias.stride[3]);
        x[i] = fmaf(more, 1.44269504088896340736f, x[i]);
      }
    }
    float most = x[0], total = 0.0f;
#pragma unroll
    for (int i = 1; i < values; ++i) most = larger(most, x[i]);
    most = quad_max(most);
    // In units of ln 2, for exp2. Where there may be a bias, logits have the scale already.
    const float scale = KIND == bare ? l.scale : 1.0f;
    most = most == bits_float(0xff800000) ? 0.0f : most * scale;
#pragma unroll
    for (int i = 0; i < values; ++i) {
      x[i] = exp2_fast(KIND == bare ? fmaf(x[i], scale, -most) : x[i] - most);
      total += x[i];
    }
    total = quad_sum(total);
    factor = total == 0.0f ? 0.0f : reciprocal(total);
    const auto decide = [&] {
      if (numbers().content == 0) return;
      row_program<A, KIND>(l, shared, head.b, head.h, row, total, x, factor);
    };
    if constexpr (KIND == bare) {
      decide();
      return;
    }
#pragma unroll 1
    for (int final = 0; final < 2; ++final) {
      if (final != 0) decide();
      if (a.maps != nullptr && a.program.capture_final == (final != 0) && row < a.M) map(x, factor, row);
    }
    if (a.bits != nullptr) {
      int32_t* to = a.bits + ((head.b * a.H + head.h) * a.M + row) * ((a.N + 31) / 32);
      store_bits(l, shared, x, row < a.M, to);
    }
  }

  SDATTN_DEVICE const Numbers& numbers() const { return *reinterpret_cast<const Numbers*>(shared + l.numbers); }

  SDATTN_DEVICE void rotate() {
#pragma unroll
    for (int r = 0; r + 1 < 2 * TILES; ++r) {
#pragma unroll
      for (int i = 0; i < values; ++i) {
        const float x = p[r][i];
        p[r][i] = p[r + 1][i];
        p[r + 1][i] = x;
      }
      const float x = after[r];
      after[r] = after[r + 1];
      after[r + 1] = x;
    }
  }

  SDATTN_DEVICE void map(const float (&x)[values], float factor, int row) {
    const Attention& a = l.call.attention;
    const int64_t which = l.mean ? head.b : head.b * a.H + head.h;
    float* to = a.maps + which * a.program.capture_count * a.M + row;
    // Heads come in order, and this block alone has these rows: the same sum every time.
    const float share = numbers().share;
    if (l.mean) factor = share > 0.0f ? factor * share : 0.0f;
    if (!l.mean || head.h == 0 || share > 0.0f) store_map(l, shared, x, factor, to, l.mean && head.h > 0);
  }
};

// A head that gives zeros, and so do its maps and bits: `count` rows from m on.
template <class T, int KIND>
SDATTN_DEVICE void zero_head(const Launch& l, const Head& head, int64_t m, int64_t count) {
  const Attention& a = l.call.attention;
  count = m + count < a.M ? count : a.M - m;
  const int64_t bh = head.b * a.H + head.h, tokens = a.program.capture_count, words = (a.N + 31) / 32;
#pragma unroll 1
  for (int64_t i = thread_index(); i < count * a.Dv; i += threads_of_block()) {
    at<T>(a.out, head)[(m + i / a.Dv) * a.out.stride[2] + i % a.Dv] = from_float<T>(0.0f);
  }
  if constexpr (KIND == bare) return;
  const bool first_of_mean = l.mean && head.h == 0;
#pragma unroll 1
  for (int64_t i = thread_index(); a.maps != nullptr && (!l.mean || first_of_mean) && i < count * tokens;
       i += threads_of_block()) {
    a.maps[((l.mean ? head.b : bh) * tokens + i / count) * a.M + m + i % count] = 0.0f;
  }
#pragma unroll 1
  for (int64_t i = thread_index(); a.bits != nullptr && i < count * words; i += threads_of_block()) {
    a.bits[(bh * a.M + m) * words + i] = 0;
  }
}

}  // namespace rows

// BLOCKS: of 16 columns, at most 16; with 5 or fewer they are all there, beyond those that N needs. A: of 16 columns,
// those of tile A. TILES: of 16 rows, of a warp.
template <class T, int BLOCKS, int A, int TILES, int KIND>
SDATTN_KERNEL void SDATTN_BOUNDS(rows::threads, (rows::resident(sizeof(T), BLOCKS, A, KIND))) rows_kernel(const SDATTN_PARAMETER Launch l) {
  using namespace rows;
  unsigned char* shared = shared_memory();
  const Attention& a = l.call.attention;
  const RowProgram& program = a.program;
  const int lane = thread_index() & 31, warp = thread_index() / 32, warps = threads_of_block() / 32;

  const int tiles = KIND >= any_shape ? 1 : l.tiles;
  const int heads = static_cast<int>(a.H), place = block_index() / l.groups, group = block_index() % l.groups;
  Head head;
  head.b = KIND >= equipped && l.mean ? place : place / heads;
  const int from = KIND >= equipped && l.mean ? 0 : place % heads, to = KIND >= equipped && l.mean ? heads : from + 1;
  for (int h = from; h < to; ++h) {
    head.h = h;
    const int mode = program.head_mode == nullptr ? head_program : program.head_mode[h];
    const bool programmed = program.content != nullptr && mode == head_program;
    if (mode == head_zero) {
      zero_head<T, KIND>(l, head, int64_t(group) * tiles * warps * 16 * TILES, tiles * warps * 16 * TILES);
      continue;
    }
    sync_block();  // nobody reads the last head's any more
    token_side<A, KIND>(l, shared, head.b, h, programmed, mode == head_program);
    const bool resident = !(KIND >= any_shape && l.stream);
    if (resident) {
      const int bytes = l.key_bytes;
      unsigned char* plane = shared;
      int done = 0;
      const int planes = static_cast<int>(a.Dv + 7) / 8;
      unsigned char* values = shared + l.values;
      int first = 0;
      if constexpr (KIND >= any_shape) {
        for (; done < bytes; done += 32, plane += 32 * l.columns) load_keys<T, KIND>(l, head, shared, plane, done, 32);
        for (; first < planes; ++first, values += value_plane<T> * l.columns) {
          load_values<T, 1, KIND>(l, head, shared, values, 8 * first);
        }
      }
      for (; KIND < any_shape && done + 64 <= bytes; done += 64, plane += 64 * l.columns) load_keys<T, KIND>(l, head, shared, plane, done, 64);
      if (KIND < any_shape && (bytes & 32) != 0) {
        load_keys<T, KIND>(l, head, shared, plane, done, 32);
        plane += 32 * l.columns;
        done += 32;
      }
      if (KIND < any_shape && (bytes & 16) != 0) load_keys<T, KIND>(l, head, shared, plane, done, 16);
      for (; KIND < any_shape && first + 4 <= planes; first += 4, values += 4 * value_plane<T> * l.columns) {
        load_values<T, 4, KIND>(l, head, shared, values, 8 * first);
      }
      if (KIND < any_shape && (planes & 2) != 0) {
        load_values<T, 2, KIND>(l, head, shared, values, 8 * first);
        values += 2 * value_plane<T> * l.columns;
        first += 2;
      }
      if (KIND < any_shape && (planes & 1) != 0) load_values<T, 1, KIND>(l, head, shared, values, 8 * first);
      commit_copies();
    }

    const auto row_of = [&](int tile) {
      return ((group * tiles + tile) * warps + warp) * (16 * TILES) + (lane >> 2);
    };
    const bool sliced = KIND < any_shape && l.key_bytes >= 64;
    Share<4> first[TILES];
    if (sliced) load_share<T, KIND>(l, head, row_of(0), 0, first);
    if (resident) {
      wait_copies<0>();
      sync_block();
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int m = row_of(tile);
      if (!(KIND >= any_shape && l.stream) && m - (lane >> 2) >= a.M) break;  // with `stream` every warp brings its part
      Warp<T, BLOCKS, A, TILES, KIND> w{l, head, shared, m};
      w.logits(first);
      w.rows();
      if (sliced && tile + 1 < tiles) load_share<T, KIND>(l, head, row_of(tile + 1), 0, first);
      w.output();
    }
  }
}

}  // namespace sdattn::cuda
