// Writing rows of head_dim numbers to the KV-cache's pages, with their scales where there are some.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "elements_avx512.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

// The least bfloat16 number that is not below the positive `value`.
inline uint16_t round_up_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

// The scale for a row, and the row divided by it. A row with a number that is none gets an infinite
// scale and elements of 0.
template <class Element>
void store_scaled_row(const float* row, int64_t head_dim, typename Element::Stored* out,
                      uint16_t* scale) {
  constexpr uint16_t kInfinity = 0x7f80;
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < head_dim; i += 16) {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(head_dim - i), row + i);
    // Magnitudes order like the integers with the same bits, and NaNs come behind all of them.
    most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(values)));
  }
  const int32_t greatest_bits = _mm512_reduce_max_epi32(most);
  float greatest;
  memcpy(&greatest, &greatest_bits, sizeof greatest);
  *scale = greatest_bits >> 16 >= kInfinity ? kInfinity
                                            : round_up_to_bfloat16(greatest / Element::kGreatest);
  if (*scale == 0 || *scale == kInfinity) {
    memset(out, 0, static_cast<size_t>(head_dim));
    return;
  }
  const __m512 divisor = _mm512_castsi512_ps(_mm512_set1_epi32(*scale << 16));
  for (int64_t i = 0; i < head_dim; i += 16) {
    const __mmask16 mask = first_lanes(head_dim - i);
    Element::store(out + i, mask, _mm512_div_ps(_mm512_maskz_loadu_ps(mask, row + i), divisor));
  }
}

// A row of head_dim numbers to a slot, and to `scale`, which may be null if there are none.
template <class Element>
void store_row(const float* row, int64_t head_dim, typename Element::Stored* out,
               uint16_t* scale) {
  if constexpr (Element::kScaled) {
    store_scaled_row<Element>(row, head_dim, out, scale);
  } else {
    for (int64_t i = 0; i < head_dim; i += 16) {
      const __mmask16 mask = first_lanes(head_dim - i);
      Element::store(out + i, mask, _mm512_maskz_loadu_ps(mask, row + i));
    }
  }
}

}  // namespace
}  // namespace fb
