// Paged attention of many rows on AMX tiles, where pages hold 16-bit numbers.
//
// Tiles multiply bfloat16 and sum in float32. Queries and weights are split into two bfloat16
// terms, which keeps 16 bits of them; keys and values are one term (bfloat16 pages) or two, which
// is exact (float16 pages). Products of two low terms are left out: they are below 2^-16.
//
// Scores are computed transposed, keys by rows: keys are then read from the pages as they lie, and
// the softmax runs along vectors of 16 rows, without sums across lanes. Weights, packed in pairs of
// keys, are multiplied by transposed values, and the sums lie transposed as well, head_dim by rows.

#include <immintrin.h>

#include <cmath>

#include "attention.h"
#include "attention_reader.h"
#include "attention_rows.h"
#include "attention_transpose_avx512.h"
#include "cpu.h"
#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kFewestRows = 12;  // fewer leave too much of a tile empty
constexpr int64_t kTileKeys = 64;
constexpr int64_t kChunkKeys = 32;  // of a tile's row of weights or values
constexpr int64_t kChunks = kTileKeys / kChunkKeys;
constexpr int64_t kBlockRowsAmx = 32;  // two tiles side by side
constexpr int64_t kTileNumbers = 512;  // bfloat16 of a tile
constexpr int kLowTerm = 1;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

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
void begin(const Tile& tile, int64_t num_rows, int64_t num_blocks, const Memory& memory) {
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

// Scores of a block of rows for a chunk of keys. Tiles 0 to 3 sum, 4 and 5 hold keys, 6 and 7
// queries.
template <int kTerms>
void score_chunk(const KeyTile (&keys)[2], int64_t block, int64_t chunk, const Memory& memory) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < memory.num_steps; ++step) {
    for (int key_term = 0; key_term < kTerms; ++key_term) {
      const int64_t at = step * 64;
      _tile_loadd(4, static_cast<const char*>(keys[0].terms[key_term]) + at, keys[0].stride_bytes);
      _tile_loadd(5, static_cast<const char*>(keys[1].terms[key_term]) + at, keys[1].stride_bytes);
      for (int term = 0; term < 2 - key_term; ++term) {
        _tile_loadd(6, memory.query_tile(2 * block, term, step), 64);
        _tile_loadd(7, memory.query_tile(2 * block + 1, term, step), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  float* scores = memory.scores + chunk * kChunkKeys * kBlockRowsAmx;
  _tile_stored(0, scores, kBlockRowsAmx * 4);
  _tile_stored(1, scores + 16, kBlockRowsAmx * 4);
  _tile_stored(2, scores + 16 * kBlockRowsAmx, kBlockRowsAmx * 4);
  _tile_stored(3, scores + 16 * kBlockRowsAmx + 16, kBlockRowsAmx * 4);
}

// Turns the scores of a tile's rows for `num_keys` keys, a multiple of 32, into packed weights.
// `visible`: how many of the keys each row sees. Returns the factors of the rows' former sums.
__m512 soften_tile(const Memory& memory, int64_t row_tile, int64_t num_keys, __m512i visible) {
  float* scores = memory.scores + row_tile % 2 * 16;
  const bool all_visible =
      _mm512_cmplt_epi32_mask(visible, _mm512_set1_epi32(static_cast<int>(num_keys))) == 0;
  __m512 most[2] = {_mm512_set1_ps(kNoScore), _mm512_set1_ps(kNoScore)};
  for (int64_t k = 0; k < num_keys; ++k) {
    __m512 found = _mm512_load_ps(scores + k * kBlockRowsAmx);
    if (!all_visible) {
      const __mmask16 seen = _mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(static_cast<int>(k)));
      found = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, found);
      _mm512_store_ps(scores + k * kBlockRowsAmx, found);
    }
    most[k % 2] = _mm512_max_ps(found, most[k % 2]);
  }
  const __m512 before = _mm512_load_ps(memory.greatest + 16 * row_tile);
  const __m512 now = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), before);
  const __m512 factors = exp2_of_negative(_mm512_sub_ps(before, now));
  _mm512_store_ps(memory.greatest + 16 * row_tile, now);
  __m512 total = _mm512_mul_ps(_mm512_load_ps(memory.totals + 16 * row_tile), factors);
  for (int64_t k = 0; k < num_keys; k += 2) {
    const float* pair = scores + k * kBlockRowsAmx;
    const __m512 first = exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(pair), now));
    const __m512 second =
        exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(pair + kBlockRowsAmx), now));
    total = _mm512_add_ps(total, _mm512_add_ps(first, second));
    const Terms first_terms = split(first), second_terms = split(second);
    const int64_t chunk = k / kChunkKeys, at = k % kChunkKeys * 16;
    _mm512_store_si512(memory.weight_tile(0, chunk, row_tile % 2) + at,
                       pair_up(first_terms.high, second_terms.high));
    _mm512_store_si512(memory.weight_tile(kLowTerm, chunk, row_tile % 2) + at,
                       pair_up(first_terms.low, second_terms.low));
  }
  _mm512_store_ps(memory.totals + 16 * row_tile, total);
  return factors;
}

void scale_sums(const Memory& memory, int64_t block, __m512 low_rows, __m512 high_rows) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if ((_mm512_cmp_ps_mask(low_rows, one, _CMP_NEQ_UQ) |
       _mm512_cmp_ps_mask(high_rows, one, _CMP_NEQ_UQ)) == 0) {
    return;
  }
  float* sums = memory.block_sums(block);
  for (int64_t d = 0; d < memory.head_dim; ++d, sums += kBlockRowsAmx) {
    _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), low_rows));
    _mm512_store_ps(sums + 16, _mm512_mul_ps(_mm512_load_ps(sums + 16), high_rows));
  }
}

// Adds the weighted values of `num_chunks` chunks of keys to a block's sums. Tiles 0 to 3 sum, 4
// and 5 hold values, 6 and 7 weights.
template <int kTerms>
void add_values(int64_t block, int64_t num_chunks, const Memory& memory) {
  constexpr int64_t kStride = kBlockRowsAmx * 4;
  for (int64_t dim_tile = 0; dim_tile < memory.head_dim / 16; dim_tile += 2) {
    float* sums = memory.block_sums(block) + dim_tile * 16 * kBlockRowsAmx;
    float* next = sums + 16 * kBlockRowsAmx;
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + 16, kStride);
    _tile_loadd(2, next, kStride);
    _tile_loadd(3, next + 16, kStride);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      for (int value_term = 0; value_term < kTerms; ++value_term) {
        _tile_loadd(4, memory.value_tile(value_term, chunk, dim_tile), 64);
        _tile_loadd(5, memory.value_tile(value_term, chunk, dim_tile + 1), 64);
        for (int term = 0; term < 2 - value_term; ++term) {
          _tile_loadd(6, memory.weight_tile(term, chunk, 0), 64);
          _tile_loadd(7, memory.weight_tile(term, chunk, 1), 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + 16, kStride);
    _tile_stored(2, next, kStride);
    _tile_stored(3, next + 16, kStride);
  }
}

// How many of a tile's keys the 16 rows of a row tile see; none beyond the last row.
__m512i count_visible_rows(const Tile& tile, int64_t row_tile, int64_t num_rows, int64_t begin,
                           int64_t num_keys) {
  const int64_t left = num_rows - 16 * row_tile;
  const __m512i limits =
      _mm512_maskz_loadu_epi32(first_lanes(left > 0 ? left : 0), tile.limits + 16 * row_tile);
  const __m512i seen =
      _mm512_sub_epi32(limits, _mm512_set1_epi32(static_cast<int>(begin)));
  return _mm512_max_epi32(_mm512_min_epi32(seen, _mm512_set1_epi32(static_cast<int>(num_keys))),
                          _mm512_setzero_si512());
}

template <class Element, int kTerms>
void attend_tile(const TileReader<Element>& reader, const Tile& tile, int64_t num_rows,
                 int64_t begin, int64_t num_keys, const Memory& memory) {
  const int64_t num_chunks = (num_keys + kChunkKeys - 1) / kChunkKeys;
  KeyTile keys[kChunks][2];
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    keys[chunk][0] = key_tile(reader, chunk * kChunkKeys, memory);
    keys[chunk][1] = key_tile(reader, chunk * kChunkKeys + 16, memory);
    pack_values<Element, kTerms>(reader, chunk, num_keys, memory);
  }
  for (int64_t block = 0; block * kBlockRowsAmx < num_rows; ++block) {
    const __m512i low = count_visible_rows(tile, 2 * block, num_rows, begin, num_keys);
    const __m512i high = count_visible_rows(tile, 2 * block + 1, num_rows, begin, num_keys);
    const int64_t most = _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
    const int64_t needed = (most + kChunkKeys - 1) / kChunkKeys;
    if (needed == 0) continue;
    for (int64_t chunk = 0; chunk < needed; ++chunk) {
      score_chunk<kTerms>(keys[chunk], block, chunk, memory);
    }
    const __m512 low_factors = soften_tile(memory, 2 * block, needed * kChunkKeys, low);
    const __m512 high_factors = soften_tile(memory, 2 * block + 1, needed * kChunkKeys, high);
    scale_sums(memory, block, low_factors, high_factors);
    add_values<kTerms>(block, needed, memory);
  }
}

// Leaves the rows' state where end_rows looks for it.
void end(const Memory& memory, int64_t num_rows, const Tile& tile) {
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
    _mm512_store_ps(tile.weights + 16 * row, _mm512_maskz_mov_ps(1, _mm512_set1_ps(memory.totals[row])));
  }
}

template <class Element, int kTerms>
void attend(const Attention& call, const Task& task, const Task& following, int64_t num_rows,
            const Tile& tile) {
  const Memory memory(call.pages.head_dim);
  begin(tile, num_rows, (num_rows + kBlockRowsAmx - 1) / kBlockRowsAmx, memory);
  TileReader<Element> reader(call, task, following, kTileKeys);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t key = task.item->key_begin; key < task.item->key_end; key += kTileKeys) {
    const int64_t num_keys = reader.advance();
    for (int64_t i = 0; i < kTileKeys; ++i) {
      for (int64_t d = 0; d < memory.head_dim; d += 32) {
        reader.fetch_key(i, d);
        reader.fetch_value(i, d);
      }
    }
    attend_tile<Element, kTerms>(reader, tile, num_rows, key, num_keys, memory);
  }
  // A thread that has tiles in use is dearer to switch.
  _tile_release();
  end(memory, num_rows, tile);
}

}  // namespace

bool is_for_amx(const Attention& call, const Rows& rows) {
  return isa() == kAmx && rows.count >= kFewestRows && call.pages.head_dim % 32 == 0 &&
         call.pages.type != kFloat32Page;
}

void attend_amx(const Attention& call, const Task& task, const Task& following, const Rows& rows,
                const Tile& tile) {
  if (call.pages.type == kBfloat16Page) {
    attend<Bfloat16Element, 1>(call, task, following, rows.count, tile);
  } else {
    attend<Float16Element, 2>(call, task, following, rows.count, tile);
  }
}

}  // namespace fb
