#include "launch.cuh"

int sdattn::cuda::launch_bfloat16(const Launch& l, const Grid& grid, void* stream) {
  return launch_rows<bfloat16_t>(l, grid, stream);
}
