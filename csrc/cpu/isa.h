// What one instruction set's translation unit offers. Each is compiled from kernel.inl with its own flags.
#pragma once

#include <cstddef>

#include "attention.h"
#include "backward.h"

namespace sdattn::cpu {

// A batch entry's token side, its content columns moved to the front. Made once per call.
struct Entry {
  const int32_t* order;           // (N,) column -> token
  const int32_t* position;        // (N,) token -> column
  const float* gate;              // (gate_heads, N) by column, or null
  int32_t content;                // how many columns are content
  int32_t drop;                   // k of step 4
  int32_t phrases;                // how many
  const int32_t* phrase_start;    // (phrases + 1,) into phrase_member
  const int32_t* phrase_member;   // columns
};

// What all threads of a call share.
struct Job {
  const Attention* call;
  const Entry* entries;  // (B,)
  const char* packed;    // (B, H, packed_bytes)
  size_t packed_bytes;
  float head_weight;     // of one head in a captured mean
  bool heads_first;      // a thread goes on to the next head, else to the next rows
};

// What all threads of a backward call share.
struct BackwardJob {
  const Backward* call;
  const Entry* entries;  // (B,)
  const char* packed;    // (B, H, packed_bytes)
  size_t packed_bytes;
  float head_weight;     // of one head in a captured mean
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  int block_rows;
  size_t (*packed_bytes)(const Attention&);
  size_t (*workspace_bytes)(const Attention&);
  void (*pack)(const Job&, char* to, int64_t b, int64_t h);
  void (*rows)(const Job&, void* workspace, int64_t b, int64_t h, int64_t heads, int64_t m);
  size_t (*smooth_bytes)(const Smoothing&);
  int64_t (*smooth_blocks)(const Smoothing&);
  void (*smooth)(const Smoothing&, void* workspace, int64_t bh, int64_t block);
  size_t (*picture_bytes)(const Attention&);
  void (*picture)(const Job&, void* workspace, int64_t b, int64_t h, float* maps);
  size_t (*gaussian_packed_bytes)(const GaussianAttention&);
  int64_t (*gaussian_blocks)(const GaussianAttention&);
  void (*gaussian_pack)(const GaussianAttention&, char* packed, int64_t block);
  size_t (*gaussian_bytes)(const GaussianAttention&);
  void (*gaussian)(const GaussianAttention&, char* packed, void* workspace, int64_t m);
  size_t (*backward_packed_bytes)(const Backward&);
  size_t (*backward_bytes)(const Backward&);
  size_t (*backward_sums_bytes)(const Backward&);
  void (*backward_pack)(const BackwardJob&, char* to, int64_t b, int64_t h);
  void (*backward_rows)(const BackwardJob&, void* workspace, char* sums, int64_t b, int64_t h, int64_t m, int64_t rows);
  void (*backward_reduce)(const BackwardJob&, char* sums, int64_t chunks, int64_t b, int64_t h);
};

#if defined(__x86_64__)
extern const Isa isa_avx512_bf16, isa_avx512, isa_avx2;
#endif
extern const Isa isa_portable;

}  // namespace sdattn::cpu
