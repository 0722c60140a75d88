// What is returned of a row beside the output: the captured tokens' maps, and the bits of what survived.
#pragma once

#include "kernel_traits.cuh"

namespace sdattn::cuda::rows {

// Columns of a row to the maps that were asked for, at m of (T, M).
template <int VALUES>
SDATTN_DEVICE void store_map(const Launch& l, const unsigned char* shared, const float (&p)[VALUES], float factor,
                             float* to, bool add) {
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

}  // namespace sdattn::cuda::rows
