// Linear layers on AMX tiles: bfloat16 with activations in several terms, and int8.
//
// A tile register holds 16 rows of 64 bytes. Tiles of weights are stored as the instruction wants
// them: 16 columns, and for each of 16 row entries the inputs that are multiplied together.

#include <immintrin.h>

#include <cstring>

#include "grouped.h"
#include "source_avx512.h"
#include "store_avx512.h"
#include "threads.h"
#include "tiles_in_use_amx.h"

namespace fb {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileInputs = 32;  // of bfloat16
constexpr int64_t kTileColumns = 32;  // two tiles side by side
constexpr int64_t kRowsPerTask = 512;     // fewer would have weights come from memory more often
constexpr int64_t kPartsPerThread = 3;
constexpr int64_t kBlocksAtOnce = 4;      // of 32 columns
constexpr int64_t kActivationTiles = 36;  // of 1 KiB

// Activations as tiles of bfloat16: (row tiles, steps, terms, 16 rows, 32 inputs), each x being the
// sum of its terms, to 8 bits more with every one.
struct Terms {
  uint16_t* tiles;
  int64_t num_steps;
  int64_t num_terms;

  const uint16_t* tile(int64_t row, int64_t step) const {
    return tiles + (row / kTileRows * num_steps + step) * num_terms * (kTileBytes / 2);
  }
};

Terms split_activations(const Linear& weight, const Rows& rows) {
  const int64_t num_steps = round_up(weight.k, kTileInputs) / kTileInputs;
  const int64_t num_row_tiles = round_up(rows.m, 2 * kTileRows) / kTileRows;
  const int64_t num_terms = weight.num_terms;
  auto* tiles = static_cast<uint16_t*>(
      activations_buffer(num_row_tiles * num_steps * num_terms * kTileBytes));
  parallel_ranges(rows.m, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t i = 0; i < num_steps * kTileInputs; i += 16) {
        const __mmask16 lanes = i < weight.k ? first_lanes(weight.k - i) : 0;
        __m512 left = _mm512_maskz_loadu_ps(lanes, rows.x + row * weight.k + i);
        uint16_t* target = tiles +
                           (row / kTileRows * num_steps + i / kTileInputs) * num_terms * (kTileBytes / 2) +
                           row % kTileRows * kTileInputs + i % kTileInputs;
        for (int64_t t = 0; t < num_terms; ++t, target += kTileBytes / 2) {
          const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(left);
          _mm256_store_si256(reinterpret_cast<__m256i*>(target), narrow);
          const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
          left = _mm512_sub_ps(left, _mm512_castsi512_ps(wide));
        }
      }
    }
  });
  return {tiles, num_steps, num_terms};
}

// Two tiles of float32 sums, side by side, become outputs.
void store_tiles(const Linear& weight, const Rows& rows, int64_t row, int64_t end, int64_t column,
                 const float* low, const float* high) {
  for (int64_t r = 0; r < kTileRows && row + r < end; ++r) {
    store_columns(weight, rows, row + r, column, _mm512_load_ps(low + r * 16),
                  _mm512_load_ps(high + r * 16));
  }
}

// Four tiles of sums: 32 rows by 32 columns, (row tile, column tile, 16, 16).
struct alignas(64) Sums {
  float tiles[4][kTileRows * 16];
};

// Asks for weights while others are multiplied: memory is as slow as 128 rows' products take.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;
  int64_t lines_at_once;

  Ahead(const uint8_t* first, int64_t size_bytes, int64_t num_fetches)
      : next(first), end(first + size_bytes), lines_at_once(size_bytes / 64 / num_fetches + 1) {}

  void fetch() {
    for (int64_t i = 0; i < lines_at_once && next < end; ++i, next += 64) {
      _mm_prefetch(next, _MM_HINT_T1);
    }
  }
};

// Adds the products over some steps to 32 rows by 32 columns, or to the upper 16 rows of them:
// tiles 0 to 3 sum, 4 and 5 hold activations, 6 and 7 weights.
template <bool kTwoRowTiles>
void add_products(const Terms& x, int64_t row, int64_t first_step, int64_t last_step,
                  const uint8_t* weights, Ahead& ahead, Sums& sums) {
  if (first_step == 0) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwoRowTiles) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums.tiles[0], 64);
    _tile_loadd(1, sums.tiles[1], 64);
    if constexpr (kTwoRowTiles) {
      _tile_loadd(2, sums.tiles[2], 64);
      _tile_loadd(3, sums.tiles[3], 64);
    }
  }
  const uint16_t* upper = x.tile(row, first_step);
  const uint16_t* lower = kTwoRowTiles ? x.tile(row + kTileRows, first_step) : nullptr;
  for (int64_t step = first_step; step < last_step; ++step) {
    ahead.fetch();
    _tile_loadd(6, weights + step * 2 * kTileBytes, 64);
    _tile_loadd(7, weights + step * 2 * kTileBytes + kTileBytes, 64);
    for (int64_t t = 0; t < x.num_terms; ++t, upper += kTileBytes / 2) {
      _tile_loadd(4, upper, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoRowTiles) {
        _tile_loadd(5, lower, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        lower += kTileBytes / 2;
      }
    }
  }
  _tile_stored(0, sums.tiles[0], 64);
  _tile_stored(1, sums.tiles[1], 64);
  if constexpr (kTwoRowTiles) {
    _tile_stored(2, sums.tiles[2], 64);
    _tile_stored(3, sums.tiles[3], 64);
  }
}

// 16 rows by 16 columns. Each group's products are sums of their own, for they have scales of
// their own; two tiles take turns, so that one is multiplied while the other is read.
template <bool kSecond>
void multiply_int8_group(const Int8Block& block, int half, const Int8Activations& x,
                         int64_t row, int64_t group, int32_t* products) {
  _tile_loadd(4, row_values(x, row) + group * kGroup, x.num_groups * kGroup);
  _tile_loadd(6, block.weights[half], 64);
  // The intrinsics want the register's number in so many words.
  if constexpr (kSecond) {
    _tile_zero(1);
    _tile_dpbssd(1, 4, 6);
    _tile_stored(1, products, 64);
  } else {
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, products, 64);
  }
}

void add_group(const Int8Block& block, int half, const Int8Activations& x,
               int64_t row, int64_t group, const int32_t* products, __m512* sums) {
  const __m512 column_scales = _mm512_load_ps(block.scales + half * 16);
  const float* scales = row_scales(x, row) + group;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + r * 16));
    const __m512 scale = _mm512_mul_ps(column_scales, _mm512_set1_ps(scales[r * x.num_groups]));
    sums[r] = _mm512_fmadd_ps(product, scale, sums[r]);
  }
}

void multiply_int8_block(const Int8Block* blocks, int half, const Int8Activations& x,
                         int64_t row, float* out_sums) {
  alignas(64) int32_t products[2][kTileRows * 16];
  __m512 sums[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sums[r] = _mm512_setzero_ps();
  int64_t g = 0;
  for (; g + 2 <= x.num_groups; g += 2) {
    multiply_int8_group<false>(blocks[g], half, x, row, g, products[0]);
    multiply_int8_group<true>(blocks[g + 1], half, x, row, g + 1, products[1]);
    add_group(blocks[g], half, x, row, g, products[0], sums);
    add_group(blocks[g + 1], half, x, row, g + 1, products[1], sums);
  }
  if (g < x.num_groups) {
    multiply_int8_group<false>(blocks[g], half, x, row, g, products[0]);
    add_group(blocks[g], half, x, row, g, products[0], sums);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) _mm512_store_ps(out_sums + r * 16, sums[r]);
}

// Column blocks [first, last) of the rows [start, end); those up to `limit` will be next.
void multiply_bfloat16_blocks(const Linear& weight, const Rows& rows, const Terms& x,
                              int64_t first, int64_t last, int64_t limit, int64_t start,
                              int64_t end) {
  const int64_t block_bytes = x.num_steps * 2 * kTileBytes;
  // Two row tiles' activations for so many steps stay in the first-level cache while the weights of
  // all these blocks pass by.
  const int64_t steps_at_once = kActivationTiles / (2 * x.num_terms);
  const int64_t num_row_pairs = round_up(end - start, 2 * kTileRows) / (2 * kTileRows);
  const int64_t num_next = limit - last < last - first ? limit - last : last - first;
  Ahead ahead(weight.packed + last * block_bytes, num_next * block_bytes,
              num_row_pairs * x.num_steps * (last - first));
  Sums sums[kBlocksAtOnce];
  for (int64_t row = start; row < end; row += 2 * kTileRows) {
    const bool two_row_tiles = end - row > kTileRows;
    for (int64_t step = 0; step < x.num_steps; step += steps_at_once) {
      const int64_t stop = step + steps_at_once < x.num_steps ? step + steps_at_once : x.num_steps;
      for (int64_t block = first; block < last; ++block) {
        const uint8_t* weights = weight.packed + block * block_bytes;
        if (two_row_tiles) {
          add_products<true>(x, row, step, stop, weights, ahead, sums[block - first]);
        } else {
          add_products<false>(x, row, step, stop, weights, ahead, sums[block - first]);
        }
      }
    }
    for (int64_t block = first; block < last; ++block) {
      const Sums& done = sums[block - first];
      const int64_t column = block * kTileColumns;
      store_tiles(weight, rows, row, end, column, done.tiles[0], done.tiles[1]);
      if (two_row_tiles) {
        store_tiles(weight, rows, row + kTileRows, end, column, done.tiles[2], done.tiles[3]);
      }
    }
  }
}

// Calls body(first column block, last one, first row, end of rows) for every part of the product:
// as many column blocks together as leave some parts for every thread.
template <class Body>
void for_each_part(int64_t n, int64_t m, const Body& body) {
  const int64_t num_blocks = round_up(n, kTileColumns) / kTileColumns;
  const int64_t num_row_parts = round_up(m, kRowsPerTask) / kRowsPerTask;
  const int64_t wanted = num_blocks * num_row_parts / (kPartsPerThread * num_threads());
  const int64_t per_part = wanted < 1 ? 1 : wanted < num_blocks ? wanted : num_blocks;
  const int64_t num_column_parts = round_up(num_blocks, per_part) / per_part;
  parallel_for(num_column_parts * num_row_parts, [&](int64_t task) {
    const TilesInUse tiles;
    const int64_t first = task % num_column_parts * per_part;
    const int64_t start = task / num_column_parts * kRowsPerTask;
    body(first, first + per_part < num_blocks ? first + per_part : num_blocks, start,
         m < start + kRowsPerTask ? m : start + kRowsPerTask);
  });
}

}  // namespace

int64_t bfloat16_tiles_bytes(const Linear& shape) {
  return round_up(shape.n, kTileColumns) * round_up(shape.k, kTileInputs) * 2;
}

void pack_bfloat16_tiles(const Linear& shape, const Source& source, uint8_t* packed) {
  const int64_t padded_k = round_up(shape.k, kTileInputs);
  auto* row = static_cast<float*>(scratch(Scratch::packing, padded_k * sizeof(float)));
  auto* target = reinterpret_cast<uint32_t*>(packed);
  memset(packed, 0, bfloat16_tiles_bytes(shape));
  memset(row, 0, padded_k * sizeof(float));
  for (int64_t n = 0; n < shape.n; ++n) {
    read_row(source, n, shape.k, row);
    // (columns / 32, steps of 32 inputs, half, inputs / 2, column, input % 2); two inputs a word.
    uint32_t* column = target + n / kTileColumns * padded_k * (kTileColumns / 2) +
                       n % kTileColumns / 16 * (kTileBytes / 4) + n % 16;
    for (int64_t i = 0; i < padded_k; i += 16) {
      alignas(32) uint32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), to_bfloat16(_mm512_loadu_ps(row + i)));
      uint32_t* words = column + i / kTileInputs * (2 * kTileBytes / 4) + i % kTileInputs / 2 * 16;
      for (int p = 0; p < 8; ++p) words[p * 16] = pairs[p];
    }
  }
}

void multiply_bfloat16_tiles(const Linear& weight, const Rows& rows) {
  const Terms x = split_activations(weight, rows);
  for_each_part(weight.n, rows.m, [&](int64_t first, int64_t last, int64_t start, int64_t end) {
    for (int64_t block = first; block < last; block += kBlocksAtOnce) {
      const int64_t stop = block + kBlocksAtOnce < last ? block + kBlocksAtOnce : last;
      multiply_bfloat16_blocks(weight, rows, x, block, stop, last, start, end);
    }
  });
}

void multiply_int8_amx(const Linear& weight, const Rows& rows) {
  const Int8Activations x = quantize_int8(weight, rows, false);
  const int64_t block_bytes = x.num_groups * static_cast<int64_t>(sizeof(Int8Block));
  for_each_part(weight.n, rows.m, [&](int64_t first, int64_t last, int64_t start, int64_t end) {
    alignas(64) float sums[2][kTileRows * 16];
    for (int64_t block = first; block < last; ++block) {
      const auto* blocks = column_blocks<Int8Block>(weight, block);
      Ahead ahead(weight.packed + (block + 1) * block_bytes, block + 1 < last ? block_bytes : 0,
                  round_up(end - start, kTileRows) / kTileRows);
      for (int64_t row = start; row < end; row += kTileRows) {
        ahead.fetch();
        multiply_int8_block(blocks, 0, x, row, sums[0]);
        multiply_int8_block(blocks, 1, x, row, sums[1]);
        store_tiles(weight, rows, row, end, block * kTileColumns, sums[0], sums[1]);
      }
    }
  });
}

}  // namespace fb
