// One translation unit a dtype: each has its kernels, compiled beside the others.
#pragma once

#include <cstddef>

namespace sdattn::cuda {

struct Launch;

// How a call is spread over blocks; Launch has the rest.
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
