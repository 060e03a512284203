// The Hadamard transform of 64 values or fewer: an orthogonal mixing that spreads an outlier over
// all.
//
// Quantizing H x and H w in place of x and w leaves their product as it was, H being orthogonal but
// for a factor, and makes both easier to quantize: no value stands far above the others.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

constexpr float kHadamardNorm = 64.0f;  // of H transposed times H

// One stage within a register: lane i gets x[i] + x[i ^ d], or x[i ^ d] - x[i] where i has bit d.
inline __m512 hadamard_stage(__m512 x, __m512 swapped, __mmask16 has_bit) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), has_bit, swapped, x);
}

// The transforms of x's runs of `len` values, a power of two up to 16.
inline __m512 hadamard_runs(__m512 x, int64_t len) {
  if (len > 1) x = hadamard_stage(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
  if (len > 2) x = hadamard_stage(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
  if (len > 4) x = hadamard_stage(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
  if (len > 8) x = hadamard_stage(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
  return x;
}

// x: 64 values, transformed in place.
inline void hadamard(__m512 x[4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) x[v] = hadamard_runs(x[v], 16);
  const __m512 a = _mm512_add_ps(x[0], x[1]), b = _mm512_sub_ps(x[0], x[1]);
  const __m512 c = _mm512_add_ps(x[2], x[3]), d = _mm512_sub_ps(x[2], x[3]);
  x[0] = _mm512_add_ps(a, c);
  x[1] = _mm512_add_ps(b, d);
  x[2] = _mm512_sub_ps(a, c);
  x[3] = _mm512_sub_ps(b, d);
}

// The transforms of a row's runs of `len` values, a power of two up to 64 that divides `row_len`,
// times `factor`, in place.
inline void hadamard_row(float* row, int64_t row_len, int64_t len, float factor) {
  const __m512 factors = _mm512_set1_ps(factor);
  const int64_t step = len > 16 ? len : 16;
  for (int64_t i = 0; i < row_len; i += step) {
    __m512 x[4];
    for (int v = 0; 16 * v < step; ++v) {
      x[v] = _mm512_maskz_loadu_ps(first_lanes(row_len - i - 16 * v), row + i + 16 * v);
    }
    if (len == 64) {
      hadamard(x);
    } else if (len == 32) {
      const __m512 a = hadamard_runs(x[0], 16), b = hadamard_runs(x[1], 16);
      x[0] = _mm512_add_ps(a, b);
      x[1] = _mm512_sub_ps(a, b);
    } else {
      x[0] = hadamard_runs(x[0], len);
    }
    for (int v = 0; 16 * v < step; ++v) {
      _mm512_mask_storeu_ps(row + i + 16 * v, first_lanes(row_len - i - 16 * v),
                            _mm512_mul_ps(x[v], factors));
    }
  }
}

}  // namespace
}  // namespace fb
