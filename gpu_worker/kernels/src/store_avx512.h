// The end of a linear layer: sums become outputs.

#pragma once

#include "linear.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

inline __m512 silu(__m512 x) {
  const __m512 decay = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), decay)));
}

// Stores 32 sums of one row, of the columns from `column` on; what lies beyond the last is dropped.
inline void store_columns(const Linear& weight, const Rows& rows, int64_t row, int64_t column,
                          __m512 low, __m512 high) {
  float* out = rows.out + row * rows.num_columns;
  if (weight.gated) {
    const int64_t first = column / 2, left = rows.num_columns - first;
    if (left > 0) {
      _mm512_mask_storeu_ps(out + first, first_lanes(left), _mm512_mul_ps(silu(low), high));
    }
    return;
  }
  const __m512 sums[2] = {low, high};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t first = column + half * 16, left = rows.num_columns - first;
    if (left <= 0) return;
    const __mmask16 lanes = first_lanes(left);
    __m512 sum = sums[half];
    if (weight.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, weight.bias + first));
    _mm512_mask_storeu_ps(out + first, lanes, sum);
  }
}

}  // namespace
}  // namespace fb
