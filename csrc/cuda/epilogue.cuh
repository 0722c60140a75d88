// What a head that gives zeros writes: its output, and its maps and bits.
#pragma once

#include "kernel_traits.cuh"

namespace sdattn::cuda::rows {

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

}  // namespace sdattn::cuda::rows
