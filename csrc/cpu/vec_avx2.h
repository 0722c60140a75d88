// Eight lanes: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct V {
  using F = __m256;
  using I = __m256i;
  using Mask = __m256;
  static constexpr int width = 8, tile = 6;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load_n(const float* p, int n) { return n >= width ? load(p) : _mm256_maskload_ps(p, lanes(n)); }
  static void store_n(float* p, F v, int n) {
    if (n >= width) store(p, v);
    else _mm256_maskstore_ps(p, lanes(n), v);
  }
  static F load_bf16_n(const uint16_t* p, int n) {
    __m128i half = _mm_setzero_si128();
    if (n >= width) half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    else std::memcpy(&half, p, n * 2);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store_bf16_n(uint16_t* p, F v, int n) {
    const I u = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    I rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    if (n >= width) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    else std::memcpy(p, &half, n * 2);
  }

  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static Mask lt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask le(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static Mask eq(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static bool all(Mask m) { return _mm256_movemask_ps(m) == 0xff; }
  static F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  // v where v < high (and > low), else 0.
  static F if_below(F v, F high) { return _mm256_and_ps(lt(v, high), v); }
  static F if_between(F low, F v, F high) { return if_between(low, v, high, v); }
  static F if_between(F low, F v, F high, F then) { return _mm256_and_ps(_mm256_and_ps(lt(low, v), lt(v, high)), then); }

  // y * 2**n, n in the low bits of `shifted`; x is the exponent asked for: below -126 gives 0, NaN stays NaN.
  static F scale_by_power(F y, F x, F shifted) {
    const I power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const F scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
    const F flushed = _mm256_andnot_ps(lt(x, set(-126.0f)), scaled);
    return select(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), x, flushed);
  }

  static F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

}  // namespace
