// The Hadamard transform of 64 values: an orthogonal mixing that spreads an outlier over all.
//
// Quantizing H x and H w in place of x and w leaves their product as it was, H being orthogonal but
// for the factor 64, and makes both easier to quantize: no value stands far above the others.

#pragma once

#include <immintrin.h>

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

constexpr float kHadamardNorm = 64.0f;  // of H transposed times H

// One stage within a register: lane i gets x[i] + x[i ^ d], or x[i ^ d] - x[i] where i has bit d.
inline __m512 hadamard_stage(__m512 x, __m512 swapped, __mmask16 has_bit) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), has_bit, swapped, x);
}

// x: 64 values, transformed in place.
inline void hadamard(__m512 x[4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    x[v] = hadamard_stage(x[v], _mm512_permute_ps(x[v], 0xb1), 0xaaaa);
    x[v] = hadamard_stage(x[v], _mm512_permute_ps(x[v], 0x4e), 0xcccc);
    x[v] = hadamard_stage(x[v], _mm512_shuffle_f32x4(x[v], x[v], 0xb1), 0xf0f0);
    x[v] = hadamard_stage(x[v], _mm512_shuffle_f32x4(x[v], x[v], 0x4e), 0xff00);
  }
  const __m512 a = _mm512_add_ps(x[0], x[1]), b = _mm512_sub_ps(x[0], x[1]);
  const __m512 c = _mm512_add_ps(x[2], x[3]), d = _mm512_sub_ps(x[2], x[3]);
  x[0] = _mm512_add_ps(a, c);
  x[1] = _mm512_add_ps(b, d);
  x[2] = _mm512_sub_ps(a, c);
  x[3] = _mm512_sub_ps(b, d);
}

}  // namespace
}  // namespace fb
