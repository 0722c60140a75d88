// The choice among the kernels of one dtype. Float32, which few draw in, has fewer of them.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace sdattn::cuda {

// Rows of a warp, in 16s.
template <class T>
constexpr int tiles_of = 1;

template <class T>
int launch_rows(const Launch& l, const Grid& grid, void* stream) {
  constexpr int tiles = tiles_of<T>;
  const auto with = [&](auto kernel) {
    return launch(kernel, grid.blocks, grid.threads, grid.shared_bytes, stream, l);
  };
  using namespace rows;
  if (grid.kind == any_shape) return with(rows_kernel<T, 16, 16, 1, any_shape>);
  if (grid.kind == equipped) return with(rows_kernel<T, 5, 5, 1, equipped>);
  if constexpr (!is_float<T>) {
    if (grid.wide) return with(rows_kernel<T, 16, 16, 1, bare>);
    if (grid.content > 16 && grid.content <= 32) return with(rows_kernel<T, 5, 2, tiles, bare>);
  }
  return grid.content <= 16 ? with(rows_kernel<T, 5, 1, tiles, bare>) : with(rows_kernel<T, 5, 5, tiles, bare>);
}

}  // namespace sdattn::cuda
