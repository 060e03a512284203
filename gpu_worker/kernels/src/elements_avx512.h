// Number formats of weights and of the KV-cache's pages (cache/page_formats.py): how their elements
// are read and written, 16 at a time.
//
// Writing rounds to the nearest, ties to even; a NaN stays one. Where rows of elements have a scale
// (kScaled), value = element * kUnit * scale, and loading gives the element alone. Keys are mixed
// before they are written to pages of some (kMixed).

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

struct Float32Element {
  using Stored = float;
  static constexpr bool kScaled = false;
  static constexpr bool kMixed = false;
  static __m512 load(const Stored* p) { return _mm512_loadu_ps(p); }
  static __m512 load(__mmask16 mask, const Stored* p) { return _mm512_maskz_loadu_ps(mask, p); }
  static void store(Stored* p, __mmask16 mask, __m512 values) {
    _mm512_mask_storeu_ps(p, mask, values);
  }
};

struct Float16Element {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  static constexpr bool kMixed = false;
  static __m512 load(const Stored* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 load(__mmask16 mask, const Stored* p) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  }
  static void store(Stored* p, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline __m256i to_bfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_add_epi32(bits, half);
  // Rounding would carry a NaN's low bits into its exponent and sign.
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

struct Bfloat16Element {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  static constexpr bool kMixed = false;
  static __m512 widen(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static __m512 load(const Stored* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 load(__mmask16 mask, const Stored* p) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
  }
  static void store(Stored* p, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(p, mask, to_bfloat16(values));
  }
};

// e4m3 in 16 bits at a time: shifted to where float16 has its fields, a number is 2^8 times too
// small, also one below the normal ones, which float16 holds as such.
struct Fp8Element {
  using Stored = uint8_t;
  static constexpr bool kScaled = true;
  static constexpr bool kMixed = false;
  static constexpr float kUnit = 256.0f;
  static constexpr float kGreatest = 448.0f;
  static __m512 widen(__m128i narrow) {
    // The sign is extended into the bit above the exponent, too.
    const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(narrow), 7);
    const __m256i fields = _mm256_set1_epi16(static_cast<short>(0xbfff));
    return _mm512_cvtph_ps(_mm256_and_si256(bits, fields));
  }
  static __m512 load(const Stored* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m512 load(__mmask16 mask, const Stored* p) {
    return widen(_mm_maskz_loadu_epi8(mask, p));
  }
  // Magnitudes up to kGreatest.
  static void store(Stored* p, __mmask16 mask, __m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    // Normal numbers: round 20 bits of the mantissa away, and count exponents from 2^-7.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff - (120 << 23)));
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(magnitude, half), 20);
    // Those below 2^-6 are multiples of 2^-9, as are the floats from 2^14 to 2^15.
    const __m512 shift = _mm512_set1_ps(0x1p14f);
    const __m512i small = _mm512_sub_epi32(
        _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), shift)),
        _mm512_castps_si512(shift));
    const __mmask16 is_small =
        _mm512_cmplt_epi32_mask(magnitude, _mm512_castps_si512(_mm512_set1_ps(0x1p-6f)));
    const __m512i code = _mm512_or_si512(_mm512_mask_mov_epi32(normal, is_small, small), sign);
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(code));
  }
};

struct Int8Element {
  using Stored = int8_t;
  static constexpr bool kScaled = true;
  static constexpr bool kMixed = true;
  static constexpr float kUnit = 1.0f;
  static constexpr float kGreatest = 127.0f;
  static __m512 widen(__m128i narrow) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow)); }
  static __m512 load(const Stored* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m512 load(__mmask16 mask, const Stored* p) {
    return widen(_mm_maskz_loadu_epi8(mask, p));
  }
  static void store(Stored* p, __mmask16 mask, __m512 values) {
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(values)));
  }
};

// What scales are multiplied by, of 16 rows or fewer: they are bfloat16 numbers.
template <class Element>
__m512 load_scales(__mmask16 mask, const uint16_t* p) {
  const __m512 scales = Bfloat16Element::load(mask, p);
  return _mm512_mul_ps(scales, _mm512_set1_ps(Element::kUnit));
}

}  // namespace
}  // namespace fb
