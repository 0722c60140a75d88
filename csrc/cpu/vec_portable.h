// Four lanes in the compiler's own vector types: SSE2, NEON, or whatever the baseline has.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct V {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  using Mask = I;
  static constexpr int width = 4, tile = 6;

  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  // The first n, at most four; zero beyond.
  static F load_n(const float* p, int n) {
    if (n >= width) return load(p);
    F v = set(0.0f);
    std::memcpy(&v, p, n * 4);
    return v;
  }
  static void store_n(float* p, F v, int n) { std::memcpy(p, &v, n * 4); }
  static F load_bf16_n(const uint16_t* p, int n) {
    I v = {0, 0, 0, 0};
    for (int i = 0; i < n && i < width; ++i) v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
    return reinterpret_cast<F>(v);
  }
  static void store_bf16_n(uint16_t* p, F v, int n) {
    typedef uint32_t U __attribute__((vector_size(16)));
    const U u = reinterpret_cast<U>(v);
    U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : U{0x7fc0u, 0x7fc0u, 0x7fc0u, 0x7fc0u};
    for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(rounded[i]);
  }

  static F fma(F a, F b, F c) { return a * b + c; }
  // As x86 does it: b where either is NaN.
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static Mask lt(F a, F b) { return a < b; }
  static Mask le(F a, F b) { return a <= b; }
  static Mask eq(F a, F b) { return a == b; }
  static bool all(Mask m) { return m[0] && m[1] && m[2] && m[3]; }
  static F select(Mask m, F a, F b) { return m ? a : b; }
  // v where v < high (and > low), else 0.
  static F if_below(F v, F high) { return select(v < high, v, set(0.0f)); }
  static F if_between(F low, F v, F high) { return if_between(low, v, high, v); }
  static F if_between(F low, F v, F high, F then) { return select((low < v) & (v < high), then, set(0.0f)); }

  // 2**floor-ish(x) through the exponent bits, for x <= 0; below 2**-126 gives 0.
  static F scale_by_power(F y, F x, F shifted) {
    const I power = reinterpret_cast<I>(shifted) << 23;
    const F scaled = reinterpret_cast<F>(reinterpret_cast<I>(y) + power);
    const F flushed = x < set(-126.0f) ? set(0.0f) : scaled;
    return x == x ? flushed : x;
  }

  static F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};

}  // namespace
