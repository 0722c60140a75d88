// Gradients of attention with the row program: one call.
#pragma once

#include "attention.h"

namespace sdattn::cpu {

// forward: the call to differentiate; its out is not read, its maps neither, and its bits, where the program decides
// anything, are what the forward pass wrote. Whatever is null is not wanted, or not given.
struct Backward {
  Attention forward;
  Tensor4 grad_out;                     // (B, H, M, Dv), of the query's dtype
  const float* grad_maps = nullptr;     // as the forward's maps
  Tensor4 grad_query, grad_key, grad_value;  // as query, key and value
  float* grad_gate = nullptr;           // (B, H, N), contiguous: per head, also of a gate that all heads share
  float* grad_bias_of_tokens = nullptr;  // (B, H, N), contiguous: of a bias that all rows share
  Tensor4 grad_bias;                    // (B, H, M, N) float32, added to what is there; a stride of 0 sums
  // (B, T, M), added to what is there: sum over the chosen heads of a * max(da, 0), a the program's probabilities and da
  // their gradient.
  float* relevance = nullptr;
  const int32_t* relevance_tokens = nullptr;  // (T,)
  int64_t relevance_count = 0;
  const uint8_t* relevance_heads = nullptr;   // (H,), null: all
};

// The same numbers whatever the threads: sums over rows go chunk by chunk, in order.
Error backward(const Backward& call, int threads);

}  // namespace sdattn::cpu
