// The host's side of a call: what is served, how it is spread over the device, what an error code means.
#include "attention.h"

#include <algorithm>

#include "launch.h"
#include "token_side.cuh"

namespace sdattn::cuda {
namespace {

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Whether rows of this tensor may be read and written 16 bytes at a time.
bool whole(const Tensor4& x, int size) {
  bool found = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) found = found && x.stride[i] * size % 16 == 0;
  return found;
}

struct Device {
  int processors = 0, shared_bytes = 0, major = 0, minor = 0;
};

// Keys, values and the columns' side in shared memory, all at once or, where they do not fit, piece by piece.
void lay_out(Launch& l, Grid& grid, int size, int limit) {
  const Attention& a = l.call.attention;
  const int side = rows::side_bytes(l.columns);
  const int planes = static_cast<int>(up(a.Dv, 8) / 8), plane = 8 * size * l.columns;
  l.stream = int64_t(l.key_bytes) * l.columns + int64_t(planes) * plane + side > limit;
  int next = 0;
  const auto take = [&](int bytes) {
    const int here = next;
    next = static_cast<int>(up(next + bytes, 16));
    return here;
  };
  take((l.stream ? 32 : l.key_bytes) * l.columns);
  l.values = take((l.stream ? 1 : planes) * plane);
  l.masks = take(l.columns / 2 * 4 * rows::phrase_words * 4);
  l.gates = take(4 * l.columns);
  l.slots = take(4 * l.columns);
  l.order = take(2 * l.columns);
  l.position = take(2 * l.columns);
  l.leaders = take(2 * l.columns);
  l.phrases = take(2 * l.columns);
  l.numbers = take(sizeof(rows::Numbers));
  grid.shared_bytes = static_cast<size_t>(next);
}

// Blocks of four warps, fewer where the device would stand idle; they walk over tiles of rows where that still leaves
// every multiprocessor three of them, for what a block does first is dear.
void spread(Launch& l, Grid& grid, int rows_of_warp, int processors) {
  const Attention& a = l.call.attention;
  const int64_t heads = l.mean ? a.B : a.B * a.H;
  int warps = rows::threads / 32;
  const auto tiles = [&] { return up(a.M, int64_t(rows_of_warp) * warps) / (int64_t(rows_of_warp) * warps); };
  while (warps > 1 && tiles() * heads < processors) warps /= 2;
  l.tiles = 1;
  const bool walks = !l.mean && grid.kind != rows::any_shape;
  while (walks && l.tiles * 2 <= tiles() && tiles() / (l.tiles * 2) * heads >= 3 * processors) l.tiles *= 2;
  l.groups = static_cast<int32_t>(up(tiles(), l.tiles) / l.tiles);
  grid.threads = 32 * warps;
  grid.blocks = static_cast<int>(l.groups * heads);
}

}  // namespace
}  // namespace sdattn::cuda

using namespace sdattn;
using namespace sdattn::cuda;

int sdattn_cuda_attention(const Call* call, void* stream) {
  const Attention& a = call->attention;
  if (a.B * a.H * a.M == 0) return ok;
  if (a.N < 1 || a.N > max_tokens || a.D < 1 || a.D > max_dim || a.Dv < 1 || a.Dv > max_dim) return bad_size;
  if (a.M > (int64_t(1) << 30) || a.B * a.H > (int64_t(1) << 30)) return bad_size;
  if (a.picture != nullptr || a.packed != nullptr || a.out_bias != nullptr) return bad_size;
  if (a.dtype != float32 && a.dtype != float16 && a.dtype != bfloat16) return bad_dtype;
  Device device;
  const int error =
      current_device_properties(&device.processors, &device.shared_bytes, &device.major, &device.minor);
  if (error != ok) return error;
  if (device.major < 8) return too_old;

  const int size = a.dtype == float32 ? 4 : 2;
  Launch l;
  Grid grid;
  l.call = *call;
  l.scale = a.scale * 1.44269504088896340736f;
  l.columns = static_cast<int32_t>(a.N <= 80 ? 80 : up(a.N, 16));  // five blocks of 16 are never left out
  l.mean = a.maps != nullptr && a.program.capture_mean;
  l.whole_query = whole(a.query, size);
  l.whole_key = whole(a.key, size);
  l.whole_value = whole(a.value, size);
  l.whole_out = whole(a.out, size);
  grid.wide = a.N > 80;
  grid.content = a.program.content == nullptr ? 0 : static_cast<int>(std::min(call->max_content, a.N));

  l.key_bytes = static_cast<int32_t>(a.D * size);
  lay_out(l, grid, size, device.shared_bytes);
  // A tensor core takes 16 bytes of a row at the least, of float32 32.
  const int granule = a.dtype == float32 ? 32 : 16;
  const bool whole_rows = l.whole_query && l.whole_key && l.whole_value && l.whole_out && a.D * size % granule == 0 &&
                          a.Dv % 8 == 0 && !l.stream;
  const bool alone = a.bias.data == nullptr && a.maps == nullptr && a.bits == nullptr && l.scale > 0.0f && a.N > 64 &&
                     !(a.program.content != nullptr && a.program.random_ratio >= 0.0f);
  grid.kind = !whole_rows || (grid.wide && (!alone || a.dtype == float32)) ? rows::any_shape
              : alone                                                      ? rows::bare
                                                                           : rows::equipped;
  if (grid.kind == rows::any_shape) {
    l.key_bytes = static_cast<int32_t>(up(a.D * size, 32));
    lay_out(l, grid, size, device.shared_bytes);
  }
  spread(l, grid, 16, device.processors);
  if (a.dtype == float32) return launch_float32(l, grid, stream);
  return a.dtype == float16 ? launch_float16(l, grid, stream) : launch_bfloat16(l, grid, stream);
}
