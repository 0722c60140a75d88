// machine.h on a CPU, for tests: every thread of a block is a fiber, and the blocks run one after the other.
//
// It is stricter than a GPU. What a whole warp does is a meeting of its 32 lanes: if one of them comes to something else,
// or returns while others wait, the launch fails and says who was where. Shared memory has exactly the size that was
// asked for and is full of NaN before every block. Asynchronous copies happen when their thread waits for them, and until
// then what they will overwrite is NaN. Addresses must be aligned. Threads run in a fixed order, and in the opposite one
// if asked to: what holds in one alone hangs on luck.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace sdattn::cuda {

struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  uint32_t x, y;
};

namespace emulated {

// What the machine says it is. Tests set it.
struct Device {
  int multiprocessors = 132, shared_per_block_optin = 232448, major = 9, minor = 0;
  bool reversed = false;  // the order of threads
};
inline Device device;

// The runtime's numbers for what can go wrong.
constexpr int invalid_value = 1, invalid_configuration = 9, launch_failure = 719;

constexpr int warp_size = 32;
constexpr int most_threads = 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Lane {
  Fiber fiber;
  int index = 0;  // in the block
  bool returned = false;
  // What it brings to a meeting of its warp, and takes away.
  uint32_t in[6], out[4];
  float* c[4];
  const void* address = nullptr;
  // Copies underway; how many of them in each group that was committed.
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

// Something that a warp does together.
struct Meeting {
  const char* name;
  void (*happens)(Lane* lanes);
};

struct Warp {
  Lane* lanes = nullptr;
  const Meeting* at = nullptr;
  int line = 0;  // of the source, where they meet
  int waiting = 0, returned = 0;
  bool at_block = false;  // waits for the other warps
  Lane* goes_on = nullptr;
};

struct Machine {
  std::mutex one_at_a_time;
  Stacks stacks;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  Fiber host;
  Lane* lane = nullptr;  // that runs
  int block = 0, blocks = 0, threads = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool failed = false;
  char why[256] = "";
};

inline Machine machine;

inline void leave_for(Lane* next, bool for_good = false) {
  Lane* lane = machine.lane;
  machine.lane = next;
  switch_fiber(lane->fiber, next == nullptr ? machine.host : next->fiber, for_good);
}

// Ends the launch; does not return.
__attribute__((format(printf, 1, 2), noreturn)) inline void fail(const char* format, ...) {
  char what[192];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  std::snprintf(machine.why, sizeof machine.why, "block %d, thread %d: %s", machine.block, machine.lane->index, what);
  machine.failed = true;
  leave_for(nullptr);
  std::abort();
}

inline Warp& warp_of(const Lane& lane) { return machine.warps[lane.index / warp_size]; }

// The next lane of the warp that has not returned: in a ring it is always one that can go on.
inline Lane* next_lane(Warp& warp) {
  int i = machine.lane->index % warp_size;
  do {
    i = (i + (device.reversed ? warp_size - 1 : 1)) % warp_size;
  } while (warp.lanes[i].returned);
  return &warp.lanes[i];
}

inline void block_meets(Lane*) {}
inline constexpr Meeting of_block{"sync_block", block_meets};

inline void meet(const Meeting& what, int line) {
  Lane& lane = *machine.lane;
  Warp& warp = warp_of(lane);
  if (warp.waiting == 0) {
    if (warp.returned != 0) {
      fail("%d lanes of its warp have returned, and it is at %s (line %d)", warp.returned, what.name, line);
    }
    warp.at = &what;
    warp.line = line;
  } else if (warp.at != &what || warp.line != line) {
    fail("it is at %s (line %d), and %d lanes of its warp at %s (line %d)", what.name, line, warp.waiting, warp.at->name,
         warp.line);
  }
  if (++warp.waiting < warp_size) {
    leave_for(next_lane(warp));
    return;
  }
  warp.waiting = 0;
  if (&what == &of_block) {
    warp.at_block = true;
    warp.goes_on = &lane;
    leave_for(nullptr);
  } else {
    what.happens(warp.lanes);
  }
}

inline void fiber_main() {
  Lane& lane = *machine.lane;
  arrived(lane.fiber, machine.host);
  machine.body(machine.argument);
  Warp& warp = warp_of(lane);
  if (warp.waiting != 0) {
    fail("it returned, and %d lanes of its warp are at %s (line %d)", warp.waiting, warp.at->name, warp.line);
  }
  lane.returned = true;
  leave_for(++warp.returned == warp_size ? nullptr : next_lane(warp), true);
  std::abort();
}

// Shared memory of one block, between guards where no sanitizer sees to that.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes) {
    const size_t whole = bytes + 2 * guard;
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, whole > 0 ? whole : 1) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    std::memset(memory_, 0xa5, guard);
    std::memset(memory_ + guard, 0xff, bytes);
    std::memset(memory_ + guard + bytes, 0xa5, guard);
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  ~Shared() { std::free(memory_); }

  unsigned char* data() { return memory_ + guard; }
  bool overrun() const {
    for (size_t i = 0; i < guard; ++i) {
      if (memory_[i] != 0xa5 || memory_[guard + bytes_ + i] != 0xa5) return true;
    }
    return false;
  }

 private:
#if defined(SDATTN_ASAN)
  static constexpr size_t guard = 0;
#else
  static constexpr size_t guard = 128;
#endif
  unsigned char* memory_;
  size_t bytes_;
};

inline void run_block(size_t shared_bytes) {
  Machine& m = machine;
  Shared shared(shared_bytes);
  m.shared = shared.data();
  m.shared_bytes = shared_bytes;
  for (int i = 0; i < m.threads; ++i) {
    Lane& lane = m.lanes[i];
    lane.index = i;
    lane.returned = false;
    lane.copies.clear();
    lane.groups.clear();
    m.stacks.prepare(i, lane.fiber, fiber_main);
  }
  const int warps = m.threads / warp_size;
  for (int w = 0; w < warps; ++w) {
    Lane* lanes = &m.lanes[w * warp_size];
    m.warps[w] = Warp{};
    m.warps[w].lanes = lanes;
    m.warps[w].goes_on = lanes + (device.reversed ? warp_size - 1 : 0);
  }
  // A warp runs until it waits for the block or has returned.
  for (int returned = 0; returned < warps;) {
    returned = 0;
    for (int i = 0; i < warps; ++i) {
      Warp& warp = m.warps[device.reversed ? warps - 1 - i : i];
      warp.at_block = false;
      if (warp.returned == 0) {
        m.lane = warp.goes_on;
        switch_fiber(m.host, m.lane->fiber);
        if (m.failed) return;
      }
      returned += warp.returned == warp_size ? 1 : 0;
    }
    if (returned != 0 && returned != warps) {
      std::snprintf(m.why, sizeof m.why, "block %d: %d warps returned, and %d are at sync_block", m.block, returned,
                    warps - returned);
      m.failed = true;
      return;
    }
  }
  if (shared.overrun()) {
    std::snprintf(m.why, sizeof m.why, "block %d: it wrote beyond its %zu bytes of shared memory", m.block, shared_bytes);
    m.failed = true;
  }
}

inline int run(int blocks, int threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  if (blocks < 1 || threads < 1 || threads > most_threads || threads % warp_size != 0) return invalid_configuration;
  if (shared_bytes > static_cast<size_t>(device.shared_per_block_optin)) return invalid_value;
  Machine& m = machine;
  const std::lock_guard<std::mutex> hold(m.one_at_a_time);
  m.stacks.reserve(threads);
  if (m.lanes.size() < static_cast<size_t>(threads)) {
    m.lanes.resize(threads);
    m.warps.resize(threads / warp_size);
  }
  m.host = Fiber{};
  m.blocks = blocks;
  m.threads = threads;
  m.body = body;
  m.argument = argument;
  m.failed = false;
  for (m.block = 0; m.block < blocks && !m.failed; ++m.block) run_block(shared_bytes);
  return m.failed ? launch_failure : 0;
}

inline void check_aligned(const void* at, size_t bytes, const char* what, int line) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    fail("%s (line %d) at %p, which is not aligned to %zu bytes", what, line, at, bytes);
  }
}

inline void check_shared(const void* at, size_t bytes, const char* what, int line) {
  const auto* place = static_cast<const unsigned char*>(at);
  if (place < machine.shared || place + bytes > machine.shared + machine.shared_bytes) {
    fail("%s (line %d) of %zu bytes outside of shared memory", what, line, bytes);
  }
}

// Matrices. (row, column) of a fragment's parts by lane: g = lane / 4, t = lane % 4.

inline float half_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = magnitude << 13 | 0x7f800000u;
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float small = static_cast<float>(magnitude) * (1.0f / 16777216.0f);
    std::memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number the unit is 2^-24, whatever the exponent; nearbyint rounds to even.
    float positive;
    std::memcpy(&positive, &magnitude, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(positive * 16777216.0f)));
  }
  const uint32_t rounded = magnitude + 0x0fffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float tf32_to_float(uint32_t x) {
  const uint32_t bits = x & 0xffffe000u;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

typedef float Row __attribute__((vector_size(32), aligned(4)));  // of the 8 columns of c

// c (16, 8) += a (16, K) b (K, 8): exact products, added in the order of k, in float32.
template <int K>
inline void multiply(const float (&a)[16][K], const float (&b)[K][8], Lane* lanes) {
  for (int m = 0; m < 16; ++m) {
    alignas(32) float row[8];
    for (int t = 0; t < 4; ++t) {
      const Lane& lane = lanes[4 * (m % 8) + t];
      row[2 * t] = *lane.c[m / 8 * 2];
      row[2 * t + 1] = *lane.c[m / 8 * 2 + 1];
    }
    Row sum;
    std::memcpy(&sum, row, sizeof sum);
    for (int k = 0; k < K; ++k) {
      Row of_b;
      std::memcpy(&of_b, b[k], sizeof of_b);
      sum += a[m][k] * of_b;
    }
    std::memcpy(row, &sum, sizeof sum);
    for (int t = 0; t < 4; ++t) {
      const Lane& lane = lanes[4 * (m % 8) + t];
      *lane.c[m / 8 * 2] = row[2 * t];
      *lane.c[m / 8 * 2 + 1] = row[2 * t + 1];
    }
  }
}

// K = 16 or 8, of 16-bit numbers, two in a register.
template <int K, float (*to_float)(uint16_t)>
inline void multiply_halves(Lane* lanes) {
  float a[16][K], b[K][8];
  for (int i = 0; i < warp_size; ++i) {
    const int g = i / 4, t = i % 4;
    const uint32_t* in = lanes[i].in;
    for (int part = 0; part < K / 8; ++part) {
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * part + 2 * t + e;
        a[g][k] = to_float(static_cast<uint16_t>(in[2 * part] >> (16 * e)));
        a[g + 8][k] = to_float(static_cast<uint16_t>(in[2 * part + 1] >> (16 * e)));
        b[k][g] = to_float(static_cast<uint16_t>(in[4 + part] >> (16 * e)));
      }
    }
  }
  multiply<K>(a, b, lanes);
}

inline void multiply_tf32(Lane* lanes) {
  float a[16][8], b[8][8];
  for (int i = 0; i < warp_size; ++i) {
    const int g = i / 4, t = i % 4;
    const uint32_t* in = lanes[i].in;
    for (int part = 0; part < 2; ++part) {
      a[g][4 * part + t] = tf32_to_float(in[2 * part]);
      a[g + 8][4 * part + t] = tf32_to_float(in[2 * part + 1]);
      b[4 * part + t][g] = tf32_to_float(in[4 + part]);
    }
  }
  multiply<8>(a, b, lanes);
}

template <int MATRICES>
inline void load_matrices(Lane* lanes) {
  for (int i = 0; i < warp_size; ++i) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const auto* row = static_cast<const unsigned char*>(lanes[8 * matrix + 2 * (i % 4) + e].address);
        std::memcpy(&pair[e], row + 2 * (i / 4), 2);
      }
      lanes[i].out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

inline void warp_meets(Lane*) {}

inline void shuffle(Lane* lanes) {
  for (int i = 0; i < warp_size; ++i) lanes[i].out[0] = lanes[i ^ (lanes[i].in[1] & 31)].in[0];
}

inline void vote(Lane* lanes) {
  uint32_t votes = 0;
  for (int i = 0; i < warp_size; ++i) votes |= lanes[i].in[0] << i;
  for (int i = 0; i < warp_size; ++i) lanes[i].out[0] = votes;
}

inline constexpr Meeting of_warp{"sync_warp", warp_meets};
inline constexpr Meeting of_shuffle{"shuffle_xor", shuffle};
inline constexpr Meeting of_ballot{"ballot", vote}, of_any{"any", vote}, of_all{"all", vote};
inline constexpr Meeting of_halves_16{"mma_k16<half_t>", multiply_halves<16, half_to_float>};
inline constexpr Meeting of_halves_8{"mma_k8<half_t>", multiply_halves<8, half_to_float>};
inline constexpr Meeting of_bfloats_16{"mma_k16<bfloat16_t>", multiply_halves<16, bfloat16_to_float>};
inline constexpr Meeting of_bfloats_8{"mma_k8<bfloat16_t>", multiply_halves<8, bfloat16_to_float>};
inline constexpr Meeting of_tf32{"mma_tf32", multiply_tf32};
inline constexpr Meeting of_matrices_4{"load_matrix_x4_trans", load_matrices<4>};
inline constexpr Meeting of_matrices_2{"load_matrix_x2_trans", load_matrices<2>};

inline uint32_t exchange(const Meeting& what, uint32_t x, int other, int line) {
  Lane& lane = *machine.lane;
  lane.in[0] = x;
  lane.in[1] = static_cast<uint32_t>(other);
  meet(what, line);
  return lane.out[0];
}

// Registers are set by place: a0 a1 a2 a3 b0 b1.
inline void product(const Meeting& what, int line, float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1,
                    uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Lane& lane = *machine.lane;
  float c[4] = {c0, c1, c2, c3};
  const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 4; ++i) lane.c[i] = &c[i];
  std::memcpy(lane.in, in, sizeof in);
  meet(what, line);
  c0 = c[0];
  c1 = c[1];
  c2 = c[2];
  c3 = c[3];
}

inline void load_matrix(const Meeting& what, int matrices, uint32_t* r, const void* row, int line) {
  Lane& lane = *machine.lane;
  if (lane.index % warp_size < 8 * matrices) {
    check_aligned(row, 16, what.name, line);
    check_shared(row, 16, what.name, line);
  }
  lane.address = row;
  meet(what, line);
  for (int i = 0; i < matrices; ++i) r[i] = lane.out[i];
}

}  // namespace emulated

// From here on as in machine.h. A line is where a call stands: lanes that meet must have come from the same one.
#define SDATTN_LINE int line = __builtin_LINE()

inline int thread_index() { return emulated::machine.lane->index; }
inline int block_index() { return emulated::machine.block; }
inline int block_count() { return emulated::machine.blocks; }
inline int threads_of_block() { return emulated::machine.threads; }
inline unsigned char* shared_memory() { return emulated::machine.shared; }
inline void sync_block(SDATTN_LINE) { emulated::meet(emulated::of_block, line); }
inline void sync_warp(SDATTN_LINE) { emulated::meet(emulated::of_warp, line); }

inline int float_bits(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float bits_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

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
inline void mma_k16<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                            uint32_t b0, uint32_t b1, int line) {
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
inline void mma_k8<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0, int line) {
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
