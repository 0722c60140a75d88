// machine.h on a CPU, for tests: every thread of a block is a fiber, and the blocks run one after the other.
//
// It is stricter than a GPU. What a whole warp does is a meeting of its 32 lanes: if one of them comes to something
// else, or returns while others wait, the launch fails and says who was where. Shared memory has exactly the size that
// was asked for and is full of NaN before every block. Asynchronous copies happen when their thread waits for them, and
// until then what they will overwrite is NaN. Addresses must be aligned. Threads run in a fixed order, and in the
// opposite one if asked to: what holds in one alone hangs on luck.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>

#include "emulated_collectives.h"
#include "emulated_numbers.h"
#include "emulated_simt.h"
#include "machine.h"

namespace sdattn::cuda {

struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  uint32_t x, y;
};

// From here on as in machine.h. A line is where a call stands: lanes that meet must have come from the same one.
#define SDATTN_LINE int line = __builtin_LINE()

inline int thread_index() { return emulated::machine.lane->index; }
inline int block_index() { return emulated::machine.block; }
inline int block_count() { return emulated::machine.blocks; }
inline int threads_of_block() { return emulated::machine.threads; }
inline unsigned char* shared_memory() { return emulated::machine.shared; }
inline void sync_block(SDATTN_LINE) { emulated::meet(emulated::of_block, line); }
inline void sync_warp(SDATTN_LINE) { emulated::meet(emulated::of_warp, line); }

inline int float_bits(float x) { return static_cast<int>(emulated::bits_of_float(x)); }
inline float bits_float(uint32_t x) { return emulated::float_of_bits(x); }

inline uint32_t shuffle_xor(uint32_t x, int mask, SDATTN_LINE) {
  return emulated::exchange(emulated::of_shuffle, x, mask, line);
}
inline float shuffle_xor(float x, int mask, SDATTN_LINE) {
  return bits_float(shuffle_xor(static_cast<uint32_t>(float_bits(x)), mask, line));
}
inline int shuffle_xor(int x, int mask, SDATTN_LINE) {
  return static_cast<int>(shuffle_xor(static_cast<uint32_t>(x), mask, line));
}
inline uint32_t ballot(bool x, SDATTN_LINE) { return emulated::exchange(emulated::of_ballot, x, 0, line); }
inline bool any(bool x, SDATTN_LINE) { return emulated::exchange(emulated::of_any, x, 0, line) != 0; }
inline bool all(bool x, SDATTN_LINE) { return emulated::exchange(emulated::of_all, x, 0, line) == 0xffffffffu; }

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return emulated::half_to_float(x.bits); }
inline float to_float(bfloat16_t x) { return emulated::bfloat16_to_float(x.bits); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline half_t from_float<half_t>(float x) {
  return {emulated::float_to_half(x)};
}
template <>
inline bfloat16_t from_float<bfloat16_t>(float x) {
  return {emulated::float_to_bfloat16(x)};
}

template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
inline uint32_t word_of(const T* x) {
  if constexpr (sizeof(T) == 4) {
    return static_cast<uint32_t>(float_bits(x[0]));
  } else {
    return x[0].bits | static_cast<uint32_t>(x[1].bits) << 16;
  }
}

// To nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const auto bits = static_cast<uint32_t>(float_bits(x));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline void in_order() {}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float reciprocal(float x) { return 1.0f / (std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x); }

template <class T>
inline void mma_k16(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                    uint32_t b0, uint32_t b1, SDATTN_LINE);
template <>
inline void mma_k16<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2,
                            uint32_t a3, uint32_t b0, uint32_t b1, int line) {
  emulated::product(emulated::of_halves_16, line, c0, c1, c2, c3, a0, a1, a2, a3, b0, b1);
}
template <>
inline void mma_k16<bfloat16_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2,
                                uint32_t a3, uint32_t b0, uint32_t b1, int line) {
  emulated::product(emulated::of_bfloats_16, line, c0, c1, c2, c3, a0, a1, a2, a3, b0, b1);
}

template <class T>
inline void mma_k8(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0, SDATTN_LINE);
template <>
inline void mma_k8<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0,
                           int line) {
  emulated::product(emulated::of_halves_8, line, c0, c1, c2, c3, a0, a1, 0, 0, b0, 0);
}
template <>
inline void mma_k8<bfloat16_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0,
                               int line) {
  emulated::product(emulated::of_bfloats_8, line, c0, c1, c2, c3, a0, a1, 0, 0, b0, 0);
}

inline void mma_tf32(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1, SDATTN_LINE) {
  emulated::product(emulated::of_tf32, line, c0, c1, c2, c3, a0, a1, a2, a3, b0, b1);
}

inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row, SDATTN_LINE) {
  emulated::load_matrix(emulated::of_matrices_4, 4, r, row, line);
}
inline void load_matrix_x2_trans(uint32_t (&r)[2], const void* row, SDATTN_LINE) {
  emulated::load_matrix(emulated::of_matrices_2, 2, r, row, line);
}

template <int BYTES>
inline void copy_async(void* shared, const void* global, SDATTN_LINE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
  emulated::check_aligned(shared, BYTES, "copy_async to", line);
  emulated::check_aligned(global, BYTES, "copy_async from", line);
  emulated::check_shared(shared, BYTES, "copy_async", line);
  std::memset(shared, 0xff, BYTES);
  emulated::machine.lane->copies.push_back({shared, global, BYTES});
}
inline void commit_copies() {
  emulated::Lane& lane = *emulated::machine.lane;
  size_t before = 0;
  for (const size_t group : lane.groups) before += group;
  lane.groups.push_back(lane.copies.size() - before);
}
template <int PENDING>
inline void wait_copies() {
  emulated::Lane& lane = *emulated::machine.lane;
  if (lane.groups.size() <= PENDING) return;
  const size_t groups = lane.groups.size() - PENDING;
  size_t done = 0;
  for (size_t g = 0; g < groups; ++g) {
    for (const size_t end = done + lane.groups[g]; done < end; ++done) {
      const emulated::Copy& copy = lane.copies[done];
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(done));
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + static_cast<std::ptrdiff_t>(groups));
}

inline uint4 load16(const void* from, SDATTN_LINE) {
  emulated::check_aligned(from, 16, "load16", line);
  return *static_cast<const uint4*>(from);
}
inline uint2 load8(const void* from, SDATTN_LINE) {
  emulated::check_aligned(from, 8, "load8", line);
  return *static_cast<const uint2*>(from);
}
inline uint32_t load4(const void* from, SDATTN_LINE) {
  emulated::check_aligned(from, 4, "load4", line);
  uint32_t x;
  std::memcpy(&x, from, 4);
  return x;
}
inline void store16(void* to, uint4 x, SDATTN_LINE) {
  emulated::check_aligned(to, 16, "store16", line);
  *static_cast<uint4*>(to) = x;
}
inline void store8(void* to, uint2 x, SDATTN_LINE) {
  emulated::check_aligned(to, 8, "store8", line);
  *static_cast<uint2*>(to) = x;
}
inline void store4(void* to, uint32_t x, SDATTN_LINE) {
  emulated::check_aligned(to, 4, "store4", line);
  std::memcpy(to, &x, 4);
}

#undef SDATTN_LINE

inline int current_device_properties(int* multiprocessors, int* shared_per_block_optin, int* major, int* minor) {
  *multiprocessors = emulated::device.multiprocessors;
  *shared_per_block_optin = emulated::device.shared_per_block_optin;
  *major = emulated::device.major;
  *minor = emulated::device.minor;
  return 0;
}
inline int runtime_version() { return 13000; }
inline int driver_version() { return 13000; }
inline const char* machine_message(int error) {
  if (error == emulated::launch_failure) return emulated::machine.why;
  return error == emulated::invalid_value           ? "invalid argument"
         : error == emulated::invalid_configuration ? "invalid configuration argument"
                                                    : "unknown error";
}

template <class Kernel, class... Args>
int launch(Kernel kernel, int blocks, int threads, size_t shared_bytes, void*, const Args&... args) {
  auto body = [&] { kernel(args...); };
  return emulated::run(
      blocks, threads, shared_bytes, [](void* it) { (*static_cast<decltype(body)*>(it))(); }, &body);
}

}  // namespace sdattn::cuda
