// Elementary functions on vectors of 16 floats.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fb {
namespace {  // files with other instruction sets have copies of their own

// The lanes below `count`.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

// x = whole + fraction with |fraction| <= 1/2. Exact for |x| < 2^22.
inline __m512 nearest_whole(__m512 x) {
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  return _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
}

// 2^f for |f| <= 1/2, relative error below 1.1e-7 before rounding (a minimax polynomial).
inline __m512 exp2_fraction(__m512 f) {
  __m512 y = _mm512_set1_ps(0x1.5bb9fcp-10f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.3cea9ep-7f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.c6b754p-5f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.ebf9bcp-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62e42ap-1f));
  return _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
}

// 2^x for x <= 0 as the softmax needs it: 0 below -125, NaN for NaN.
inline __m512 exp2_of_negative(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  const __m512 whole = nearest_whole(x);
  return _mm512_maskz_scalef_ps(counts, exp2_fraction(_mm512_sub_ps(x, whole)), whole);
}

// e^x for |x| <= 87, which other values are taken for; NaN for NaN. At most 1 unit in the last
// place off.
inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
  // 1.5 * 2^23 is added with the product's full precision: whole is the nearest to x / ln 2.
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  const __m512 whole =
      _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(0x1.715476p0f), magic), magic);
  // The remainder in units of ln 2, with ln 2 in two parts.
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0x1.62e4p-1f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0x1.7f7d1cp-20f), rest);
  // e^rest = 1 + rest + rest^2 * (...), |rest| <= ln 2 / 2.
  __m512 y = _mm512_set1_ps(0x1.6a2352p-10f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.123a6cp-7f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.5558f4p-5f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.555490p-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.fffffcp-2f));
  y = _mm512_fmadd_ps(_mm512_mul_ps(y, rest), rest, rest);
  y = _mm512_add_ps(y, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// 1 / x for 2^-125 < |x| < 2^126, within 1 unit in the last place.
inline __m512 reciprocal(__m512 x) {
  const __m512 near = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, near, _mm512_set1_ps(1.0f)), near, near);
}

}  // namespace
}  // namespace fb
