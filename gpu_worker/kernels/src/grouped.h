// Integer weights, in groups of 64 inputs with a scale each, as the kernels of both instruction
// sets read them.
//
// Numbers are symmetric: w = q * scale. Columns go by 32, and for each group of inputs there is one
// block. Activations are quantized as they come, with a scale for each row and group. Since no
// scale spans more than a group, a tensor-parallel rank that holds some of the groups computes
// exactly its part of the whole.
//
//     int8     q from -127 to 127; groups are mixed by a Hadamard transform first
//     int16    q from -4095 to 4095, so that a group's products add up within 32 bits

#pragma once

#include <cstdint>

#include "linear.h"

namespace fb {

constexpr int64_t kGroupedColumns = 32;

struct alignas(64) Int8Block {
  using Integer = int8_t;
  int8_t weights[2][16][16][4];      // half of the columns, inputs / 4, column, input % 4
  float scales[kGroupedColumns];
  int32_t offsets[kGroupedColumns];  // 128 * the sum of a column's weights

  static constexpr int32_t kLargest = 127;
};

struct alignas(64) Int16Block {
  using Integer = int16_t;
  int16_t weights[2][32][16][2];  // half of the columns, inputs / 2, column, input % 2
  float scales[kGroupedColumns];

  static constexpr int32_t kLargest = 4095;
};

constexpr int64_t kInt4Group = 32;  // inputs that share the scale and the minimum of 4-bit weights

template <class Block>
struct GroupedActivations {
  using Integer = typename Block::Integer;
  Integer* values;  // (round_up(m, 16), k padded to groups); plus 128, unsigned, if `shifted`
  float* scales;    // (round_up(m, 16), groups)
  float* totals;    // (round_up(m, 16), 2 * groups): sums of 32 activations each, for int4
  int64_t num_groups;
};

using Int8Activations = GroupedActivations<Int8Block>;
using Int16Activations = GroupedActivations<Int16Block>;

// Quantizes the rows of `rows.x` on all threads. The result is good until the next call. A row that
// is not finite gets scales that are not finite.
Int8Activations quantize_int8(const Linear& weight, const Rows& rows, bool shifted);
Int16Activations quantize_int16(const Linear& weight, const Rows& rows);

namespace {  // each unit its own copy: they are compiled for different processors

inline int64_t num_groups(int64_t k) { return round_up(k, kGroup) / kGroup; }

template <class Block>
const Block* column_blocks(const Linear& weight, int64_t column_block) {
  return reinterpret_cast<const Block*>(weight.packed) + column_block * num_groups(weight.k);
}

template <class Block>
const typename Block::Integer* row_values(const GroupedActivations<Block>& x, int64_t row) {
  return x.values + row * x.num_groups * kGroup;
}

template <class Block>
const float* row_scales(const GroupedActivations<Block>& x, int64_t row) {
  return x.scales + row * x.num_groups;
}

}  // namespace

}  // namespace fb
