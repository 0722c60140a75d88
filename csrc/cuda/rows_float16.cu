#include "launch.cuh"

int sdattn::cuda::launch_float16(const Launch& l, const Grid& grid, void* stream) {
  return launch_rows<half_t>(l, grid, stream);
}
