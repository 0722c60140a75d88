// The emulated machine's threads, warps and blocks: who runs next, where lanes meet, and what ends a launch. Threads
// are fibers (fiber.h).
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "fiber.h"

namespace sdattn::cuda::emulated {

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
    fail("it is at %s (line %d), and %d lanes of its warp at %s (line %d)", what.name, line, warp.waiting,
         warp.at->name, warp.line);
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
    std::snprintf(m.why, sizeof m.why, "block %d: it wrote beyond its %zu bytes of shared memory", m.block,
                  shared_bytes);
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

}  // namespace sdattn::cuda::emulated
