// Paged attention of many rows on AMX tiles, where pages hold narrow numbers: products and softmax.
//
// Tiles multiply bfloat16 and sum in float32, and what they multiply comes in one term or two
// (attention_packing_amx.h). Products of two low terms are left out: they are below 2^-16.
//
// Scores are computed transposed, keys by rows: keys are then read from the pages as they lie, and
// the softmax runs along vectors of 16 rows, without sums across lanes. Weights, packed in pairs of
// keys, are multiplied by transposed values, and the sums lie transposed as well, head_dim by rows.

#include <immintrin.h>

#include <cmath>

#include "attention.h"
#include "attention_packing_amx.h"
#include "attention_reader.h"
#include "attention_rows.h"
#include "cpu.h"
#include "elements_avx512.h"
#include "tiles_in_use_amx.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kFewestRows = 12;  // fewer leave too much of a tile empty

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
template <class Element>
__m512 soften_tile(const TileReader<Element>& reader, const Memory& memory, int64_t row_tile,
                   int64_t num_keys, __m512i visible) {
  float* scores = memory.scores + row_tile % 2 * 16;
  const bool all_visible =
      _mm512_cmplt_epi32_mask(visible, _mm512_set1_epi32(static_cast<int>(num_keys))) == 0;
  __m512 most[2] = {_mm512_set1_ps(kNoScore), _mm512_set1_ps(kNoScore)};
  for (int64_t k = 0; k < num_keys; ++k) {
    __m512 found = _mm512_load_ps(scores + k * kBlockRowsAmx);
    if constexpr (Element::kScaled) {
      found = _mm512_mul_ps(found, _mm512_set1_ps(reader.key_scales()[k]));
    }
    if (!all_visible) {
      const __m512i key = _mm512_set1_epi32(static_cast<int>(k));
      const __mmask16 seen = _mm512_cmpgt_epi32_mask(visible, key);
      found = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, found);
    }
    if (Element::kScaled || !all_visible) _mm512_store_ps(scores + k * kBlockRowsAmx, found);
    most[k % 2] = _mm512_max_ps(found, most[k % 2]);
  }
  const __m512 before = _mm512_load_ps(memory.greatest + 16 * row_tile);
  const __m512 now = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), before);
  const __m512 factors = exp2_of_negative(_mm512_sub_ps(before, now));
  _mm512_store_ps(memory.greatest + 16 * row_tile, now);
  __m512 total = _mm512_mul_ps(_mm512_load_ps(memory.totals + 16 * row_tile), factors);
  for (int64_t k = 0; k < num_keys; k += 2) {
    const float* pair = scores + k * kBlockRowsAmx;
    __m512 first = exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(pair), now));
    __m512 second = exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(pair + kBlockRowsAmx), now));
    total = _mm512_add_ps(total, _mm512_add_ps(first, second));
    if constexpr (Element::kScaled) {
      first = _mm512_mul_ps(first, _mm512_set1_ps(reader.value_scales()[k]));
      second = _mm512_mul_ps(second, _mm512_set1_ps(reader.value_scales()[k + 1]));
    }
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
    const int64_t width = needed * kChunkKeys;
    const __m512 low_factors = soften_tile(reader, memory, 2 * block, width, low);
    const __m512 high_factors = soften_tile(reader, memory, 2 * block + 1, width, high);
    scale_sums(memory, block, low_factors, high_factors);
    add_values<kTerms>(block, needed, memory);
  }
}

template <class Element, int kTerms>
void attend(const Attention& call, const Task& task, const Task& following, int64_t num_rows,
            const Tile& tile) {
  const Memory memory(call.pages.head_dim);
  begin_tiles(tile, num_rows, (num_rows + kBlockRowsAmx - 1) / kBlockRowsAmx, memory);
  TileReader<Element> reader(call, task, following, kTileKeys);
  {
    const TilesInUse tiles;
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
  }
  end_tiles(memory, num_rows, tile);
}

}  // namespace

bool is_for_amx(const Attention& call, const ItemRows& rows) {
  return isa() == kAmx && rows.count >= kFewestRows && call.pages.head_dim % 32 == 0 &&
         call.pages.type != kFloat32Page;
}

void attend_amx(const Attention& call, const Task& task, const Task& following,
                const ItemRows& rows, const Tile& tile) {
  switch (call.pages.type) {
    case kFloat32Page: return;
    case kFloat16Page: return attend<Float16Element, 2>(call, task, following, rows.count, tile);
    case kBfloat16Page: return attend<Bfloat16Element, 1>(call, task, following, rows.count, tile);
    case kFp8Page: return attend<Fp8Element, 1>(call, task, following, rows.count, tile);
    case kInt8Page: return attend<Int8Element, 1>(call, task, following, rows.count, tile);
  }
}

}  // namespace fb
