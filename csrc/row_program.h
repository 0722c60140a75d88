// The row program: what a kernel is told, and the small pieces of its meaning that every kernel shares.
//
// docs/design.md, "The row program", is the definition and sdattn_fast/reference.py has it as torch code. This header
// knows nothing of torch, of threads or of vectors: pointers, sizes, strides. It compiles for host and device alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SDATTN_HD __host__ __device__ __forceinline__
#else
// static: every instruction set has its own translation unit, and no copy of a function may be shared between them.
#define SDATTN_HD static inline
#endif

namespace sdattn {

constexpr int max_tokens = 256;  // N
constexpr int max_dim = 65536;   // D and Dv: a folded layer's are its channels

// Step 6 takes a smaller sum for an empty one: its inverse may not be a float.
constexpr float least_sum = 1e-30f;

enum DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };  // float16: on CUDA alone
enum Renormalize : int32_t { renormalize_none = 0, renormalize_content = 1, renormalize_row = 2 };
enum HeadMode : uint8_t { head_program = 0, head_plain = 1, head_zero = 2 };

// Steps 2 to 6 on axis "token", as sdattn_fast/plan.py lowers them (its RowPlan says what each field is).
struct RowProgram {
  const uint8_t* content = nullptr;    // (B, N), 1 for content; null: plain attention
  const float* gate = nullptr;         // (B, gate_heads, N)
  int64_t gate_heads = 1;              // 1 or H
  const int32_t* phrases = nullptr;    // (B, N), index of the phrase's first member, -1 outside
  const int32_t* drop = nullptr;       // (B,), how many of the largest content entries go
  float random_ratio = -1.0f;          // step 4, mode "random"; < 0: no such step
  const int64_t* seeds = nullptr;      // (B,)
  float threshold = -1.0f;             // step 5; < 0: no suppression
  int32_t renormalize = renormalize_none;
  const uint8_t* head_mode = nullptr;  // (H,), a HeadMode each
  const int32_t* capture_tokens = nullptr;
  int64_t capture_count = 0;
  bool capture_final = true;
  bool capture_mean = true;
};

// What a program does over the whole of a head's map, as sdattn_fast/plan.py lowers it (its PicturePlan).
struct PictureProgram {
  int64_t steps = 1;                // rounds of steps 5 to 7; the last smoothing filters the output and is not done here
  int64_t drop = 0;                 // k of step 4 on axis "space"
  bool nms = false;                 // step 5 compares with the maximum of the token's map
  const uint8_t* active = nullptr;  // (B,), null: all
  int64_t height = 0, width = 0;    // of the smoothing
  const float* weights = nullptr;   // 2 * radius + 1 of them
  int64_t radius = 0;               // 0: no smoothing
};

// A tensor of four dimensions; strides count elements, the last dimension of q, k, v and out is contiguous.
struct Tensor4 {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// One call. query (B,H,M,D), key (B,H,N,D), value (B,H,N,Dv), out (B,H,M,Dv), all of one dtype. A stride of 0 over the
// heads means what it says: all heads share one query, or all of them add to one output, which is a folded layer.
struct Attention {
  int64_t B = 0, H = 0, M = 0, N = 0, D = 0, Dv = 0;
  DType dtype = float32;
  float scale = 1.0f;
  Tensor4 query, key, value, out;
  Tensor4 bias;                        // data null: none
  DType bias_dtype = float32;
  const void* packed = nullptr;        // keys and values, already packed for this very program; null: they are not
  const float* out_bias = nullptr;     // (Dv,), added to an output that all heads share
  float* maps = nullptr;               // (B, T, M) or (B, H, T, M), contiguous; null: none
  int32_t* bits = nullptr;             // (B, H, M, ceil(N / 32)), contiguous; null: none
  RowProgram program;
  const PictureProgram* picture = nullptr;  // null: every row by itself
};

// Step 4, mode "random": u in [0, 1) from Philox4x32-10 (Salmon et al. 2011), key = the entry's seed, counter =
// (n, m, h, 0).
SDATTN_HD float philox_uniform(uint64_t seed, uint32_t n, uint32_t m, uint32_t h) {
  uint32_t x0 = n, x1 = m, x2 = h, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * x0;
    const uint64_t c = static_cast<uint64_t>(0xCD9E8D57u) * x2;
    x0 = static_cast<uint32_t>(c >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(c);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<float>(x0 >> 8) * (1.0f / 16777216.0f);
}

}  // namespace sdattn
