#include "launch.cuh"

int sdattn::cuda::launch_float32(const Launch& l, const Grid& grid, void* stream) {
  return launch_rows<float>(l, grid, stream);
}
