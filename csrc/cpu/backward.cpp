// One backward call: chunks of rows are dealt to threads, each with sums of its own, which are added up in order.

#include "backward.h"

#include <cstring>
#include <new>

#include "calls.h"

namespace sdattn::cpu {

namespace {

// Rows whose sums are one chain. From shapes alone, so that the sums do not depend on the threads.
constexpr int64_t chunk_rows = 512, chunk_rows_of_all_heads = 128;

}  // namespace

Error backward(const Backward& w, int threads) {
  const Attention& f = w.forward;
  if (f.N > max_tokens || f.D > max_dim || f.Dv > max_dim) return bad_size;
  if (f.B <= 0 || f.H <= 0 || f.M <= 0 || f.N <= 0) return ok;
  const Isa& isa = current();

  // What several heads or entries add to is one thread's, which takes them in turn.
  const bool all_entries = w.grad_bias.data && w.grad_bias.stride[0] == 0 && f.B > 1;
  const bool all_heads = w.relevance || (w.grad_bias.data && w.grad_bias.stride[1] == 0 && f.H > 1);
  const int64_t entries = all_entries ? 1 : f.B, heads = all_heads ? 1 : f.H;
  const int64_t rows = all_entries || all_heads ? chunk_rows_of_all_heads : chunk_rows;
  const int64_t chunks = (f.M + rows - 1) / rows, pieces = entries * heads * chunks;
  threads = usable_threads(threads, pieces);

  try {
    const TokenSide side = bring_into_columns(f);
    BackwardJob job{&w, side.entries.data(), nullptr, isa.backward_packed_bytes(w), weight_of_a_head(f)};
    const size_t sums = isa.backward_sums_bytes(w), all_sums = sums * static_cast<size_t>(f.B * f.H * chunks);
    const size_t packed = job.packed_bytes * static_cast<size_t>(f.B * f.H);
    const size_t workspace = (isa.backward_bytes(w) + 2 * page - 1) / page * page;
    const Memory memory = allocate(packed + all_sums + workspace * static_cast<size_t>(threads));
    if (!memory) return out_of_memory;
    char* const panels = memory.get() + workspace * static_cast<size_t>(threads);
    char* const sums_of = panels + packed;
    job.packed = panels;

    Deal packing(f.B * f.H, 1), dealt(pieces, 1), reducing(f.B * f.H, 1);
    on_threads(threads, [&](int) { packing([&](int64_t i) { isa.backward_pack(job, panels, i / f.H, i % f.H); }); });
    on_threads(threads, [&](int thread) {
      char* own = memory.get() + workspace * thread;
      dealt([&](int64_t i) {
        // Heads innermost: a pixel's heads may lie side by side.
        const int64_t h0 = i % heads, chunk = i / heads % chunks, b0 = i / heads / chunks;
        for (int64_t b = b0; b < b0 + f.B / entries; ++b) {
          for (int64_t h = h0; h < h0 + f.H / heads; ++h) {
            char* to = sums_of + sums * static_cast<size_t>((b * f.H + h) * chunks + chunk);
            std::memset(to, 0, sums);
            isa.backward_rows(job, own, to, b, h, chunk * rows, rows < f.M - chunk * rows ? rows : f.M - chunk * rows);
          }
        }
      });
    });
    if (sums) {
      on_threads(threads, [&](int) {
        reducing([&](int64_t i) {
          isa.backward_reduce(job, sums_of + sums * static_cast<size_t>(i * chunks), chunks, i / f.H, i % f.H);
        });
      });
    }
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
  return ok;
}

}  // namespace sdattn::cpu
