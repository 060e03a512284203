// Linear layers on grouped integers: packing, quantizing activations, and VNNI's dot products.

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "grouped.h"
#include "hadamard_avx512.h"
#include "row_blocks_avx512.h"
#include "source_avx512.h"
#include "store_avx512.h"
#include "threads.h"

namespace fb {
namespace {

constexpr int kVectorsPerGroup = kGroup / 16;

template <class Block>
constexpr bool kIsInt8 = std::is_same_v<Block, Int8Block>;

// The group's values as they are to be quantized; what is missing of a last group counts as zeros.
template <class Block>
void load_group(const float* x, int64_t count, __m512 values[kVectorsPerGroup]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    const int64_t left = count - v * 16;
    values[v] = _mm512_maskz_loadu_ps(left > 0 ? first_lanes(left) : 0, x + v * 16);
  }
  if constexpr (kIsInt8<Block>) hadamard(values);
}

// The step between two neighbouring numbers; NaN or infinity if one of the values is.
float scale_of(const __m512 values[kVectorsPerGroup], int32_t largest_integer) {
  __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(values[v]));
    // 0 times NaN or infinity is NaN: a maximum alone could pass over it.
    poison = _mm512_fmadd_ps(values[v], _mm512_setzero_ps(), poison);
  }
  return _mm512_reduce_max_ps(largest) / static_cast<float>(largest_integer) +
         _mm512_reduce_add_ps(poison);
}

__m512i round_to(__m512 values, float scale) {
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
  return _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
}

void store_narrow(int8_t* target, __m512i values, bool shifted) {
  const __m128i shift = _mm_set1_epi8(shifted ? -128 : 0);
  _mm_store_si128(reinterpret_cast<__m128i*>(target),
                  _mm_xor_si128(_mm512_cvtsepi32_epi8(values), shift));
}

void store_narrow(int16_t* target, __m512i values, bool) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtsepi32_epi16(values));
}

template <class Block>
GroupedActivations<Block> quantize(const Linear& weight, const Rows& rows, bool shifted) {
  using Integer = typename Block::Integer;
  const int64_t groups = num_groups(weight.k), plane = round_up(rows.m, 16);
  const int64_t values_bytes = plane * groups * kGroup * static_cast<int64_t>(sizeof(Integer));
  auto* buffer = static_cast<uint8_t*>(activations_buffer(values_bytes + plane * groups * 12));
  auto* scales = reinterpret_cast<float*>(buffer + values_bytes);
  const GroupedActivations<Block> result{reinterpret_cast<Integer*>(buffer), scales,
                                         scales + plane * groups, groups};
  parallel_ranges(rows.m, [&](int64_t first, int64_t last) {
    for (int64_t index = first * groups; index < last * groups; ++index) {
      const int64_t row = index / groups, start = index % groups * kGroup;
      __m512 values[kVectorsPerGroup];
      load_group<Block>(rows.x + row * weight.k + start, weight.k - start, values);
      const float scale = scale_of(values, Block::kLargest);
      result.scales[index] = scale;
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsPerGroup; ++v) {
        store_narrow(result.values + index * kGroup + v * 16, round_to(values[v], scale), shifted);
      }
      if constexpr (!kIsInt8<Block>) {
        result.totals[2 * index] = _mm512_reduce_add_ps(_mm512_add_ps(values[0], values[1]));
        result.totals[2 * index + 1] = _mm512_reduce_add_ps(_mm512_add_ps(values[2], values[3]));
      }
    }
  });
  return result;
}

template <class Block>
__m512i dot(__m512i sum, __m512i values, __m512i weights) {
  if constexpr (kIsInt8<Block>) return _mm512_dpbusd_epi32(sum, values, weights);
  return _mm512_dpwssd_epi32(sum, values, weights);
}

template <class Block, int kRows>
void multiply_block(const Block* blocks, const GroupedActivations<Block>& x, int64_t row,
                    __m512 sums[kRows][2]) {
  constexpr int kSteps = kGroup * sizeof(typename Block::Integer) / 4;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < x.num_groups; ++g) {
    const Block& block = blocks[g];
    const auto* values = row_values(x, row) + g * kGroup;
    const float* scales = row_scales(x, row) + g;
    const int64_t stride = x.num_groups * kGroup;
    __m512i products[kRows][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i start = _mm512_setzero_si512();
      // Activations are shifted by 128 to be unsigned, which is taken back here.
      if constexpr (kIsInt8<Block>) {
        start = _mm512_sub_epi32(start, _mm512_load_si512(block.offsets + half * 16));
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) products[r][half] = start;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      const __m512i low = _mm512_load_si512(block.weights[0][i]);
      const __m512i high = _mm512_load_si512(block.weights[1][i]);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        int32_t word;  // 4 activations of 8 bits, or 2 of 16
        memcpy(&word, reinterpret_cast<const char*>(values + r * stride) + i * 4, 4);
        const __m512i value = _mm512_set1_epi32(word);
        products[r][0] = dot<Block>(products[r][0], value, low);
        products[r][1] = dot<Block>(products[r][1], value, high);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 column_scales = _mm512_load_ps(block.scales + half * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_mul_ps(column_scales, _mm512_set1_ps(scales[r * x.num_groups]));
        const __m512 product = _mm512_cvtepi32_ps(products[r][half]);
        sums[r][half] = _mm512_fmadd_ps(product, scale, sums[r][half]);
      }
    }
  }
}

template <class Block, int kRows>
void multiply_rows(const Linear& weight, const Rows& rows, const GroupedActivations<Block>& x,
                   int64_t row, int64_t column_block) {
  __m512 sums[kRows][2];
  multiply_block<Block, kRows>(column_blocks<Block>(weight, column_block), x, row, sums);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_columns(weight, rows, row + r, column_block * kGroupedColumns, sums[r][0], sums[r][1]);
  }
}

template <class Block>
void multiply(const Linear& weight, const Rows& rows, const GroupedActivations<Block>& x) {
  const int64_t num_blocks = round_up(weight.n, kGroupedColumns) / kGroupedColumns;
  multiply_small_row_blocks(rows.m, num_blocks, [&]<int kRows>(int64_t row, int64_t block) {
    multiply_rows<Block, kRows>(weight, rows, x, row, block);
  });
}

template <class Block>
void quantize_column(const float* source, int64_t count, Block& block, int64_t column) {
  using Integer = typename Block::Integer;
  constexpr int kPerWord = 4 / sizeof(Integer);
  __m512 values[kVectorsPerGroup];
  load_group<Block>(source, count, values);
  const float scale = scale_of(values, Block::kLargest);
  int32_t sum = 0;
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    const __m512i rounded = round_to(values[v], scale);
    sum += _mm512_reduce_add_epi32(rounded);
    alignas(32) Integer narrow[16];
    store_narrow(narrow, rounded, false);
    for (int i = 0; i < 16; i += kPerWord) {
      memcpy(block.weights[column / 16][(v * 16 + i) / kPerWord][column % 16], narrow + i, 4);
    }
  }
  block.scales[column] = kIsInt8<Block> ? scale / kHadamardNorm : scale;
  if constexpr (kIsInt8<Block>) block.offsets[column] = 128 * sum;
}

template <class Block>
void pack(const Linear& shape, const Source& source, uint8_t* packed) {
  auto* blocks = reinterpret_cast<Block*>(packed);
  const int64_t groups = num_groups(shape.k);
  auto* row = static_cast<float*>(scratch(Scratch::packing, shape.k * sizeof(float)));
  memset(packed, 0, grouped_packed_bytes(shape));
  for (int64_t n = 0; n < shape.n; ++n) {
    read_row(source, n, shape.k, row);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroup, left = shape.k - first;
      quantize_column(row + first, left < kGroup ? left : kGroup,
                      blocks[n / kGroupedColumns * groups + g], n % kGroupedColumns);
    }
  }
}

}  // namespace

Int8Activations quantize_int8(const Linear& weight, const Rows& rows, bool shifted) {
  return quantize<Int8Block>(weight, rows, shifted);
}

Int16Activations quantize_int16(const Linear& weight, const Rows& rows) {
  return quantize<Int16Block>(weight, rows, false);
}

int64_t grouped_packed_bytes(const Linear& shape) {
  const int64_t num_blocks = round_up(shape.n, kGroupedColumns) / kGroupedColumns;
  const size_t block_bytes =
      shape.layout == kInt8Groups ? sizeof(Int8Block) : sizeof(Int16Block);
  return num_blocks * num_groups(shape.k) * static_cast<int64_t>(block_bytes);
}

void pack_grouped(const Linear& shape, const Source& source, uint8_t* packed) {
  if (shape.layout == kInt8Groups) return pack<Int8Block>(shape, source, packed);
  pack<Int16Block>(shape, source, packed);
}

void multiply_grouped(const Linear& weight, const Rows& rows) {
  if (weight.layout == kInt8Groups) {
    return multiply(weight, rows, quantize<Int8Block>(weight, rows, true));
  }
  multiply(weight, rows, quantize<Int16Block>(weight, rows, false));
}

}  // namespace fb
