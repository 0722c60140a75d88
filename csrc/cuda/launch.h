// How a call is launched: what a kernel is told, how its blocks are spread, and one function a dtype. Each dtype has a
// translation unit with its kernels, compiled beside the others.
#pragma once

#include <cstddef>

#include "attention.h"

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

// How a call is spread over blocks.
struct Grid {
  int blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  bool wide = false;   // more than 80 columns
  int content = 0;     // at the most, of any batch entry
  int kind = 0;        // a rows::Kind
};

int launch_float32(const Launch& l, const Grid& grid, void* stream);
int launch_float16(const Launch& l, const Grid& grid, void* stream);
int launch_bfloat16(const Launch& l, const Grid& grid, void* stream);

}  // namespace sdattn::cuda
