// Steps 2 to 6 on one row, which lies in the registers of the four lanes of a quad: gate, phrases, salience dropout,
// suppression, renormalisation.
#pragma once

#include "select.cuh"
#include "token_side.cuh"

namespace sdattn::cuda::rows {

// What steps 4 and 5 compare: not an array, which would take as many registers again.
template <int VALUES>
struct Ranks {
  const float (&p)[VALUES];
  int content, lane;
  SDATTN_DEVICE float operator[](int i) const { return column_of(i, lane) < content ? p[i] : -1.0f; }
};

// Step 3 on one row: the members of each phrase get the mean over them.
template <int A, int VALUES>
SDATTN_DEVICE void merge_phrases(const Launch& l, const unsigned char* shared, int phrases, int lane,
                                 float (&p)[VALUES]) {
  constexpr int decided = 4 * A;
  for (int phrase = 0; phrase < phrases; ++phrase) {
    const auto* masks = reinterpret_cast<const uint32_t*>(shared + l.masks) + phrase_words * (4 * phrase + (lane & 3));
    const uint32_t mask[2] = {masks[0], masks[1]};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < decided; ++i) sum += mask[i / 32] >> (i % 32) & 1 ? p[i] : 0.0f;
    const float size = quad_sum(static_cast<float>(count_bits(mask[0]) + count_bits(mask[1])));
    const float mean = quad_sum(sum) * reciprocal(size);  // the very same number for all members, so they tie
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] = mask[i / 32] >> (i % 32) & 1 ? mean : p[i];
  }
}

// Step 4, mode "random", on one row.
template <int A, int VALUES>
SDATTN_DEVICE void drop_at_random(const int16_t* order, uint64_t seed, float ratio, int content, int lane, int h, int m,
                                  float (&p)[VALUES]) {
  constexpr int decided = 4 * A;
#pragma unroll 1
  for (int j = 0; j < decided; ++j) {
    // Not unrolled, for the sake of the instruction cache: the array stays in registers by comparing j.
    const int column = column_of(j, lane);
    if (column >= content) continue;
    const float u = philox_uniform(seed, static_cast<uint32_t>(order[column]), static_cast<uint32_t>(m),
                                   static_cast<uint32_t>(h));
    if (u >= ratio) continue;
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] = i == j ? -0.0f : p[i];
  }
}

// Step 6 on one row; `mass`: of content before the gate.
template <int A, int VALUES>
SDATTN_DEVICE void renormalize(const RowProgram& program, int content, int lane, float total, float mass,
                               float (&p)[VALUES], float& after) {
  constexpr int decided = 4 * A;
  const auto is = [&](int i) { return column_of(i, lane) < content; };
  if (program.renormalize == renormalize_content) {
    float left = 0.0f;
#pragma unroll
    for (int i = 0; i < decided; ++i) left += is(i) ? p[i] : 0.0f;
    left = quad_sum(left);
    const float factor = mass * reciprocal(left < least_sum ? 1.0f : left);
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] = is(i) ? p[i] * factor : p[i];
  } else if (program.renormalize == renormalize_row) {
    float left = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) left += p[i];
    left = quad_sum(left);
    // Here, and not after the second product: what is left of a row may be too small for half precision.
    const float factor = left < least_sum ? 0.0f : reciprocal(left);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) p[i] *= factor;
    after = total == total ? 1.0f : total;
  } else if (program.gate != nullptr) {
    // Here too: relative to the row's largest entry, what a gate amplifies may be too large for half precision.
#pragma unroll
    for (int i = 0; i < VALUES; ++i) p[i] *= after;
    after = 1.0f;
  }
}

// Steps 2 to 6 on one row: unnormalised probabilities, relative to the row's largest; `total` is their sum. Leaves
// `after`, the factor that makes probabilities of them. What steps 4 and 5 take away is -0, what is left +0 at the
// least.
//
// Every step is the same for p and for a multiple of p, so the division by the softmax's sum is left to the output.
template <int A, int KIND, int VALUES>
SDATTN_DEVICE void row_program(const Launch& l, const unsigned char* shared, int b, int h, int m, float total,
                               float (&p)[VALUES], float& after) {
  constexpr int decided = 4 * A;
  const RowProgram& program = l.call.attention.program;
  const auto& numbers = *reinterpret_cast<const Numbers*>(shared + l.numbers);
  const int lane = thread_index() & 31, content = numbers.content, phrases = numbers.phrases, drop = numbers.drop;
  const auto is = [&](int i) { return column_of(i, lane) < content; };

  float mass = 0.0f;
  if (program.renormalize == renormalize_content) {
#pragma unroll
    for (int i = 0; i < decided; ++i) mass += is(i) ? p[i] : 0.0f;
    mass = quad_sum(mass);
  }

  // 2 and 3. The gate is 1 off content.
  if (program.gate != nullptr) {
    const auto* gates = reinterpret_cast<const float*>(shared + l.gates);
#pragma unroll
    for (int i = 0; i < decided; ++i) p[i] *= gates[column_of(i, lane)];
  }
  merge_phrases<A>(l, shared, phrases, lane, p);

  // 4 and 5. An entry goes if rank >= kth or rank <= low. What takes no part ranks -1, under any probability.
  const bool random = KIND >= equipped && program.random_ratio >= 0.0f, suppresses = program.threshold >= 0.0f;
  if (random || drop > 0 || suppresses) {
    if (random) {
      const auto* order = reinterpret_cast<const int16_t*>(shared + l.order);
      const auto seed = static_cast<uint64_t>(program.seeds[b]);
      drop_at_random<A>(order, seed, program.random_ratio, content, lane, h, m, p);
    }
    const Ranks<VALUES> rank{p, content, lane};
    float kth = bits_float(0x7f800000), low = -0.5f;
    if (drop > 0) {
      kth = KIND < any_shape ? kth_largest<decided>(rank, drop, static_cast<int>(l.call.max_drop))
                             : kth_by_bisection<decided>(rank, drop);
    }
    if (suppresses) {
      float highest = 0.0f;
#pragma unroll
      for (int i = 0; i < decided; ++i) highest = rank[i] < kth ? larger(highest, rank[i]) : highest;
      low = program.threshold * quad_max(highest);
    }
#pragma unroll
    for (int i = 0; i < decided; ++i) {
      p[i] = is(i) && (rank[i] >= kth || rank[i] <= low) ? -0.0f : p[i];
    }
  }

  renormalize<A>(program, content, lane, total, mass, p, after);
}

}  // namespace sdattn::cuda::rows
