// The CPU backend's face: one call of attention, one of smoothing, and the choice of the instruction set.
#pragma once

#include <cstddef>

#include "../row_program.h"

namespace sdattn::cpu {

enum Error : int { ok = 0, bad_size = 1, out_of_memory = 2 };

// Steps 1 to 6 and 8, over the picture too (no bits, no shared query or output then). `threads` is the most to use. Safe
// from several threads at once.
Error attention(const Attention& call, int threads);

// Keys and values in the panels that `attention` multiplies by, made once for many calls: the instruction set, N, D, Dv,
// dtype and content tokens must stay. `to` is aligned to 64 bytes and has room for packed_bytes(call).
size_t packed_bytes(const Attention& call);
Error pack(const Attention& call, int threads, void* to);

// Step 7 on x (B, H, height * width, C), contiguous, float32 or bfloat16, `times` times, where (B, H) is set; copies
// the rest. weights: 2 * radius + 1 numbers.
struct Smoothing {
  int64_t B = 0, H = 0, height = 0, width = 0, C = 0;
  DType dtype = float32;
  const void* x = nullptr;
  void* out = nullptr;
  const uint8_t* where = nullptr;  // null: everywhere
  const float* weights = nullptr;
  int64_t radius = 0, times = 1;
};
Error smooth(const Smoothing& call, int threads);

// out_i = sum over j of exp2(-|f_i - f_j|^2) v_j, P pixels of d <= 8 features and L values; all contiguous. Pairs farther
// apart than `cutoff`, squared, may be left out.
struct GaussianAttention {
  int64_t P = 0, d = 0, L = 0;
  const float* features = nullptr;  // (P, d)
  const float* values = nullptr;    // (P, L)
  float* out = nullptr;             // (P, L)
  float cutoff = 0.0f;
};
Error gaussian_attention(const GaussianAttention& call, int threads);

// Instruction sets in this binary that this machine runs, the widest first; null ends the list.
const char* const* available_isas();
const char* isa();                 // the one in use
bool set_isa(const char* name);    // false: not in the list

bool has_openmp();

}  // namespace sdattn::cpu
