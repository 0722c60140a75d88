// Keys and values of a head on their way into shared memory, by asynchronous copies, columns permuted.
#pragma once

#include "token_side.cuh"

namespace sdattn::cuda::rows {

// `width` bytes of every key from byte `first` on, 16 at a time: a plane of (columns, width).
template <class T, int KIND>
SDATTN_DEVICE void load_keys(const Launch& l, const Head& head, const unsigned char* shared, unsigned char* to,
                             int first, int width) {
  const auto* position = reinterpret_cast<const int16_t*>(shared + l.position);
  const Attention& a = l.call.attention;
  const int chunks = width / 16, shift = width == 64 ? 2 : width == 32 ? 1 : 0;
#pragma unroll 1
  for (int i = thread_index(); i < l.columns * chunks; i += threads_of_block()) {
    const int token = i >> shift, chunk = i & (chunks - 1);
    unsigned char* place = to + position[token] * width + chunk * 16;
    const int element = (first + chunk * 16) / static_cast<int>(sizeof(T));
    const T* from = at<T>(a.key, head) + token * a.key.stride[2] + element;
    constexpr int each = 16 / static_cast<int>(sizeof(T));
    if (token < a.N && (KIND < any_shape || (l.whole_key && element + each <= a.D))) {
      copy_async<16>(place, from);
      continue;
    }
    if constexpr (KIND < any_shape) {
      *reinterpret_cast<uint4*>(place) = uint4{0, 0, 0, 0};
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < each; ++e) {
      reinterpret_cast<T*>(place)[e] = token < a.N && element + e < a.D ? from[e] : from_float<T>(0.0f);
    }
  }
}

// Where 4-byte unit `u` (of 4 * C, or 8 * C in float32) of a key's group of C planes goes.
template <class T, int C>
SDATTN_DEVICE int value_place(int columns, int column, int u) {
  if constexpr (is_float<T>) {
    // b0 and b1 of mma are keys 2t and 2t + 1: side by side they would meet in the same banks.
    const int key = (column & ~7) | ((column & 1) << 2) | ((column & 7) >> 1);
    return (u / 8) * columns * 32 + key * 32 + (u % 8) * 4;
  }
  return (u % C) * columns * 16 + column * 16 + (u / C) * 4;
}

// Columns first .. first + 8 * C - 1 of every value.
template <class T, int C, int KIND>
SDATTN_DEVICE void load_values(const Launch& l, const Head& head, const unsigned char* shared, unsigned char* to,
                               int first) {
  const auto* position = reinterpret_cast<const int16_t*>(shared + l.position);
  const Attention& a = l.call.attention;
  constexpr int chunks = C * value_plane<T> / 16, each = 16 / static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int i = thread_index(); i < l.columns * chunks; i += threads_of_block()) {
    const int token = i / chunks, chunk = i % chunks, column = position[token];
    const int element = first + chunk * each;
    const T* from = at<T>(a.value, head) + token * a.value.stride[2] + element;
    if (token < a.N && (KIND < any_shape || (l.whole_value && element + each <= a.Dv))) {
      if constexpr (is_float<T>) {
        copy_async<16>(to + value_place<T, C>(l.columns, column, 4 * chunk), from);
      } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          copy_async<4>(to + value_place<T, C>(l.columns, column, 4 * chunk + u), from + 2 * u);
        }
      }
      continue;
    }
    if constexpr (KIND < any_shape) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        *reinterpret_cast<uint32_t*>(to + value_place<T, C>(l.columns, column, 4 * chunk + u)) = 0;
      }
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < each; ++e) {
      constexpr int in_unit = 4 / static_cast<int>(sizeof(T));
      auto* place = reinterpret_cast<T*>(to + value_place<T, C>(l.columns, column, 4 * chunk + e / in_unit));
      place[e % in_unit] = token < a.N && element + e < a.Dv ? from[e] : from_float<T>(0.0f);
    }
  }
}

// All keys and values of a head; what is copied is committed as one group.
template <class T, int KIND>
SDATTN_DEVICE void stage_head(const Launch& l, const Head& head, unsigned char* shared) {
  const int bytes = l.key_bytes;
  unsigned char* plane = shared;
  int done = 0;
  const int planes = static_cast<int>(l.call.attention.Dv + 7) / 8;
  unsigned char* values = shared + l.values;
  int first = 0;
  if constexpr (KIND >= any_shape) {
    for (; done < bytes; done += 32, plane += 32 * l.columns) load_keys<T, KIND>(l, head, shared, plane, done, 32);
    for (; first < planes; ++first, values += value_plane<T> * l.columns) {
      load_values<T, 1, KIND>(l, head, shared, values, 8 * first);
    }
  }
  for (; KIND < any_shape && done + 64 <= bytes; done += 64, plane += 64 * l.columns) {
    load_keys<T, KIND>(l, head, shared, plane, done, 64);
  }
  if (KIND < any_shape && (bytes & 32) != 0) {
    load_keys<T, KIND>(l, head, shared, plane, done, 32);
    plane += 32 * l.columns;
    done += 32;
  }
  if (KIND < any_shape && (bytes & 16) != 0) load_keys<T, KIND>(l, head, shared, plane, done, 16);
  for (; KIND < any_shape && first + 4 <= planes; first += 4, values += 4 * value_plane<T> * l.columns) {
    load_values<T, 4, KIND>(l, head, shared, values, 8 * first);
  }
  if (KIND < any_shape && (planes & 2) != 0) {
    load_values<T, 2, KIND>(l, head, shared, values, 8 * first);
    values += 2 * value_plane<T> * l.columns;
    first += 2;
  }
  if (KIND < any_shape && (planes & 1) != 0) load_values<T, 1, KIND>(l, head, shared, values, 8 * first);
  commit_copies();
}

}  // namespace sdattn::cuda::rows
