// Linear layers on 4-bit weights: read as 16-bit integers, multiplied by activations of 13 bits.
//
// w = q * scale + minimum with q from 0 to 15, in groups of 32 inputs, so the product of a group is
// scale * (q x) + minimum * (sum of x). A few rows are bound by reading the weights, a quarter of
// what 16 bits take; widening them costs many rows a third of their speed.

#include <immintrin.h>

#include <cstring>

#include "grouped.h"
#include "row_blocks_avx512.h"
#include "source_avx512.h"
#include "store_avx512.h"
#include "threads.h"

namespace fb {
namespace {

constexpr int kNibbles = 4;  // in a word of 16 bits: those of as many steps of the dot product
constexpr int kWordsOfInputs = kInt4Group / 2 / kNibbles;

struct alignas(64) Int4Block {
  // Half of the columns; then word [w][2 * column + i] has, in its nibble s, the weight of input
  // 2 * (4 * w + s) + i.
  uint16_t weights[2][kWordsOfInputs][32];
  uint16_t scales[kGroupedColumns];  // float16
  uint16_t minima[kGroupedColumns];  // float16
};

__m512 load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

// Four steps of a dot product for 16 columns, from 16 packed words.
template <int kRows>
void add_words(const uint16_t* words, const int16_t* values, int64_t stride,
               __m512i products[kRows]) {
  const __m512i packed = _mm512_load_si512(words), low_nibble = _mm512_set1_epi16(15);
  const __m512i steps[kNibbles] = {
      _mm512_and_si512(packed, low_nibble),
      _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibble),
      _mm512_and_si512(_mm512_srli_epi16(packed, 8), low_nibble),
      _mm512_srli_epi16(packed, 12),
  };
#pragma GCC unroll 4
  for (int s = 0; s < kNibbles; ++s) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      memcpy(&two, values + r * stride + 2 * s, 4);
      products[r] = _mm512_dpwssd_epi32(products[r], _mm512_set1_epi32(two), steps[s]);
    }
  }
}

template <int kRows>
void multiply_rows(const Linear& weight, const Rows& rows, const Int16Activations& x, int64_t row,
                   int64_t column_block) {
  const int64_t num_blocks = x.num_groups * (kGroup / kInt4Group), stride = x.num_groups * kGroup;
  const auto* blocks = reinterpret_cast<const Int4Block*>(weight.packed) + column_block * num_blocks;
  __m512 sums[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int16_t* values = row_values(x, row) + b * kInt4Group;
    const float* scales = row_scales(x, row) + b / 2;
    const float* totals = x.totals + row * num_blocks + b;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i products[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) products[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int w = 0; w < kWordsOfInputs; ++w) {
        add_words<kRows>(blocks[b].weights[half][w], values + 2 * kNibbles * w, stride, products);
      }
      const __m512 column_scales = load_float16(blocks[b].scales + half * 16);
      const __m512 minima = load_float16(blocks[b].minima + half * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_mul_ps(column_scales, _mm512_set1_ps(scales[r * x.num_groups]));
        sums[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r]), scale, sums[r][half]);
        const __m512 total = _mm512_set1_ps(totals[r * num_blocks]);
        sums[r][half] = _mm512_fmadd_ps(minima, total, sums[r][half]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_columns(weight, rows, row + r, column_block * kGroupedColumns, sums[r][0], sums[r][1]);
  }
}

float to_float(uint16_t float16) { return _cvtsh_ss(float16); }
uint16_t to_float16(float value) {
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

void quantize_column(const float* source, int64_t count, Int4Block& block, int64_t column) {
  float least = source[0], most = source[0];
  for (int64_t i = 1; i < count; ++i) {
    least = source[i] < least ? source[i] : least;
    most = source[i] > most ? source[i] : most;
  }
  block.minima[column] = to_float16(least);
  block.scales[column] = to_float16((most - least) / 15.0f);
  // What was rounded to float16 is what the weights are measured by.
  const float minimum = to_float(block.minima[column]), scale = to_float(block.scales[column]);
  for (int64_t i = 0; i < count; ++i) {
    const float steps = scale > 0 ? (source[i] - minimum) / scale : 0.0f;
    const int q = steps <= 0 ? 0 : steps >= 15 ? 15 : static_cast<int>(steps + 0.5f);
    uint16_t& word = block.weights[column / 16][i / 8][2 * (column % 16) + i % 2];
    word = static_cast<uint16_t>(word | q << (4 * (i / 2 % kNibbles)));
  }
}

}  // namespace

int64_t int4_packed_bytes(const Linear& shape) {
  const int64_t num_blocks = round_up(shape.n, kGroupedColumns) / kGroupedColumns;
  return num_blocks * (round_up(shape.k, kGroup) / kInt4Group) *
         static_cast<int64_t>(sizeof(Int4Block));
}

void pack_int4(const Linear& shape, const Source& source, uint8_t* packed) {
  auto* blocks = reinterpret_cast<Int4Block*>(packed);
  const int64_t per_column = round_up(shape.k, kGroup) / kInt4Group;
  auto* row = static_cast<float*>(scratch(Scratch::packing, shape.k * sizeof(float)));
  memset(packed, 0, int4_packed_bytes(shape));
  for (int64_t n = 0; n < shape.n; ++n) {
    read_row(source, n, shape.k, row);
    for (int64_t b = 0; b * kInt4Group < shape.k; ++b) {
      const int64_t left = shape.k - b * kInt4Group;
      quantize_column(row + b * kInt4Group, left < kInt4Group ? left : kInt4Group,
                      blocks[n / kGroupedColumns * per_column + b], n % kGroupedColumns);
    }
  }
}

void multiply_int4(const Linear& weight, const Rows& rows) {
  const Int16Activations x = quantize_int16(weight, rows);
  const int64_t num_blocks = round_up(weight.n, kGroupedColumns) / kGroupedColumns;
  multiply_small_row_blocks(rows.m, num_blocks, [&]<int kRows>(int64_t row, int64_t block) {
    multiply_rows<kRows>(weight, rows, x, row, block);
  });
}

}  // namespace fb
