// What the calls of the CPU backend share: threads, memory, the token side brought into columns.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "isa.h"

namespace sdattn::cpu {

const Isa& current();

// How many threads to use for so many pieces of work; one inside another parallel region, and after fork.
int usable_threads(int asked, int64_t work);

// body(thread) on every thread. Bodies deal work out among themselves, a little at a time as threads come free: other
// programs share these cores, and a thread may not run at all for a while.
template <class Body>
void on_threads(int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  body(0);
}

// Numbers 0, 1, 2 ... below count, `grain` at a time, each to one thread.
class Deal {
 public:
  Deal(int64_t count, int64_t grain) : count_(count), grain_(grain) {}
  template <class Each>
  void operator()(const Each& each) {
    for (int64_t i = next_.fetch_add(grain_); i < count_; i = next_.fetch_add(grain_)) {
      for (int64_t j = i; j < i + grain_ && j < count_; ++j) each(j);
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, grain_;
};

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

constexpr size_t page = 4096;
Memory allocate(size_t bytes);  // aligned to 64; null where there is none

struct TokenSide {
  std::vector<Entry> entries;
  std::vector<int32_t> order, position, phrase_start, phrase_member;
  std::vector<float> gate;
};
TokenSide bring_into_columns(const Attention& a);

float weight_of_a_head(const Attention& a);  // in a captured mean

}  // namespace sdattn::cpu
