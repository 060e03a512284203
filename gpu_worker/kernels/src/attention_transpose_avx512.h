// Transposing 16 vectors of 16 numbers of 32 bits.

#pragma once

#include <immintrin.h>

namespace fb {
namespace {  // files with other instruction sets have copies of their own

// 16 rows of 16 -> 16 columns.
void transpose(__m512 (&rows)[16]) {
  __m512 pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  // quads[4 g + j]: rows 4 g to 4 g + 3, columns j, j + 4, j + 8, j + 12.
  __m512 quads[16];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pairs[4 * g + j]);
      const __m512d high = _mm512_castps_pd(pairs[4 * g + 2 + j]);
      quads[4 * g + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      quads[4 * g + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    rows[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    rows[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

}  // namespace
}  // namespace fb
