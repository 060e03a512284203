// Attention of many rows to a tile of keys: register-blocked products.
//
// Keys are widened and transposed once for all rows, values widened; then both products run in
// blocks of 6 rows by 64 columns, 24 sums in registers, with the softmax between them.

#pragma once

#include <immintrin.h>

#include "attention_reader.h"
#include "attention_rows.h"
#include "attention_transpose_avx512.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

// c (kRows, 16 kColumns) += or = a (kRows, depth) * b (depth, 16 kColumns). With `factors`, c is
// multiplied by its row's factor first.
template <int kRows, int kColumns>
void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                    int64_t depth, float* c, int64_t c_stride, const float* factors) {
  __m512 sums[kRows][kColumns];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) {
      sums[r][v] = factors == nullptr ? _mm512_setzero_ps()
                                      : _mm512_mul_ps(_mm512_load_ps(c + r * c_stride + 16 * v),
                                                      _mm512_set1_ps(factors[r]));
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    __m512 column[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) column[v] = _mm512_load_ps(b + i * b_stride + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512 value = _mm512_set1_ps(a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) {
        sums[r][v] = _mm512_fmadd_ps(value, column[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) _mm512_store_ps(c + r * c_stride + 16 * v, sums[r][v]);
  }
}

using MultiplyBlock = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                               int64_t, const float*);

template <int kRows>
constexpr MultiplyBlock kByColumns[4] = {multiply_block<kRows, 1>, multiply_block<kRows, 2>,
                                         multiply_block<kRows, 3>, multiply_block<kRows, 4>};

MultiplyBlock block_multiplier(int64_t num_rows, int64_t num_vectors) {
  constexpr const MultiplyBlock* kByRows[kBlockRows] = {kByColumns<1>, kByColumns<2>,
                                                        kByColumns<3>, kByColumns<4>,
                                                        kByColumns<5>, kByColumns<6>};
  return kByRows[num_rows - 1][num_vectors - 1];
}

// Transposes the keys: tile.keys (width, num_keys).
template <class Element>
void read_keys(const TileReader<Element>& reader, int64_t head_dim, const Tile& tile) {
  for (int64_t first = 0; first < tile.num_keys; first += 16) {
    for (int64_t d = 0; d < head_dim; d += 16) {
      const __mmask16 mask = first_lanes(head_dim - d);
      __m512 rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        rows[r] = Element::load(mask, reader.key(first + r) + d);
        if constexpr (Element::kScaled) {
          rows[r] = _mm512_mul_ps(rows[r], _mm512_set1_ps(reader.key_scales()[first + r]));
        }
        reader.fetch_key(first + r, d);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        _mm512_store_ps(tile.keys + (d + r) * tile.num_keys + first, rows[r]);
      }
    }
  }
}

template <class Element>
void read_values(const TileReader<Element>& reader, int64_t head_dim, int64_t num_keys,
                 const Tile& tile) {
  for (int64_t i = 0; i < num_keys; ++i) {
    for (int64_t d = 0; d < head_dim; d += 16) {
      const __mmask16 mask = first_lanes(head_dim - d);
      __m512 values = Element::load(mask, reader.value(i) + d);
      if constexpr (Element::kScaled) {
        values = _mm512_mul_ps(values, _mm512_set1_ps(reader.value_scales()[i]));
      }
      _mm512_store_ps(tile.values + i * tile.width + d, values);
      reader.fetch_value(i, d);
    }
  }
}

// Adds what a tile of keys from `begin` on brings to a block of rows.
void attend_block(const Tile& tile, int64_t first_row, int64_t num_rows, int64_t begin,
                  int64_t num_keys) {
  int64_t visible[kBlockRows];
  const int64_t most = count_visible(tile, first_row, num_rows, begin, num_keys, visible);
  if (most == 0) return;
  const int64_t num_vectors = (most + 15) / 16;
  const float* query = tile.query + first_row * tile.width;
  block_multiplier(num_rows, num_vectors)(query, tile.width, tile.keys, tile.num_keys, tile.width,
                                          tile.scores, tile.num_keys, nullptr);
  alignas(64) float factors[16];
  soften(tile, first_row, num_rows, visible, num_vectors, factors);
  float* sums = tile.sums + first_row * tile.width;
  for (int64_t d = 0; d < tile.width; d += 64) {
    const int64_t width = tile.width - d < 64 ? tile.width - d : 64;
    block_multiplier(num_rows, width / 16)(tile.scores, tile.num_keys, tile.values + d,
                                           tile.width, most, sums + d, tile.width, factors);
  }
}

template <class Element>
void attend_many(const TileReader<Element>& reader, int64_t head_dim, int64_t num_rows,
                 int64_t begin, int64_t num_keys, const Tile& tile) {
  read_keys(reader, head_dim, tile);
  read_values(reader, head_dim, num_keys, tile);
  for (int64_t r = 0; r < num_rows; r += kBlockRows) {
    attend_block(tile, r, num_rows - r < kBlockRows ? num_rows - r : kBlockRows, begin, num_keys);
  }
}

}  // namespace
}  // namespace fb
