// The kinds of kernels and their sizes; where an entry of a row and an element of a tensor lie.
#pragma once

#include "launch.h"
#include "machine.h"

namespace sdattn::cuda::rows {

constexpr int threads = 128;     // of a block, at the most

// What a kernel can do beside the program over whole, aligned rows. Each costs code that the others need not carry.
enum Kind : int {
  bare = 0,    // neither bias nor maps nor bits, no random dropout; a scale above 0, more than 64 columns
  equipped,    // those too
  any_shape,   // and any alignment, any D, keys and values that do not fit into shared memory
};

// Blocks that a multiprocessor is to hold: what registers allow without spilling.
constexpr int resident(int size, int blocks, int a, int kind) {
  return blocks > 5 || (size == 4 && kind > bare) ? 2 : size == 4 || a > 2 ? 3 : 4;
}

template <class T>
constexpr bool is_float = sizeof(T) == 4;

// Bytes of 8 columns of V for one key.
template <class T>
constexpr int value_plane = 8 * static_cast<int>(sizeof(T));

// The column of value i of a row in this lane.
SDATTN_DEVICE int column_of(int i, int lane) { return 8 * (i / 2) + 2 * (lane & 3) + (i & 1); }

// Which head of which entry.
struct Head {
  int b, h;
};

template <class T>
SDATTN_DEVICE T* at(const Tensor4& x, const Head& head) {
  return static_cast<T*>(x.data) + head.b * x.stride[0] + head.h * x.stride[1];
}

}  // namespace sdattn::cuda::rows
