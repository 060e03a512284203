// Attention of few rows to a tile of keys, as in decoding: the memory's speed is what counts.
//
// Keys and values are widened as they are read, once for four rows, while the next tile is fetched
// line by line. Nothing is transposed: 4 keys times 4 rows are 16 sums in registers, whose lanes
// are added up afterwards.

#pragma once

#include <immintrin.h>

#include "attention_reader.h"
#include "attention_rows.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int kFewRows = 4;

// Each 128-bit lane of the result: that lane's sums of a, b, c, d.
__m512 add_within_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(
      _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(
      _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

// 16 sums, in order, out of four results of the above.
__m512 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Scores of kRows rows from `query` on for the first `num_keys` keys of the tile, rounded up to 16.
template <class Element, int kRows>
void score_few(const TileReader<Element>& reader, int64_t head_dim, int64_t num_keys,
               const float* query, const Tile& tile) {
  for (int64_t first = 0; first < num_keys; first += 16) {
    __m512 quarters[kRows][4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m512 sums[kRows][4];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[r][k] = _mm512_setzero_ps();
      }
      const int64_t slot = first + 4 * q;
      for (int64_t d = 0; d < head_dim; d += 16) {
        const __mmask16 mask = first_lanes(head_dim - d);
        __m512 keys[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          keys[k] = Element::load(mask, reader.key(slot + k) + d);
          reader.fetch_key(slot + k, d);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512 values = _mm512_load_ps(query + r * tile.width + d);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sums[r][k] = _mm512_fmadd_ps(values, keys[k], sums[r][k]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        quarters[r][q] = add_within_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m512 scores = add_lanes(quarters[r][0], quarters[r][1], quarters[r][2], quarters[r][3]);
      if constexpr (Element::kScaled) {
        scores = _mm512_mul_ps(scores, _mm512_load_ps(reader.key_scales() + first));
      }
      _mm512_store_ps(tile.scores + r * tile.num_keys + first, scores);
    }
  }
}

// Multiplies the rows' weights by the values' scales.
template <class Element>
void scale_weights(const TileReader<Element>& reader, int64_t num_rows, int64_t num_vectors,
                   const Tile& tile) {
  for (int64_t v = 0; v < num_vectors; ++v) {
    const __m512 scales = _mm512_load_ps(reader.value_scales() + 16 * v);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* weights = tile.scores + r * tile.num_keys + 16 * v;
      _mm512_store_ps(weights, _mm512_mul_ps(_mm512_load_ps(weights), scales));
    }
  }
}

// Adds kVectors columns from `d` on of the weighted values to the rows' sums.
template <class Element, int kRows, int kVectors>
void add_values_few(const TileReader<Element>& reader, int64_t d, __mmask16 last_mask,
                    int64_t num_keys, const float* factors, float* sums, const Tile& tile) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = _mm512_mul_ps(_mm512_load_ps(sums + r * tile.width + d + 16 * v),
                                _mm512_set1_ps(factors[r]));
    }
  }
  for (int64_t i = 0; i < num_keys; ++i) {
    __m512 values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = v == kVectors - 1 ? last_mask : static_cast<__mmask16>(0xffff);
      values[v] = Element::load(mask, reader.value(i) + d + 16 * v);
      reader.fetch_value(i, d + 16 * v);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 weight = _mm512_set1_ps(tile.scores[r * tile.num_keys + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_fmadd_ps(weight, values[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_ps(sums + r * tile.width + d + 16 * v, sum[r][v]);
    }
  }
}

template <class Element, int kRows>
void attend_rows(const TileReader<Element>& reader, int64_t head_dim, int64_t first_row,
                 int64_t begin, int64_t num_keys, const Tile& tile) {
  int64_t visible[kRows];
  const int64_t most = count_visible(tile, first_row, kRows, begin, num_keys, visible);
  if (most == 0) return;
  score_few<Element, kRows>(reader, head_dim, most, tile.query + first_row * tile.width, tile);
  alignas(64) float factors[16];
  soften(tile, first_row, kRows, visible, (most + 15) / 16, factors);
  if constexpr (Element::kScaled) scale_weights(reader, kRows, (most + 15) / 16, tile);
  float* sums = tile.sums + first_row * tile.width;
  for (int64_t d = 0; d < head_dim; d += 64) {
    const int64_t left = head_dim - d;
    const __mmask16 mask = first_lanes(left >= 64 ? 16 : (left - 1) % 16 + 1);
    switch (left >= 64 ? 4 : (left + 15) / 16) {
      case 1: add_values_few<Element, kRows, 1>(reader, d, mask, most, factors, sums, tile); break;
      case 2: add_values_few<Element, kRows, 2>(reader, d, mask, most, factors, sums, tile); break;
      case 3: add_values_few<Element, kRows, 3>(reader, d, mask, most, factors, sums, tile); break;
      case 4: add_values_few<Element, kRows, 4>(reader, d, mask, most, factors, sums, tile); break;
    }
  }
}

template <class Element>
void attend_few(const TileReader<Element>& reader, int64_t head_dim, int64_t num_rows,
                int64_t begin, int64_t num_keys, const Tile& tile) {
  for (int64_t r = 0; r < num_rows; r += kFewRows) {
    switch (num_rows - r) {
      case 1: attend_rows<Element, 1>(reader, head_dim, r, begin, num_keys, tile); break;
      case 2: attend_rows<Element, 2>(reader, head_dim, r, begin, num_keys, tile); break;
      case 3: attend_rows<Element, 3>(reader, head_dim, r, begin, num_keys, tile); break;
      default: attend_rows<Element, 4>(reader, head_dim, r, begin, num_keys, tile); break;
    }
  }
}

}  // namespace
}  // namespace fb
