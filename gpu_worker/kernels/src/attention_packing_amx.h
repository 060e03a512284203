// Attention on tiles: what is multiplied, packed as the tile registers read it, and sums unpacked.
//
// Queries and weights are split into two bfloat16 terms, which keeps 16 bits of them; keys and
// values are one term or two (float16 pages), which is exact. Keys are read from the pages as they
// lie, where they can be. Scales of keys and values are left to the scores and weights.

#pragma once

#include <immintrin.h>

#include <cstring>

#include "attention.h"
#include "attention_reader.h"
#include "attention_rows.h"
#include "attention_transpose_avx512.h"
#include "elements_avx512.h"
#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

constexpr int64_t kTileKeys = 64;
constexpr int64_t kChunkKeys = 32;  // of a tile's row of weights or values
constexpr int64_t kChunks = kTileKeys / kChunkKeys;
constexpr int64_t kBlockRowsAmx = 32;  // two tiles side by side
constexpr int64_t kTileNumbers = 512;  // bfloat16 of a tile
constexpr int kLowTerm = 1;

// Two bfloat16 terms of 16 numbers, each in the upper half of 32 bits.
struct Terms {
  __m512i high;
  __m512i low;
};

__m512i upper_half(__m512i bits) {
  return _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// Both terms rounded to nearest: what is left of a product without those of two low terms is
// below 2^-16 of it, and of either sign.
Terms split(__m512 values) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i high = upper_half(_mm512_add_epi32(_mm512_castps_si512(values), half));
  const __m512 rest = _mm512_sub_ps(values, _mm512_castsi512_ps(high));
  return {high, upper_half(_mm512_add_epi32(_mm512_castps_si512(rest), half))};
}

// The same for numbers of 16 bits or fewer: exact, also of what is not a number.
Terms split_narrow(__m512 values) {
  const __m512i high = upper_half(_mm512_castps_si512(values));
  return {high, _mm512_castps_si512(_mm512_sub_ps(values, _mm512_castsi512_ps(high)))};
}

// Numbers of the upper halves, `first`'s in the lower one of each pair.
__m512i pair_up(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
}

void transpose_pairs(__m512i (&rows)[16]) {
  __m512 vectors[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) vectors[i] = _mm512_castsi512_ps(rows[i]);
  transpose(vectors);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(vectors[i]);
}

// A thread's memory for a task. All tiles of bfloat16 are 16 rows of 32.
struct Memory {
  int64_t head_dim;
  int64_t num_steps;  // of 32 along head_dim
  uint16_t* query;    // (blocks, 2 row tiles, 2 terms, num_steps) tiles of pairs by rows
  uint16_t* keys;     // (terms, kTileKeys, head_dim): of those that cannot be read from the pages
  uint16_t* values;   // (terms, kChunks, head_dim / 16) tiles of dims by keys
  uint16_t* weights;  // (2 terms, kChunks, 2 row tiles) tiles of pairs of keys by rows
  float* scores;      // (kTileKeys, kBlockRowsAmx)
  float* sums;        // (blocks, head_dim, kBlockRowsAmx)
  float* greatest;    // (rows)
  float* totals;      // (rows) sums of weights

  explicit Memory(int64_t dim) : head_dim(dim), num_steps(dim / 32) {
    const int64_t num_query = kMaxRows / 16 * 2 * num_steps * kTileNumbers;
    const int64_t num_keys = 2 * kTileKeys * dim;
    const int64_t num_weights = 2 * kChunks * 2 * kTileNumbers;
    const int64_t num_scores = kTileKeys * kBlockRowsAmx;
    const int64_t num_bytes = 2 * (num_query + 2 * num_keys + num_weights) +
                              4 * (num_scores + kMaxRows * dim + 2 * kMaxRows);
    query = static_cast<uint16_t*>(scratch(Scratch::other, static_cast<size_t>(num_bytes)));
    keys = query + num_query;
    values = keys + num_keys;
    weights = values + num_keys;
    scores = reinterpret_cast<float*>(weights + num_weights);
    sums = scores + num_scores;
    greatest = sums + kMaxRows * dim;
    totals = greatest + kMaxRows;
  }

  uint16_t* query_tile(int64_t row_tile, int64_t term, int64_t step) const {
    return query + ((row_tile * 2 + term) * num_steps + step) * kTileNumbers;
  }
  uint16_t* key_row(int64_t term, int64_t key) const {
    return keys + (term * kTileKeys + key) * head_dim;
  }
  uint16_t* value_tile(int64_t term, int64_t chunk, int64_t dim_tile) const {
    return values + ((term * kChunks + chunk) * (head_dim / 16) + dim_tile) * kTileNumbers;
  }
  uint16_t* weight_tile(int64_t term, int64_t chunk, int64_t row_tile) const {
    return weights + ((term * kChunks + chunk) * 2 + row_tile) * kTileNumbers;
  }
  float* block_sums(int64_t block) const { return sums + block * head_dim * kBlockRowsAmx; }
};

// Packs the queries of `tile` (rows beyond the last one are zeros), and forgets former sums.
void begin_tiles(const Tile& tile, int64_t num_rows, int64_t num_blocks, const Memory& memory) {
  for (int64_t row_tile = 0; row_tile < 2 * num_blocks; ++row_tile) {
    for (int64_t step = 0; step < memory.num_steps; ++step) {
      __m512i high[16], low[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = row_tile * 16 + r;
        const __mmask16 lanes = first_lanes(row < num_rows ? 16 : 0);
        const float* query = tile.query + row * tile.width + step * 32;
        const Terms even = split(_mm512_maskz_loadu_ps(lanes, query));
        const Terms odd = split(_mm512_maskz_loadu_ps(lanes, query + 16));
        // As they stand in the row: pairs are neighbours there.
        high[r] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(even.high, 16))),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32(odd.high, 16)), 1);
        low[r] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(even.low, 16))),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32(odd.low, 16)), 1);
      }
      transpose_pairs(high);
      transpose_pairs(low);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_store_si512(memory.query_tile(row_tile, 0, step) + 32 * i, high[i]);
        _mm512_store_si512(memory.query_tile(row_tile, kLowTerm, step) + 32 * i, low[i]);
      }
    }
    _mm512_store_ps(memory.greatest + 16 * row_tile, _mm512_set1_ps(kNoScore));
    _mm512_store_ps(memory.totals + 16 * row_tile, _mm512_setzero_ps());
  }
  const int64_t num_sums = num_blocks * memory.head_dim * kBlockRowsAmx;
  for (int64_t i = 0; i < num_sums; i += 16) {
    _mm512_store_ps(memory.sums + i, _mm512_setzero_ps());
  }
}

// Where the terms of 16 keys lie, rows `stride_bytes` apart.
struct KeyTile {
  const void* terms[2];
  int64_t stride_bytes;
};

// bfloat16 pages: a key is its only term, and where 16 keys follow each other nothing is copied.
KeyTile key_tile(const TileReader<Bfloat16Element>& reader, int64_t first, const Memory& memory) {
  const int64_t head_dim = memory.head_dim;
  if (reader.key(first + 15) - reader.key(first) == 15 * head_dim) {
    return {{reader.key(first), nullptr}, head_dim * 2};
  }
  for (int64_t k = first; k < first + 16; ++k) {
    for (int64_t d = 0; d < head_dim; d += 32) {
      _mm512_storeu_si512(memory.key_row(0, k) + d, _mm512_loadu_si512(reader.key(k) + d));
    }
  }
  return {{memory.key_row(0, first), nullptr}, head_dim * 2};
}

KeyTile key_tile(const TileReader<Float16Element>& reader, int64_t first, const Memory& memory) {
  for (int64_t k = first; k < first + 16; ++k) {
    for (int64_t d = 0; d < memory.head_dim; d += 16) {
      const Terms terms = split_narrow(Float16Element::load(reader.key(k) + d));
      const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(terms.high, 16));
      const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(terms.low, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory.key_row(0, k) + d), high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory.key_row(kLowTerm, k) + d), low);
    }
  }
  return {{memory.key_row(0, first), memory.key_row(kLowTerm, first)}, memory.head_dim * 2};
}

// 8-bit pages: bfloat16 holds their elements as they are.
template <class Element>
KeyTile key_tile(const TileReader<Element>& reader, int64_t first, const Memory& memory) {
  static_assert(Element::kScaled);
  for (int64_t k = first; k < first + 16; ++k) {
    for (int64_t d = 0; d < memory.head_dim; d += 32) {
      const __m512 low = Element::load(reader.key(k) + d);
      const __m512 high = Element::load(reader.key(k) + d + 16);
      const __m512bh elements = _mm512_cvtne2ps_pbh(high, low);
      memcpy(memory.key_row(0, k) + d, &elements, sizeof elements);
    }
  }
  return {{memory.key_row(0, first), nullptr}, memory.head_dim * 2};
}

// 16 values of one key; zeros beyond the last key, whose weights are zeros.
template <class Element>
__m512 load_value(const TileReader<Element>& reader, int64_t key, int64_t num_keys, int64_t d) {
  return Element::load(first_lanes(key < num_keys ? 16 : 0), reader.value(key) + d);
}

// Transposes the values of a chunk of 32 keys.
template <class Element, int kTerms>
void pack_values(const TileReader<Element>& reader, int64_t chunk, int64_t num_keys,
                 const Memory& memory) {
  for (int64_t dim_tile = 0; dim_tile < memory.head_dim / 16; ++dim_tile) {
    __m512i high[16], low[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const int64_t key = chunk * kChunkKeys + 2 * i;
      const Terms first = split_narrow(load_value(reader, key, num_keys, dim_tile * 16));
      const Terms second = split_narrow(load_value(reader, key + 1, num_keys, dim_tile * 16));
      high[i] = pair_up(first.high, second.high);
      if constexpr (kTerms == 2) low[i] = pair_up(first.low, second.low);
    }
    transpose_pairs(high);
    if constexpr (kTerms == 2) transpose_pairs(low);
    for (int64_t i = 0; i < 16; ++i) {
      _mm512_store_si512(memory.value_tile(0, chunk, dim_tile) + 32 * i, high[i]);
      if constexpr (kTerms == 2) {
        _mm512_store_si512(memory.value_tile(kLowTerm, chunk, dim_tile) + 32 * i, low[i]);
      }
    }
  }
}

// Leaves the rows' state where end_rows looks for it.
void end_tiles(const Memory& memory, int64_t num_rows, const Tile& tile) {
  for (int64_t row_tile = 0; row_tile * 16 < num_rows; ++row_tile) {
    const float* sums = memory.block_sums(row_tile / 2) + row_tile % 2 * 16;
    for (int64_t d = 0; d < memory.head_dim; d += 16) {
      __m512 vectors[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) vectors[i] = _mm512_load_ps(sums + (d + i) * kBlockRowsAmx);
      transpose(vectors);
      for (int64_t r = 0; r < 16 && row_tile * 16 + r < num_rows; ++r) {
        _mm512_store_ps(tile.sums + (row_tile * 16 + r) * tile.width + d, vectors[r]);
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    tile.greatest[row] = memory.greatest[row];
    _mm512_store_ps(tile.weights + 16 * row,
                    _mm512_maskz_mov_ps(1, _mm512_set1_ps(memory.totals[row])));
  }
}

}  // namespace
}  // namespace fb
