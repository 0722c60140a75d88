// The choice among the kernels of one dtype.
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
  if (grid.kind == any_shape || (grid.kind == equipped && grid.wide)) return with(rows_kernel<T, 16, 16, 1, any_shape>);
  if (grid.kind == equipped) return with(rows_kernel<T, 5, 5, 1, equipped>);
  if (grid.wide) return with(rows_kernel<T, 16, 16, 1, bare>);
  if (grid.content <= 16) return with(rows_kernel<T, 5, 1, tiles, bare>);
  return grid.content <= 32 ? with(rows_kernel<T, 5, 2, tiles, bare>) : with(rows_kernel<T, 5, 5, tiles, bare>);
}

}  // namespace sdattn::cuda
