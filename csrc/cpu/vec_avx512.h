// Sixteen lanes: AVX-512 F, BW, DQ, VL; with AVX512_BF16 the two products of bfloat16 run on vdpbf16ps.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct V {
  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;
  static constexpr int width = 16, tile = 12;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static Mask lanes(int n) { return static_cast<Mask>(n >= width ? 0xffffu : (1u << n) - 1u); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
  static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
  static F load_bf16_n(const uint16_t* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16));
  }
  static void store_bf16_n(uint16_t* p, F v, int n) {
    const I u = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(rounded));
  }

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static Mask lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static Mask eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static bool all(Mask m) { return m == 0xffffu; }
  static F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  // v where v < high (and > low), else 0.
  static F if_below(F v, F high) { return _mm512_maskz_mov_ps(lt(v, high), v); }
  static F if_between(F low, F v, F high) { return if_between(low, v, high, v); }
  static F if_between(F low, F v, F high, F then) {
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(lt(low, v), v, high, _CMP_LT_OQ), then);
  }

  // y * 2**n where n = shifted - 1.5 * 2**23; gradual underflow, NaN stays NaN.
  static F scale_by_power(F y, F, F shifted) {
    return _mm512_scalef_ps(y, _mm512_sub_ps(shifted, set(12582912.0f)));
  }

  static F zip_low(F a, F b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  static F zip_high(F a, F b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
  }

#if defined(__AVX512BF16__)
  // acc + x.low * y.low + x.high * y.high, lane by lane, on pairs of bfloat16.
  static F dot_bf16(F x, uint32_t y, F acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_set1_epi32(static_cast<int>(y)));
  }
  // n bfloat16 (up to 32) as pairs, zero beyond.
  static F load_pairs_n(const uint16_t* p, int n) {
    const __mmask32 m = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p));
  }
  // Two vectors rounded to bfloat16, lane by lane a pair.
  static F round_pairs(F low, F high) {
    const I halves = (I)_mm512_cvtne2ps_pbh(high, low);
    const I mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                   23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(mix, halves));
  }
#endif
};

}  // namespace
