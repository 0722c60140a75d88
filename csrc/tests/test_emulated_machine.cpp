// The machine that stands in for a GPU: what each primitive gives against a direct computation, and that the mistakes it
// is there to find are found. tests/csrc/test_sanitizers.py compiles this with AddressSanitizer and UBSan.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../cuda/machine.h"

using namespace sdattn::cuda;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

float normal() {
  float sum = -2.0f;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(random_bits() >> 8) / 16777216.0f;
  return sum;
}

void check(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

using Kernel = std::function<void()>;
void call(const Kernel& kernel) { kernel(); }
int run(const Kernel& kernel, int blocks = 1, int threads = 32, size_t shared_bytes = 0) {
  return launch(call, blocks, threads, shared_bytes, nullptr, kernel);
}

// The launch fails, and the message has all of these words.
void check_fails(const char* what, const Kernel& kernel, std::vector<const char*> words, int threads = 32,
                 size_t shared_bytes = 256) {
  const int error = run(kernel, 1, threads, shared_bytes);
  const std::string message = machine_message(error);
  bool right = error == emulated::launch_failure;
  for (const char* word : words) right = right && message.find(word) != std::string::npos;
  check(right, std::string(what) + ": error " + std::to_string(error) + ", " + message);
  int ran = 0;
  check(run([&] { ++ran; }) == 0 && ran == 32, std::string("the machine goes on after ") + what);
}

void test_threads() {
  std::vector<int> seen(3 * 96);
  check(run([&] { seen[block_index() * threads_of_block() + thread_index()] += block_count(); }, 3, 96) == 0, "runs");
  for (const int x : seen) check(x == 3, "every thread runs once");
  check(run([] {}, 1, 31) == emulated::invalid_configuration, "half a warp is refused");
  check(run([] {}, 0, 32) == emulated::invalid_configuration, "no block is refused");
  check(run([] {}, 1, 32, 300000) == emulated::invalid_value, "too much shared memory is refused");
}

void test_shared_memory() {
  bool poisoned = true, aligned = true;
  std::vector<int> sums(64);
  const auto kernel = [&] {
    auto* numbers = reinterpret_cast<int*>(shared_memory());
    aligned = aligned && reinterpret_cast<uintptr_t>(numbers) % 128 == 0;
    poisoned = poisoned && numbers[thread_index()] == -1;
    sync_block();
    numbers[thread_index()] = thread_index() * 10;
    sync_block();
    sums[thread_index()] = numbers[(thread_index() + 33) % 64];
  };
  for (const bool reversed : {false, true}) {
    emulated::device.reversed = reversed;
    check(run(kernel, 2, 64, 64 * sizeof(int)) == 0, "shared memory");
    check(poisoned && aligned, "shared memory starts out as NaN, aligned");
    for (int i = 0; i < 64; ++i) check(sums[i] == (i + 33) % 64 * 10, "sync_block lets others see");
  }
  emulated::device.reversed = false;
}

void test_warps() {
  std::vector<float> floats(64);
  std::vector<int> ints(64);
  std::vector<uint32_t> words(64), ballots(64);
  std::vector<int> votes(64);
  check(run([&] {
          const int i = thread_index();
          floats[i] = shuffle_xor(static_cast<float>(i) + 0.5f, 3);
          ints[i] = shuffle_xor(-i, 16);
          sync_warp();
          words[i] = shuffle_xor(static_cast<uint32_t>(i), i % 2 == 0 ? 1 : 2);
          ballots[i] = ballot(i % 3 == 0);
          votes[i] = any(i == 7) + 2 * all(i < 32);
        },
            1, 64) == 0,
        "warps");
  for (int i = 0; i < 64; ++i) {
    uint32_t expected = 0;
    for (int j = 0; j < 32; ++j) expected |= (i / 32 * 32 + j) % 3 == 0 ? 1u << j : 0u;
    check(floats[i] == static_cast<float>(i ^ 3) + 0.5f && ints[i] == -(i ^ 16), "shuffle_xor");
    check(words[i] == static_cast<uint32_t>(i ^ (i % 2 == 0 ? 1 : 2)), "shuffle_xor, a mask of each lane's own");
    check(ballots[i] == expected && votes[i] == (i < 32 ? 3 : 0), "votes");
  }
}

template <class T>
float round_to(float x) {
  return to_float(from_float<T>(x));
}

void test_numbers() {
  check(round_to<half_t>(1.0f + 1.0f / 2048) == 1.0f && round_to<half_t>(1.0f + 3.0f / 2048) == 1.0f + 2.0f / 1024,
        "half_t: ties to even");
  check(round_to<half_t>(65519.0f) == 65504.0f && std::isinf(round_to<half_t>(65520.0f)), "half_t: the largest");
  check(round_to<half_t>(std::ldexp(3.0f, -25)) == std::ldexp(1.0f, -23), "half_t: subnormal");
  check(round_to<half_t>(-std::ldexp(1.0f, -25)) == 0.0f && std::isnan(round_to<half_t>(NAN)), "half_t: zero and NaN");
  check(round_to<bfloat16_t>(1.0f + 1.0f / 256) == 1.0f && round_to<bfloat16_t>(1.0f + 3.0f / 256) == 1.0f + 1.0f / 64,
        "bfloat16_t: ties to even");
  check(std::isinf(round_to<bfloat16_t>(INFINITY)) && std::isnan(round_to<bfloat16_t>(NAN)), "bfloat16_t: inf and NaN");
  for (uint32_t i = 0; i < 65536; ++i) {
    const half_t half{static_cast<uint16_t>(i)};
    const bfloat16_t brain{static_cast<uint16_t>(i)};
    const float x = to_float(half), y = to_float(brain);
    check(std::isnan(x) ? (i & 0x7fff) > 0x7c00 : from_float<half_t>(x).bits == i, "half_t there and back");
    check(std::isnan(y) ? (i & 0x7fff) > 0x7f80 : from_float<bfloat16_t>(y).bits == i, "bfloat16_t there and back");
  }
  check(pack2<half_t>(1.0f, 2.0f) == 0x40003c00u && pack2<bfloat16_t>(1.0f, 2.0f) == 0x40003f80u, "pack2: low first");
  const half_t pair[2] = {{0x1234}, {0x5678}};
  const float one = 1.0f;
  check(word_of(pair) == 0x56781234u && word_of(&one) == 0x3f800000u, "word_of");
  check(bits_float(to_tf32(1.0f + 1.0f / 2048)) == 1.0f + 1.0f / 1024, "to_tf32: ties away from zero");
  check(exp2_fast(-3.0f) == 0.125f && exp2_fast(-INFINITY) == 0.0f && exp2_fast(-130.0f) == 0.0f, "exp2_fast");
  check(std::isnan(exp2_fast(NAN)) && log2_fast(8.0f) == 3.0f && std::isinf(log2_fast(0.0f)), "exp2 and log2");
}

// The fragments are spelled out again here, from the PTX ISA, by element and not by register.
template <int K, class Product>
void check_product(const char* what, float (*rounded)(float), uint32_t (*word)(const float*), int per_word,
                   const Product& product) {
  std::vector<float> a(16 * K), b(K * 8), c(16 * 8);
  for (auto* x : {&a, &b, &c}) {
    for (float& e : *x) e = rounded(normal());
  }
  std::vector<float> got(16 * 8);
  check(run([&] {
          const int group = thread_index() / 4, in_group = thread_index() % 4;
          uint32_t of_a[4] = {}, of_b[2] = {};
          float of_c[4];
          for (int part = 0; part < (per_word == 2 ? K / 8 : K / 4); ++part) {
            const int k = per_word == 2 ? 8 * part + 2 * in_group : 4 * part + in_group;
            float column[2] = {b[k * 8 + group], per_word == 2 ? b[(k + 1) * 8 + group] : 0.0f};
            of_a[2 * part] = word(&a[group * K + k]);
            of_a[2 * part + 1] = word(&a[(group + 8) * K + k]);
            of_b[part] = word(column);
          }
          for (int i = 0; i < 4; ++i) of_c[i] = c[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2];
          product(of_c, of_a, of_b);
          for (int i = 0; i < 4; ++i) got[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2] = of_c[i];
        }) == 0,
        what);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = c[m * 8 + n];
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[m * K + k]) * b[k * 8 + n];
      check(std::fabs(got[m * 8 + n] - sum) < 2e-6 * (1 + std::fabs(sum)), std::string(what) + ": a sum");
    }
  }
}

template <class T>
uint32_t pair(const float* x) {
  return pack2<T>(x[0], x[1]);
}
uint32_t tf32(const float* x) { return to_tf32(*x); }
float round_to_tf32(float x) { return bits_float(to_tf32(x)); }

template <class T>
void check_products(const char* what) {
  check_product<16>(what, round_to<T>, pair<T>, 2, [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_k16<T>(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]);
  });
  check_product<8>(what, round_to<T>, pair<T>, 2, [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_k8<T>(c[0], c[1], c[2], c[3], a[0], a[1], b[0]);
  });
}

void test_products() {
  check_products<half_t>("mma of half_t");
  check_products<bfloat16_t>("mma of bfloat16_t");
  check_product<8>("mma_tf32", round_to_tf32, tf32, 1,
                   [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
                     mma_tf32(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]);
                   });
  float c[32];
  const auto forgets_to_round = [&] {
    float x[4] = {};
    const uint32_t almost_two = 0x3fffffffu, one = 0x3f800000u, b = thread_index() % 4 == 0 ? one : 0u;
    mma_tf32(x[0], x[1], x[2], x[3], almost_two, almost_two, almost_two, almost_two, b, 0u);
    c[thread_index()] = x[0];
  };
  check(run(forgets_to_round) == 0 && c[0] == 2.0f - 1.0f / 1024, "what is not rounded to tf32 is cut off");
}

void test_matrices() {
  uint32_t four[32][4], two[32][2];
  check(run([&] {
          auto* halves = reinterpret_cast<uint16_t*>(shared_memory());
          const int lane = thread_index();
          for (int i = 0; i < 8; ++i) halves[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
          sync_warp();
          load_matrix_x4_trans(four[lane], halves + lane * 8);
          load_matrix_x2_trans(two[lane], lane < 16 ? halves + (31 - lane) * 8 : nullptr);
        },
            1, 32, 512) == 0,
        "load_matrix");
  for (int lane = 0; lane < 32; ++lane) {
    const int row = 2 * (lane % 4), column = lane / 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int low = (8 * matrix + row) * 8 + column;
      check(four[lane][matrix] == static_cast<uint32_t>(low | (low + 8) << 16), "load_matrix_x4_trans");
    }
    for (int matrix = 0; matrix < 2; ++matrix) {
      const int low = (31 - 8 * matrix - row) * 8 + column;
      check(two[lane][matrix] == static_cast<uint32_t>(low | (low - 8) << 16), "load_matrix_x2_trans");
    }
  }
}

void test_copies() {
  alignas(16) unsigned char from[32 * 28];
  for (size_t i = 0; i < sizeof from; ++i) from[i] = static_cast<unsigned char>(i % 251);
  bool early = false, first_there = true, second_early = false, all_there = true;
  check(run([&] {
          const int lane = thread_index();
          unsigned char* to = shared_memory();
          std::memset(to + lane * 16, 7, 16);
          copy_async<16>(to + lane * 16, from + lane * 16);
          commit_copies();
          copy_async<8>(to + 512 + lane * 8, from + 512 + lane * 8);
          copy_async<4>(to + 768 + lane * 4, from + 768 + lane * 4);
          commit_copies();
          early = early || to[lane * 16 + 3] != 0xff;
          wait_copies<1>();
          first_there = first_there && std::memcmp(to + lane * 16, from + lane * 16, 16) == 0;
          second_early = second_early || to[512 + lane * 8] != 0xff || to[768 + lane * 4] != 0xff;
          wait_copies<0>();
          sync_block();
          all_there = all_there && std::memcmp(to, from, sizeof from) == 0;
        },
            1, 32, sizeof from) == 0,
        "copies");
  check(!early && !second_early, "a copy that is not waited for shows: its place is NaN");
  check(first_there && all_there, "copies arrive, group by group");
  bool never = true;
  check(run([&] {
          copy_async<16>(shared_memory() + thread_index() * 16, from + thread_index() * 16);
          wait_copies<0>();
          sync_block();
          never = never && shared_memory()[thread_index() * 16] == 0xff;
        },
            1, 32, 512) == 0 && never,
        "a copy that is not committed never arrives");

  alignas(16) uint32_t words[8] = {1, 2, 3, 4, 5, 6, 7, 8}, copied[8] = {};
  check(run([&] {
          if (thread_index() != 0) return;
          store16(copied, load16(words));
          store8(copied + 4, load8(words + 4));
          store4(copied + 6, load4(words + 6));
        }) == 0 && std::memcmp(words, copied, 7 * 4) == 0 && copied[7] == 0,
        "loads and stores");
}

void test_mistakes() {
  check_fails("different meetings", [] { thread_index() == 5 ? sync_warp() : static_cast<void>(any(true)); },
              {"block 0, thread 5", "sync_warp", "any"});
  check_fails("the same from two places",
              [] {
                if (thread_index() < 8) {
                  shuffle_xor(1, 1);
                } else {
                  shuffle_xor(2, 1);
                }
              },
              {"shuffle_xor", "8 lanes"});
  check_fails("a lane that returns", [] { if (thread_index() != 3) sync_warp(); },
              {"thread 3: it returned", "sync_warp"});
  check_fails("a lane that returned", [] { if (thread_index() > 3) ballot(true); },
              {"4 lanes of its warp have returned", "ballot"});
  check_fails("part of a warp at sync_block", [] { thread_index() < 40 ? sync_block() : sync_warp(); },
              {"thread 40", "sync_warp", "sync_block"}, 64);
  check_fails("a warp that returns", [] { if (thread_index() < 32) sync_block(); }, {"1 warps returned", "sync_block"},
              64);
  alignas(16) static unsigned char memory[64];
  check_fails("load16", [] { load16(memory + 8); }, {"load16", "not aligned to 16"});
  check_fails("store8", [] { store8(memory + 4, {1, 2}); }, {"store8", "not aligned to 8"});
  check_fails("copy_async to", [] { copy_async<8>(shared_memory() + 4, memory); }, {"copy_async to", "not aligned to 8"});
  check_fails("copy_async from", [] { copy_async<4>(shared_memory(), memory + 2); }, {"copy_async from"});
  check_fails("copy_async beyond", [] { copy_async<16>(shared_memory() + 256, memory); }, {"outside of shared memory"});
  check_fails("load_matrix", [] { uint32_t r[2]; load_matrix_x2_trans(r, shared_memory() + 2); }, {"not aligned to 16"});
#if !defined(SDATTN_ASAN)
  check_fails("beyond shared memory", [] { shared_memory()[256 + thread_index()] = 1; }, {"beyond its 256 bytes"});
#endif
}

// Without a sync_block, who goes first decides.
void test_orders() {
  int seen[2];
  for (const bool reversed : {false, true}) {
    emulated::device.reversed = reversed;
    run([&] {
          if (thread_index() == 0) *shared_memory() = 1;
          if (thread_index() == 63) seen[reversed] = *shared_memory();
        }, 1, 64, 1);
  }
  emulated::device.reversed = false;
  check(seen[0] == 1 && seen[1] == 0xff, "the opposite order shows a missing sync_block");
}

}  // namespace

int main() {
  test_threads();
  test_shared_memory();
  test_warps();
  test_numbers();
  test_products();
  test_matrices();
  test_copies();
  test_mistakes();
  test_orders();
  if (failures == 0) std::printf("all right\n");
  return failures == 0 ? 0 : 1;
}
