// Weights as a checkpoint holds them, read row by row while they are packed.

#pragma once

#include <cstring>

#include "elements_avx512.h"
#include "linear.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

// The source row that becomes packed row `row`; -1 for one of padding.
inline int64_t source_row(const Source& source, int64_t row) {
  if (!source.gated) return row;
  // 16 gates, 16 ups, 16 gates, ...: the ups are the second half of the source.
  const int64_t turn = row / (2 * kGateColumns), place = row % (2 * kGateColumns);
  const int64_t index = turn * kGateColumns + place % kGateColumns;
  if (index >= source.num_rows / 2) return -1;
  return place < kGateColumns ? index : source.num_rows / 2 + index;
}

template <class Element>
void widen_row(const void* from, int64_t k, float* row) {
  const auto* stored = static_cast<const typename Element::Stored*>(from);
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 lanes = first_lanes(k - i);
    _mm512_mask_storeu_ps(row + i, lanes, Element::load(lanes, stored + i));
  }
}

// The k weights of packed row `row`.
inline void read_row(const Source& source, int64_t row, int64_t k, float* out) {
  const int64_t index = source_row(source, row);
  if (index < 0) {
    memset(out, 0, k * sizeof(float));
    return;
  }
  const auto* start = static_cast<const uint8_t*>(source.rows) + index * source.row_bytes;
  switch (source.element) {
    case kSourceFloat32: return widen_row<Float32Element>(start, k, out);
    case kSourceFloat16: return widen_row<Float16Element>(start, k, out);
    case kSourceBfloat16: return widen_row<Bfloat16Element>(start, k, out);
  }
}

}  // namespace
}  // namespace fb
