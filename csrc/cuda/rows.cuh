// Attention of rows over few keys, with the row program between the two products: steps 1 to 6 and 8 of
// docs/design.md, "The row program".
//
// A warp has 16 rows, or 32; a row of logits lies whole in the registers of four lanes, so there is no online softmax
// and the map never exists in memory. Columns are permuted on the way into shared memory, content tokens first, so that
// tile A (16, 32 or all columns) holds whatever the program decides about. A block keeps keys and values of one head in
// shared memory and walks over tiles of rows; after they have arrived its warps do not wait for one another.
//
// Products along D and sums over keys may go in any order, if both factors agree on it. So a lane's share of a row of
// the query is 16 contiguous bytes in memory, and goes from there to the registers that mma.sync wants; the keys lie in
// planes that give the same share with one conflict-free access; and columns of V are permuted so that a lane's share
// of a row of the output is contiguous as well. D = 40 is 32 + 8: no padding to a power of two.
//
// Tensor cores by mma.sync on every target. wgmma would take both products of 64 rows at once, but at 77 columns they
// are a tenth of the instructions (docs/kernels.md counts them): the rows are what costs.
//
// Each part has a file: token_side.cuh and staging.cuh fill shared memory; mainloop.cuh takes a warp's rows through
// qk_gemm.cuh, softmax.cuh, row_program.cuh (select.cuh: the k-th largest), capture.cuh and pv_gemm.cuh; epilogue.cuh
// stores the output.
#pragma once

#if defined(__CUDACC__)
#pragma nv_diag_suppress 128  // a kernel of one kind never reaches the loops of another
#endif

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "staging.cuh"
#include "token_side.cuh"

namespace sdattn::cuda {

// BLOCKS: of 16 columns, at most 16; with 5 or fewer they are all there, beyond those that N needs. A: of 16 columns,
// those of tile A. TILES: of 16 rows, of a warp.
template <class T, int BLOCKS, int A, int TILES, int KIND>
SDATTN_KERNEL void SDATTN_BOUNDS(rows::threads, (rows::resident(sizeof(T), BLOCKS, A, KIND)))
    rows_kernel(const SDATTN_PARAMETER Launch l) {
  using namespace rows;
  unsigned char* shared = shared_memory();
  const Attention& a = l.call.attention;
  const RowProgram& program = a.program;
  const int lane = thread_index() & 31, warp = thread_index() / 32, warps = threads_of_block() / 32;

  const int tiles = KIND >= any_shape ? 1 : l.tiles;
  const int heads = static_cast<int>(a.H), place = block_index() / l.groups, group = block_index() % l.groups;
  Head head;
  head.b = KIND >= equipped && l.mean ? place : place / heads;
  const int from = KIND >= equipped && l.mean ? 0 : place % heads, to = KIND >= equipped && l.mean ? heads : from + 1;
  for (int h = from; h < to; ++h) {
    head.h = h;
    const int mode = program.head_mode == nullptr ? head_program : program.head_mode[h];
    const bool programmed = program.content != nullptr && mode == head_program;
    if (mode == head_zero) {
      zero_head<T, KIND>(l, head, int64_t(group) * tiles * warps * 16 * TILES, tiles * warps * 16 * TILES);
      continue;
    }
    sync_block();  // nobody reads the last head's any more
    token_side<A, KIND>(l, shared, head.b, h, programmed, mode == head_program);
    const bool resident = !(KIND >= any_shape && l.stream);
    if (resident) stage_head<T, KIND>(l, head, shared);

    const auto row_of = [&](int tile) {
      return ((group * tiles + tile) * warps + warp) * (16 * TILES) + (lane >> 2);
    };
    const bool sliced = KIND < any_shape && l.key_bytes >= 64;
    Share<4> first[TILES];
    if (sliced) load_share<T, KIND>(l, head, row_of(0), 0, first);
    if (resident) {
      wait_copies<0>();
      sync_block();
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int m = row_of(tile);
      // With `stream` every warp brings its part of the keys and values, even without rows.
      if (!(KIND >= any_shape && l.stream) && m - (lane >> 2) >= a.M) break;
      Warp<T, BLOCKS, A, TILES, KIND> w{l, head, shared, m};
      w.logits(first);
      w.rows();
      if (sliced && tile + 1 < tiles) load_share<T, KIND>(l, head, row_of(tile + 1), 0, first);
      w.output();
    }
  }
}

}  // namespace sdattn::cuda
