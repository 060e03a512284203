// Linear layers in float32 arithmetic, on weights of float32 or bfloat16.
//
// A panel is 64 columns: for each input k, 64 neighbouring weights. A block of the product is 6
// rows by one panel: 24 sums in registers, to which each k adds 4 loads of weights times 6
// broadcast activations.

#include <immintrin.h>

#include <cstring>

#include "row_blocks_avx512.h"
#include "source_avx512.h"
#include "store_avx512.h"
#include "threads.h"

namespace fb {
namespace {

constexpr int kVectors = kPanelColumns / 16;

struct Float32 {
  using Stored = float;
  static __m512 load(const Stored* p) { return _mm512_load_ps(p); }
  static Stored from(float value) { return value; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static __m512 load(const Stored* p) {
    const __m256i narrow = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static Stored from(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <class Number, int kRows>
void multiply_block(const typename Number::Stored* panel, const Linear& weight, const Rows& rows,
                    int64_t row, int64_t column) {
  const int64_t k = weight.k;
  const float* x = rows.x + row * k;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; ++i) {
    __m512 weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = Number::load(panel + i * kPanelColumns + v * 16);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512 value = _mm512_set1_ps(x[r * k + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_fmadd_ps(value, weights[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_columns(weight, rows, row + r, column, sums[r][0], sums[r][1]);
    store_columns(weight, rows, row + r, column + 32, sums[r][2], sums[r][3]);
  }
}

template <class Number>
void multiply(const Linear& weight, const Rows& rows) {
  const auto* packed = reinterpret_cast<const typename Number::Stored*>(weight.packed);
  const int64_t num_panels = round_up(weight.n, kPanelColumns) / kPanelColumns;
  multiply_row_blocks(rows.m, num_panels, [&]<int kRows>(int64_t row, int64_t panel) {
    const int64_t column = panel * kPanelColumns;
    multiply_block<Number, kRows>(packed + column * weight.k, weight, rows, row, column);
  });
}

template <class Number>
void pack(const Linear& shape, const Source& source, uint8_t* packed) {
  auto* target = reinterpret_cast<typename Number::Stored*>(packed);
  // 16 columns at a time: what is read and what is written both stay in the cache.
  constexpr int64_t kColumns = 16;
  auto* rows = static_cast<float*>(scratch(Scratch::packing, kColumns * shape.k * sizeof(float)));
  for (int64_t column = 0; column < round_up(shape.n, kPanelColumns); column += kColumns) {
    for (int64_t c = 0; c < kColumns; ++c) {
      if (column + c < shape.n) {
        read_row(source, column + c, shape.k, rows + c * shape.k);
      } else {
        memset(rows + c * shape.k, 0, shape.k * sizeof(float));
      }
    }
    auto* panel = target + column / kPanelColumns * kPanelColumns * shape.k;
    for (int64_t i = 0; i < shape.k; ++i) {
      for (int64_t c = 0; c < kColumns; ++c) {
        panel[i * kPanelColumns + column % kPanelColumns + c] = Number::from(rows[c * shape.k + i]);
      }
    }
  }
}

}  // namespace

void pack_panels(const Linear& shape, const Source& source, uint8_t* packed) {
  if (shape.layout == kBfloat16Panels) return pack<Bfloat16>(shape, source, packed);
  pack<Float32>(shape, source, packed);
}

void multiply_panels(const Linear& weight, const Rows& rows) {
  if (weight.layout == kBfloat16Panels) return multiply<Bfloat16>(weight, rows);
  multiply<Float32>(weight, rows);
}

}  // namespace fb
