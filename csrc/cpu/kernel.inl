// Steps 1 to 6 and 8 for one block of rows, in one pass: the map never exists.
//
// Included by one translation unit per instruction set, after its vector type V (vec_*.h). Everything here has internal
// linkage: a function shared with another translation unit could be that unit's, compiled for another machine.
//
// A block is R rows (pixels), one lane each, so whatever the program does along the tokens is vertical and needs no
// shuffle: S^T[n][R] = K Q^T, the program down the columns of S^T, O^T[dv][R] = V^T P^T. Both products are one routine,
// `product`, over packed panels. Columns are permuted, content first, so that the program touches those alone.
//
// Its parts are the files included below, inside the unnamed namespace and each after what it uses: they have neither
// includes nor a namespace of their own.

#include <cstddef>
#include <cstring>

#include "isa.h"

namespace {

using namespace sdattn;
using sdattn::cpu::Backward;
using sdattn::cpu::BackwardJob;
using sdattn::cpu::Entry;
using sdattn::cpu::Isa;
using sdattn::cpu::Job;
using sdattn::cpu::Smoothing;
using F = V::F;

constexpr int W = V::width;
constexpr int R = 2 * W;  // rows a block
constexpr int T = V::tile;

constexpr float log2_e = 1.44269504088896340736f;
constexpr float infinity = __builtin_inff();

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#include "gemm.inl"
#include "lanes.inl"
#include "packing.inl"
#include "softmax.inl"
#include "select.inl"
#include "row_program.inl"
#include "capture.inl"

// ---- A block of rows ------------------------------------------------------------------------------------------------

struct Workspace {
  size_t query, scores, pairs, output, kept, bytes;
};

inline Workspace workspace_of(const Attention& a) {
  const auto floats = [](int64_t n) { return static_cast<size_t>(n * R * sizeof(float)); };
  Workspace w;
  w.query = 0;
  w.scores = w.query + floats(a.D);
  w.pairs = w.scores + floats(a.N);
  w.output = w.pairs + floats((a.N + 1) / 2);
  w.kept = w.output + floats(round_up(a.Dv, W));
  w.bytes = w.kept + (a.bits ? floats(a.N) : 0);
  return w;
}

// The logits s, in units of ln 2, of a block whose query is x.
template <class E>
void first_product(const Attention& a, const Entry& entry, const char* packed, const float* x, int64_t b, int64_t h,
                   int64_t m, int64_t rows, float* s) {
  const F to_log2[2] = {V::set(a.scale * log2_e), V::set(a.scale * log2_e)};
  product<E>(reinterpret_cast<const typename E::Element*>(packed), a.N, steps_of<E>(a.D), x, to_log2, s);
  if (a.bias.data && a.bias_dtype == bfloat16) add_bias<uint16_t>(a, entry, b, h, m, rows, s);
  if (a.bias.data && a.bias_dtype == float32) add_bias<float>(a, entry, b, h, m, rows, s);
}

// o, in the workspace, from the probabilities s there, times factor; added to what is there if `add`.
template <class E>
void second_product(const Attention& a, const char* packed, const Workspace& w, char* base, const F* factor, bool add) {
  const auto* value = reinterpret_cast<const typename E::Element*>(packed) + panel_size<E>(a.N, a.D);
  float* s = reinterpret_cast<float*>(base + w.scores);
  float* o = reinterpret_cast<float*>(base + w.output);
#if defined(__AVX512BF16__)
  if constexpr (E::per_step == 2) {
    float* pairs = reinterpret_cast<float*>(base + w.pairs);
    for (int64_t n = 0; n < a.N; n += 2) {
      for (int half = 0; half < R; half += W) {
        const F high = n + 1 < a.N ? V::load(s + (n + 1) * R + half) : V::set(0.0f);
        V::store(pairs + n / 2 * R + half, V::round_pairs(V::load(s + n * R + half), high));
      }
    }
    s = pairs;
  }
#endif
  if (add) {
    product<E, true>(value, a.Dv, steps_of<E>(a.N), s, factor, o);
  } else {
    product<E>(value, a.Dv, steps_of<E>(a.N), s, factor, o);
  }
}

template <class E>
void head(const Job& job, char* base, int64_t b, int64_t h, int64_t m, int64_t rows, bool add);

// Heads h to h + heads - 1 of the rows from m on. What the heads share, a query or an output, is read or written once.
template <class E>
void block(const Job& job, void* memory, int64_t b, int64_t h, int64_t heads, int64_t m) {
  const Attention& a = *job.call;
  const Workspace w = workspace_of(a);
  char* base = static_cast<char*>(memory);
  float* x = reinterpret_cast<float*>(base + w.query);
  float* o = reinterpret_cast<float*>(base + w.output);
  const bool one_query = a.query.stride[1] == 0, one_output = a.out.stride[1] == 0;
  const int64_t rows = at_most(R, a.M - m);
  const int64_t ahead = job.heads_first && !one_query ? a.query.stride[1] : R * a.query.stride[2];
  if (one_output) {
    for (int64_t c = 0; c < a.Dv; ++c) {
      const F start = V::set(a.out_bias ? a.out_bias[c] : 0.0f);
      V::store(o + c * R, start);
      V::store(o + c * R + W, start);
    }
  }
  bool loaded = false;
  for (int64_t i = h; i < h + heads; ++i) {
    const uint8_t mode = a.program.head_mode ? a.program.head_mode[i] : static_cast<uint8_t>(head_program);
    if (a.maps && (!a.program.capture_mean || i == 0)) zero_maps(a, b, i, m, rows);
    if (mode == head_zero || a.N == 0) {
      if (!one_output) zero_rows(a, b, i, m, rows);
      if (a.bits) store_bits(a, job.entries[b], b, i, m, rows, 0, nullptr, mode != head_zero);
      continue;
    }
    if (!loaded) load_query<E>(a, b, i, m, rows, ahead, x);
    loaded = one_query;
    head<E>(job, base, b, i, m, rows, one_output);
    if (!one_output) store_output<E>(a, b, i, m, rows, o);
  }
  if (one_output) store_output<E>(a, b, 0, m, rows, o);
}

// One head of a block whose query is loaded; its output is left in the workspace, added to what is there if `add`.
template <class E>
void head(const Job& job, char* base, int64_t b, int64_t h, int64_t m, int64_t rows, bool add) {
  const Attention& a = *job.call;
  const Entry& entry = job.entries[b];
  const Workspace w = workspace_of(a);
  const uint8_t mode = a.program.head_mode ? a.program.head_mode[h] : static_cast<uint8_t>(head_program);
  const float* x = reinterpret_cast<float*>(base + w.query);
  float* s = reinterpret_cast<float*>(base + w.scores);
  float* kept = a.bits ? reinterpret_cast<float*>(base + w.kept) : nullptr;
  const char* packed = job.packed + (b * a.H + h) * job.packed_bytes;
  first_product<E>(a, entry, packed, x, b, h, m, rows, s);

  const int32_t content = mode == head_program ? entry.content : 0;
  const bool captured = a.maps && (!a.program.capture_mean || mode == head_program);
  const bool early = captured && !a.program.capture_final;  // the map is wanted as it was before the gate
  const float* gate = entry.gate ? entry.gate + (a.program.gate_heads == 1 ? 0 : h) * a.N : nullptr;
  F sum[2], mass[2], factor[2];
  exponentials(s, a.N, content, early ? nullptr : gate, sum, mass);
  for (int i = 0; i < 2; ++i) factor[i] = V::select(V::eq(sum[i], V::set(0.0f)), V::set(0.0f), V::set(1.0f) / sum[i]);
  if (early) {
    capture(job, b, h, m, rows, s, factor);
    if (gate) gate_columns(s, gate, content);
  }
  if (content > 0) {
    for (int i = 0; i < 2; ++i) {
      factor[i] = program(a, entry, b, h, m + i * W, sum[i], mass[i], s + i * W, kept ? kept + i * W : nullptr);
    }
  }
  if (captured && a.program.capture_final) capture(job, b, h, m, rows, s, factor);
  if (a.bits) store_bits(a, entry, b, h, m, rows, content, kept, true);

  second_product<E>(a, packed, w, base, factor, add);
}

// ---- Other kernels, on the same lanes ------------------------------------------------------------------------------

#include "smooth.inl"
#include "outer_product.inl"
#include "backward_row.inl"
#include "backward.inl"
#include "gaussian_attention.inl"
#include "refine.inl"

// ---- The table that attention.cpp calls through -------------------------------------------------------------------

size_t packed_bytes(const Attention& a) {
  return a.dtype == bfloat16 ? packed_bytes_of<Bfloat16>(a) : packed_bytes_of<Float32>(a);
}

size_t workspace_bytes(const Attention& a) { return workspace_of(a).bytes; }

void pack(const Job& job, char* to, int64_t b, int64_t h) {
  job.call->dtype == bfloat16 ? pack_head<Bfloat16>(job, to, b, h) : pack_head<Float32>(job, to, b, h);
}

void rows(const Job& job, void* workspace, int64_t b, int64_t h, int64_t heads, int64_t m) {
  job.call->dtype == bfloat16 ? block<Bfloat16>(job, workspace, b, h, heads, m)
                              : block<Float32>(job, workspace, b, h, heads, m);
}

void smooth(const Smoothing& s, void* workspace, int64_t bh, int64_t block) {
  s.dtype == bfloat16 ? smooth_block<Bfloat16>(s, workspace, bh, block)
                      : smooth_block<Float32>(s, workspace, bh, block);
}

constexpr Isa table(const char* name, bool (*runs_here)()) {
  return {name,         runs_here,     R,      packed_bytes, workspace_bytes, pack, rows,
          smooth_bytes, smooth_blocks, smooth, picture_bytes, picture,
          gaussian_packed_bytes, gaussian_blocks, gaussian_pack, gaussian_bytes, gaussian,
          backward_packed_bytes, backward_bytes, backward_sums_bytes, backward_pack, backward_rows, backward_reduce};
}

}  // namespace
