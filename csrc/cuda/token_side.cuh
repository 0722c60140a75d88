// The token side of a head in shared memory: the permutation of columns, content first, and what the program needs of
// each column (gate, phrase, slot of its map).
#pragma once

#include "kernel_traits.cuh"

namespace sdattn::cuda::rows {

constexpr int phrase_words = 2;  // a lane has at most 64 columns in tile A

constexpr int side_bytes(int columns) { return columns * (3 * 4 + 4 * 2 + 2 * 4 * phrase_words) + 16; }

// What all threads know of a head. It lies in shared memory and is read where it is used: registers are scarcer.
struct Numbers {
  int content;  // columns below are content; 0: plain attention
  int phrases;  // how many
  int drop;     // k of step 4
  float share;  // of this head in a mean over heads, 0 for one that takes no part
};

SDATTN_DEVICE int count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

SDATTN_DEVICE bool is_content(const RowProgram& p, int64_t b, int64_t tokens, int token) {
  return token < tokens && p.content[b * tokens + token] != 0;
}

// Of every phrase, for each lane of a quad: which of its values are members.
template <int A>
SDATTN_DEVICE void phrase_masks(const int16_t* leaders, const int16_t* first_of, int phrases, uint32_t* masks) {
#pragma unroll 1
  for (int i = thread_index(); i < 4 * phrases; i += threads_of_block()) {
    const int leader = first_of[i / 4];
#pragma unroll
    for (int word = 0; word < phrase_words; ++word) {
      uint32_t mask = 0;
#pragma unroll 1
      for (int j = 0; j < 32 && 32 * word + j < 4 * A; ++j) {
        mask |= (leaders[column_of(32 * word + j, i % 4)] == leader ? 1u : 0u) << j;
      }
      masks[phrase_words * i + word] = mask;
    }
  }
}

// Which token is in which column, what its gate, its map's slot and its phrase are, and the head's `Numbers`. Ends with
// all of it visible.
template <int A, int KIND>
SDATTN_DEVICE void token_side(const Launch& l, unsigned char* shared, int b, int h, bool programmed, bool active) {
  const RowProgram& program = l.call.attention.program;
  const int n = static_cast<int>(l.call.attention.N);
  const int lane = thread_index() & 31, threads = threads_of_block();
  auto* order = reinterpret_cast<int16_t*>(shared + l.order);
  auto* position = reinterpret_cast<int16_t*>(shared + l.position);
  auto* gates = reinterpret_cast<float*>(shared + l.gates);
  auto* slots = reinterpret_cast<int32_t*>(shared + l.slots);
  auto* leaders = reinterpret_cast<int16_t*>(shared + l.leaders);
  auto* first_of = reinterpret_cast<int16_t*>(shared + l.phrases);
  auto* masks = reinterpret_cast<uint32_t*>(shared + l.masks);
  auto* numbers = reinterpret_cast<Numbers*>(shared + l.numbers);
  const bool fused = programmed && program.phrases != nullptr;

  if (thread_index() < 32) {
    int all = 0, before = 0, found = 0;
    if (programmed) {
#pragma unroll 1
      for (int first = 0; first < n; first += 32) all += count_bits(ballot(is_content(program, b, n, first + lane)));
    }
    const uint32_t below = (1u << lane) - 1u;
#pragma unroll 1
    for (int first = 0; first < l.columns; first += 32) {
      const int token = first + lane;
      const bool mine = programmed && is_content(program, b, n, token);
      const uint32_t those = ballot(mine);
      const int rank = before + count_bits(those & below);
      if (token < n) {
        const int column = mine ? rank : all + token - rank;
        order[column] = static_cast<int16_t>(token);
        position[token] = static_cast<int16_t>(column);
      } else if (token < l.columns) {
        order[token] = -1;
        position[token] = static_cast<int16_t>(token);
      }
      before += count_bits(those);
      const bool leads = fused && mine && program.phrases[b * n + token] == token;
      const uint32_t leading = ballot(leads);
      if (leads) first_of[found + count_bits(leading & below)] = static_cast<int16_t>(token);
      found += count_bits(leading);
    }
    if (lane == 0) {
      int heads = 0;
#pragma unroll 1
      for (int i = 0; KIND >= equipped && l.mean && i < l.call.attention.H; ++i) {
        heads += program.head_mode == nullptr || program.head_mode[i] == head_program ? 1 : 0;
      }
      const float share = active && heads > 0 ? reciprocal(static_cast<float>(heads)) : 0.0f;
      *numbers = Numbers{all, found, programmed && program.drop != nullptr ? program.drop[b] : 0, share};
    }
  }
  sync_block();
  const int content = numbers->content, phrases = numbers->phrases;

#pragma unroll 1
  for (int column = thread_index(); column < l.columns; column += threads) {
    const int token = order[column];
    const bool decided = column < content;
    const int64_t row = program.gate_heads > 1 ? b * program.gate_heads + h : b;
    gates[column] = decided && program.gate != nullptr ? program.gate[row * n + token] : 1.0f;
    leaders[column] = static_cast<int16_t>(decided && fused ? program.phrases[b * n + token] : -1);
    slots[column] = -1;
  }
  sync_block();
  if (KIND >= equipped && l.call.attention.maps != nullptr) {
#pragma unroll 1
    for (int i = thread_index(); i < program.capture_count; i += threads) {
      slots[position[program.capture_tokens[i]]] = i;
    }
  }
  phrase_masks<A>(leaders, first_of, phrases, masks);
  sync_block();
}

}  // namespace sdattn::cuda::rows
