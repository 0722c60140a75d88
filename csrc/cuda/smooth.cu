// Smoothing of an output: `scipy.ndimage.gaussian_filter` over the picture, both directions in one launch;
// docs/design.md, "Step 7: smoothing".
//
// A block has a few rows and columns of one head's picture, and some channels. Along the height it reads what it needs
// from global memory, every thread one column and up to eight channels, which lie side by side; what comes out, float32,
// stays in shared memory, with as many columns beside the block's as the radius asks for. Along the width it reads that.
#include <algorithm>
#include <climits>

#include "attention.h"
#include "machine.h"

namespace sdattn::cuda {
namespace smoothing {

constexpr int threads = 128, rows = 4, columns = 16;  // of a block

struct Launch {
  Smoothing call;
  int32_t pieces = 0;           // of V channels, of a pixel
  int32_t pieces_of_block = 0;  // at the most
  int32_t across = 0, down = 0, through = 0;  // blocks, of one head
};

// The pixel that i stands for, with the edges reflected, as often as need be.
SDATTN_DEVICE int reflect(int i, int length) {
  while (i < 0 || i >= length) i = i < 0 ? -1 - i : 2 * length - 1 - i;
  return i;
}

// V channels, side by side; 1, or 16 bytes of them.
template <class T, int V>
SDATTN_DEVICE void read(const T* from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = to_float(*from);
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        to[i] = bits_float(word[i]);
      } else {
        to[2 * i] = to_float(T{static_cast<uint16_t>(word[i])});
        to[2 * i + 1] = to_float(T{static_cast<uint16_t>(word[i] >> 16)});
      }
    }
  }
}

template <class T, int V>
SDATTN_DEVICE void write(T* to, const float (&from)[V]) {
  if constexpr (V == 1) {
    *to = from_float<T>(from[0]);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = static_cast<uint32_t>(float_bits(from[i]));
      } else {
        word[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
      }
    }
    store16(to, uint4{word[0], word[1], word[2], word[3]});
  }
}

// Shared memory holds planes of `each` floats of every (row, column, piece), so that neighbours lie 16 bytes apart.
template <int V>
constexpr int each = V == 1 ? 1 : 4;

template <class T, int V>
SDATTN_KERNEL void SDATTN_BOUNDS(threads, 4) kernel(const SDATTN_PARAMETER Launch l) {
  const Smoothing& s = l.call;
  int64_t place = block_index();
  const int first_piece = static_cast<int>(place % l.through) * l.pieces_of_block;
  place /= l.through;
  const int x0 = static_cast<int>(place % l.across) * columns;
  place /= l.across;
  const int y0 = static_cast<int>(place % l.down) * rows;
  const int64_t head = place / l.down;

  const int height = static_cast<int>(s.height), width = static_cast<int>(s.width);
  const int pieces = l.pieces - first_piece < l.pieces_of_block ? l.pieces - first_piece : l.pieces_of_block;
  const int high = height - y0 < rows ? height - y0 : rows, wide = width - x0 < columns ? width - x0 : columns;
  const int64_t before = head * height * width * s.C + first_piece * V;
  const T* from = static_cast<const T*>(s.x) + before;
  T* to = static_cast<T*>(s.out) + before;

  if (s.where != nullptr && s.where[head] == 0) {
    for (int i = thread_index(); i < high * wide * pieces; i += threads) {
      const int64_t pixel = static_cast<int64_t>(y0 + i / (wide * pieces)) * width + x0 + i / pieces % wide;
      float x[V];
      read<T, V>(from + pixel * s.C + i % pieces * V, x);
      write<T, V>(to + pixel * s.C + i % pieces * V, x);
    }
    return;
  }

  // Reflection stays within these columns.
  const int radius = static_cast<int>(s.radius), taps = 2 * radius + 1;
  const int left = x0 < radius ? 0 : x0 - radius;
  const int span = (width - x0 - columns < radius ? width : x0 + columns + radius) - left;
  float* between = reinterpret_cast<float*>(shared_memory());
  const int plane = rows * span * pieces * each<V>;

  for (int i = thread_index(); i < span * pieces; i += threads) {
    const T* column = from + static_cast<int64_t>(left + i / pieces) * s.C + i % pieces * V;
    float sum[rows][V];
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[row][v] = 0.0f;
    }
    for (int t = 0; t < taps + rows - 1; ++t) {
      float x[V];
      read<T, V>(column + static_cast<int64_t>(reflect(y0 + t - radius, height)) * width * s.C, x);
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (t < row || t - row >= taps) continue;
        const float weight = s.weights[t - row];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[row][v] += weight * x[v];
      }
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        between[v / each<V> * plane + (row * span * pieces + i) * each<V> + v % each<V>] = sum[row][v];
      }
    }
  }
  sync_block();

  for (int i = thread_index(); i < high * wide * pieces; i += threads) {
    const int row = i / (wide * pieces), column = i / pieces % wide, piece = i % pieces;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0.0f;
    for (int t = 0; t < taps; ++t) {
      const int near = reflect(x0 + column + t - radius, width) - left;
      const float* x = between + ((row * span + near) * pieces + piece) * each<V>;
      const float weight = s.weights[t];
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight * x[v / each<V> * plane + v % each<V>];
    }
    write<T, V>(to + (static_cast<int64_t>(y0 + row) * width + x0 + column) * s.C + piece * V, sum);
  }
}

// bad_size where not even one piece of a row fits.
template <class T, int V>
int run(const Smoothing& s, int64_t shared_limit, void* stream) {
  Launch l;
  l.call = s;
  l.pieces = static_cast<int32_t>((s.C + V - 1) / V);
  const int64_t span = std::min<int64_t>(s.width, columns + 2 * s.radius), piece = rows * span * V * 4;
  const int64_t most = std::min<int64_t>(V == 1 ? 64 : 8, shared_limit / piece);
  if (most < 1) return bad_size;
  l.through = static_cast<int32_t>((l.pieces + most - 1) / most);
  l.pieces_of_block = (l.pieces + l.through - 1) / l.through;
  const int64_t across = (s.width + columns - 1) / columns, down = (s.height + rows - 1) / rows;
  const int64_t blocks = s.B * s.H * across * down * l.through;
  if (blocks > INT_MAX) return bad_size;
  l.across = static_cast<int32_t>(across);
  l.down = static_cast<int32_t>(down);
  return launch(kernel<T, V>, static_cast<int>(blocks), threads, static_cast<size_t>(piece * l.pieces_of_block), stream, l);
}

template <class T>
int run(const Smoothing& s, int64_t shared_limit, void* stream) {
  constexpr int whole = 16 / static_cast<int>(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(s.x) | reinterpret_cast<uintptr_t>(s.out)) % 16 == 0;
  if (aligned && s.C % whole == 0) {
    const int error = run<T, whole>(s, shared_limit, stream);
    if (error != bad_size) return error;
  }
  return run<T, 1>(s, shared_limit, stream);
}

}  // namespace smoothing
}  // namespace sdattn::cuda

using namespace sdattn::cuda;

int sdattn_cuda_smooth(const Smoothing* call, void* stream) {
  const Smoothing& s = *call;
  if (s.B * s.H * s.height * s.width * s.C == 0) return ok;
  if (s.weights == nullptr || s.radius < 0) return bad_size;
  if (std::max({s.radius, s.height, s.width, s.C}) > INT_MAX / 8) return bad_size;
  int multiprocessors, shared_limit, major, minor;
  if (const int error = current_device_properties(&multiprocessors, &shared_limit, &major, &minor)) return error;
  if (major < 8) return too_old;
  switch (s.dtype) {
    case sdattn::float32: return smoothing::run<float>(s, shared_limit, stream);
    case sdattn::float16: return smoothing::run<half_t>(s, shared_limit, stream);
    case sdattn::bfloat16: return smoothing::run<bfloat16_t>(s, shared_limit, stream);
  }
  return bad_dtype;
}
