// One call: the token side is brought into columns, keys and values are packed, blocks of rows are dealt to threads.

#include "attention.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "calls.h"

namespace sdattn::cpu {

namespace {

// ---- Instruction sets ---------------------------------------------------------------------------------------------

// The constructor runs when the library is loaded, after the compiler's own look at the machine.
struct Isas {
  const Isa* all[5] = {};
  const char* names[5] = {};
  int count = 0;

  Isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    for (const Isa* isa : {&isa_avx512_bf16, &isa_avx512, &isa_avx2}) add(isa);
#endif
    add(&isa_portable);
  }
  void add(const Isa* isa) {
    if (!isa->runs_here()) return;
    all[count] = isa;
    names[count++] = isa->name;
  }
};

const Isas& isas() {
  static const Isas found;
  return found;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& current() {
  const Isa* isa = chosen.load();
  return isa ? *isa : *isas().all[0];
}

namespace {

// ---- Threads ------------------------------------------------------------------------------------------------------

// After fork, libgomp's pool is gone but not forgotten: a parallel region hangs. The child stays with one thread.
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int usable_threads(int asked, int64_t work) {
#if defined(_OPENMP)
  if (forked || omp_in_parallel()) return 1;
  return static_cast<int>(asked < 1 ? 1 : asked < work ? asked : work < 1 ? 1 : work);
#else
  (void)asked, (void)work;
  return 1;
#endif
}

Memory allocate(size_t bytes) {
  void* p = nullptr;
#if defined(_WIN32)
  p = std::malloc(bytes + page);
#else
  if (posix_memalign(&p, 64, bytes + page) != 0) p = nullptr;
#endif
  return Memory(static_cast<char*>(p));
}

// ---- The token side -----------------------------------------------------------------------------------------------

namespace {

// Members of phrases by column, phrase after phrase. A leader's index names its phrase.
void gather_phrases(const int32_t* leader, const Entry& entry, int64_t N, std::vector<int32_t>& start,
                    std::vector<int32_t>& member) {
  for (int64_t n = 0; n < N; ++n) {
    if (leader[n] != n || entry.position[n] >= entry.content) continue;
    start.push_back(static_cast<int32_t>(member.size()));
    for (int64_t i = n; i < N; ++i) {
      if (leader[i] == n) member.push_back(entry.position[i]);
    }
  }
}

}  // namespace

TokenSide bring_into_columns(const Attention& a) {
  const RowProgram& p = a.program;
  const int64_t gate_size = p.gate && p.content ? p.gate_heads * a.N : 0;
  TokenSide side;
  side.entries.resize(a.B);
  side.order.resize(a.B * a.N);
  side.position.resize(a.B * a.N);
  side.gate.resize(a.B * gate_size);
  side.phrase_start.reserve(a.B * (a.N + 1));
  side.phrase_member.reserve(a.B * a.N);
  for (int64_t b = 0; b < a.B; ++b) {
    Entry& entry = side.entries[b];
    int32_t* order = side.order.data() + b * a.N;
    int32_t* position = side.position.data() + b * a.N;
    const uint8_t* content = p.content ? p.content + b * a.N : nullptr;
    int32_t columns = 0;
    for (int pass = 0; pass < 2; ++pass) {  // content, then the rest
      for (int64_t n = 0; n < a.N; ++n) {
        if ((content && content[n]) != (pass == 0)) continue;
        position[n] = columns;
        order[columns++] = static_cast<int32_t>(n);
      }
      if (pass == 0) entry.content = columns;
    }
    entry.order = order;
    entry.position = position;
    entry.drop = p.drop && content ? p.drop[b] : 0;
    entry.gate = nullptr;
    if (gate_size) {
      float* gate = side.gate.data() + b * gate_size;
      for (int64_t i = 0; i < gate_size; ++i) gate[i] = p.gate[b * gate_size + i / a.N * a.N + order[i % a.N]];
      entry.gate = gate;
    }
    const size_t first = side.phrase_start.size();
    if (p.phrases && content) {
      gather_phrases(p.phrases + b * a.N, entry, a.N, side.phrase_start, side.phrase_member);
    }
    entry.phrases = static_cast<int32_t>(side.phrase_start.size() - first);
    side.phrase_start.push_back(static_cast<int32_t>(side.phrase_member.size()));
    entry.phrase_start = side.phrase_start.data() + first;  // reserved above: never moves
    entry.phrase_member = side.phrase_member.data();
  }
  return side;
}

float weight_of_a_head(const Attention& a) {
  int64_t on = 0;
  for (int64_t h = 0; h < a.H; ++h) on += !a.program.head_mode || a.program.head_mode[h] == head_program;
  return on ? 1.0f / static_cast<float>(on) : 0.0f;
}

namespace {

// Every head by one thread. A mean over heads is added up in the order of the heads, whichever thread has them: a head's
// turn comes once those before it are in, and those were dealt before it.
void pictures(const Isa& isa, const Job& job, int threads, char* memory, size_t workspace, size_t maps, char* packed_to) {
  const Attention& a = *job.call;
  const int64_t size = a.program.capture_count * a.M;
  std::vector<std::atomic<int64_t>> turn(a.B);
  for (std::atomic<int64_t>& next : turn) next = 0;
  Deal deal(a.B * a.H, 1);
  on_threads(threads, [&](int thread) {
    char* own = memory + workspace * thread;
    float* scratch = reinterpret_cast<float*>(own + workspace - maps);
    deal([&](int64_t i) {
      const int64_t b = i / a.H, h = i % a.H;
      const bool counts = !a.program.head_mode || a.program.head_mode[h] == head_program;
      float* mine = !a.maps ? nullptr : !maps ? a.maps + i * size : counts ? scratch : nullptr;
      if (!a.packed) isa.pack(job, packed_to, b, h);
      isa.picture(job, own, b, h, mine);
      if (!maps) return;
      while (turn[b].load(std::memory_order_acquire) != h) std::this_thread::yield();
      float* sum = a.maps + b * size;
      for (int64_t j = 0; j < size; ++j) {
        sum[j] = (h == 0 ? 0.0f : sum[j]) + (counts ? job.head_weight * scratch[j] : 0.0f);
      }
      turn[b].store(h + 1, std::memory_order_release);
    });
  });
}

}  // namespace

Error attention(const Attention& a, int threads) {
  if (a.N > max_tokens || a.D > max_dim || a.Dv > max_dim) return bad_size;
  if (a.maps && a.program.capture_mean && a.H <= 0 && a.B > 0 && a.M > 0) {  // the mean of no heads
    std::memset(a.maps, 0, static_cast<size_t>(a.B * a.program.capture_count * a.M) * sizeof(float));
  }
  if (a.B <= 0 || a.H <= 0 || a.M <= 0) return ok;
  const Isa& isa = current();
  const int64_t blocks = (a.M + isa.block_rows - 1) / isa.block_rows;
  if (a.picture && (a.bits || (a.out.stride[1] == 0 && a.H > 1))) return bad_size;
  threads = usable_threads(threads, a.B * a.H * (a.picture ? 1 : blocks));

  try {
    const TokenSide side = bring_into_columns(a);
    Job job{&a, side.entries.data(), static_cast<const char*>(a.packed), isa.packed_bytes(a), weight_of_a_head(a), false};
    const size_t packed = a.packed ? 0 : job.packed_bytes * static_cast<size_t>(a.B * a.H);
    const size_t maps = a.picture && a.maps && a.program.capture_mean ? sizeof(float) * a.program.capture_count * a.M : 0;
    const size_t own_bytes = a.picture ? isa.picture_bytes(a) + maps : isa.workspace_bytes(a);
    const size_t workspace = (own_bytes + 2 * page - 1) / page * page;
    Memory memory = allocate(packed + workspace * static_cast<size_t>(threads));
    if (!memory) return out_of_memory;
    char* to = memory.get() + workspace * static_cast<size_t>(threads);
    if (!a.packed) job.packed = to;

    // Heads innermost where a pixel's heads lie side by side, and where a sum over heads is one thread's to add up.
    const bool shared = a.query.stride[1] == 0 || a.out.stride[1] == 0;
    const bool beside = a.query.stride[1] < a.query.stride[2] && a.B * blocks >= 4 * threads;
    job.heads_first = shared || beside || (a.maps && a.program.capture_mean);
    const int64_t heads = a.B * a.H, all = heads * blocks;

    if (a.picture) {
      pictures(isa, job, threads, memory.get(), workspace, maps, to);
      return ok;
    }

    // One parallel region, no barrier inside: a head's rows wait for that head's panels alone.
    std::vector<std::atomic<bool>> packed_already(heads);
    for (std::atomic<bool>& ready : packed_already) ready = a.packed != nullptr;
    Deal packing(a.packed ? 0 : heads, 1), blocks_of_rows(job.heads_first ? a.B * blocks : all, !job.heads_first && all >= 64 * threads ? 8 : 1);
    on_threads(threads, [&](int thread) {
      char* own = memory.get() + workspace * thread;
      packing([&](int64_t i) {
        isa.pack(job, to, i / a.H, i % a.H);
        packed_already[i].store(true, std::memory_order_release);
      });
      const auto rows = [&](int64_t b, int64_t h, int64_t count, int64_t block) {
        for (int64_t j = h; j < h + count; ++j) {
          while (!packed_already[b * a.H + j].load(std::memory_order_acquire)) std::this_thread::yield();
        }
        isa.rows(job, own, b, h, count, block * isa.block_rows);
      };
      blocks_of_rows([&](int64_t i) {
        if (!job.heads_first) return rows(i / blocks / a.H, i / blocks % a.H, 1, i % blocks);
        rows(i / blocks, 0, a.H, i % blocks);
      });
    });
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
  return ok;
}

size_t packed_bytes(const Attention& a) {
  return current().packed_bytes(a) * static_cast<size_t>(a.B > 0 && a.H > 0 ? a.B * a.H : 0);
}

Error pack(const Attention& a, int threads, void* to) {
  if (a.N > max_tokens || a.D > max_dim || a.Dv > max_dim) return bad_size;
  if (a.B <= 0 || a.H <= 0) return ok;
  const Isa& isa = current();
  try {
    const TokenSide side = bring_into_columns(a);
    const Job job{&a, side.entries.data(), nullptr, isa.packed_bytes(a), 0.0f, false};
    Deal deal(a.B * a.H, 1);
    on_threads(usable_threads(threads, a.B * a.H), [&](int) {
      deal([&](int64_t i) { isa.pack(job, static_cast<char*>(to), i / a.H, i % a.H); });
    });
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
  return ok;
}

Error smooth(const Smoothing& s, int threads) {
  if (s.B <= 0 || s.H <= 0 || s.height <= 0 || s.width <= 0 || s.C <= 0) return ok;
  const Isa& isa = current();
  const int64_t blocks = isa.smooth_blocks(s), work = s.B * s.H * blocks;
  threads = usable_threads(threads, work);
  const size_t workspace = (isa.smooth_bytes(s) + page - 1) / page * page;
  const Memory memory = allocate(workspace * static_cast<size_t>(threads));
  if (!memory) return out_of_memory;
  Deal deal(work, 1);
  on_threads(threads, [&](int thread) {
    deal([&](int64_t i) { isa.smooth(s, memory.get() + workspace * thread, i / blocks, i % blocks); });
  });
  return ok;
}

Error gaussian_attention(const GaussianAttention& g, int threads) {
  if (g.d < 1 || g.d > 8) return bad_size;
  if (g.P <= 0 || g.L <= 0) return ok;
  const Isa& isa = current();
  const int64_t row_blocks = (g.P + isa.block_rows - 1) / isa.block_rows, key_blocks = isa.gaussian_blocks(g);
  threads = usable_threads(threads, row_blocks);
  const size_t packed = (isa.gaussian_packed_bytes(g) + page - 1) / page * page;
  const size_t workspace = (isa.gaussian_bytes(g) + 2 * page - 1) / page * page;
  const Memory memory = allocate(packed + workspace * static_cast<size_t>(threads));
  if (!memory) return out_of_memory;
  Deal packing(key_blocks, 16), rows(row_blocks, 1);
  on_threads(threads, [&](int) { packing([&](int64_t i) { isa.gaussian_pack(g, memory.get(), i); }); });
  on_threads(threads, [&](int thread) {
    rows([&](int64_t i) {
      isa.gaussian(g, memory.get(), memory.get() + packed + workspace * thread, i * isa.block_rows);
    });
  });
  return ok;
}

const char* const* available_isas() { return isas().names; }

const char* isa() { return current().name; }

bool set_isa(const char* name) {
  for (int i = 0; i < isas().count; ++i) {
    if (std::strcmp(isas().names[i], name) == 0) {
      chosen = isas().all[i];
      return true;
    }
  }
  return false;
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace sdattn::cpu
