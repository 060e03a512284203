// Rows of attention: the softmax, and their results, whole or in parts.

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "attention_rows.h"
#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

// Where row `row` of `rows` has its token, in AttentionWork's tokens and limits.
int64_t entry_of(const AttentionItem& item, const ItemRows& rows, int64_t row) {
  return item.first_token + (rows.first + row) / rows.group;
}

int64_t head_of(const ItemRows& rows, int64_t row) {
  return rows.first_head + (rows.first + row) % rows.group;
}

void write_row(float* out, const float* sums, __m512 factor, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 16) {
    _mm512_mask_storeu_ps(out + d, first_lanes(head_dim - d),
                          _mm512_mul_ps(_mm512_load_ps(sums + d), factor));
  }
}

// One token's result from its parts, for all query heads of a key/value head.
void combine(const Attention& call, int64_t token, int64_t kv_head) {
  const int64_t head_dim = call.pages.head_dim, num_heads = call.num_query_heads;
  const AttentionWork& work = *call.work;
  for (int64_t head = call.query_begin[kv_head]; head < call.query_begin[kv_head + 1]; ++head) {
    float greatest = kNoScore;
    for (int64_t part = work.last_part[token]; part >= 0; part = work.next_part[part]) {
      const float score = call.part_stats[2 * (part * num_heads + head)];
      greatest = score > greatest ? score : greatest;
    }
    float* out = call.out + (token * num_heads + head) * head_dim;
    __m512 weights = _mm512_setzero_ps();
    memset(out, 0, static_cast<size_t>(head_dim) * sizeof(float));
    for (int64_t part = work.last_part[token]; part >= 0; part = work.next_part[part]) {
      const int64_t row = part * num_heads + head;
      const __m512 factor =
          exp2_of_negative(_mm512_set1_ps(call.part_stats[2 * row] - greatest));
      weights =
          _mm512_fmadd_ps(factor, _mm512_set1_ps(call.part_stats[2 * row + 1]), weights);
      for (int64_t d = 0; d < head_dim; d += 16) {
        const __mmask16 mask = first_lanes(head_dim - d);
        const __m512 sums = _mm512_maskz_loadu_ps(mask, call.parts + row * head_dim + d);
        const __m512 so_far = _mm512_maskz_loadu_ps(mask, out + d);
        _mm512_mask_storeu_ps(out + d, mask, _mm512_fmadd_ps(factor, sums, so_far));
      }
    }
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), weights);
    for (int64_t d = 0; d < head_dim; d += 16) {
      const __mmask16 mask = first_lanes(head_dim - d);
      _mm512_mask_storeu_ps(out + d, mask,
                            _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, out + d), factor));
    }
  }
}

}  // namespace

Tile::Tile(int64_t head_dim) {
  width = (head_dim + 15) / 16 * 16;
  // Keys and values of a tile stay in the first-level cache.
  num_keys = width <= 64 ? 64 : 32;
  const int64_t num_floats = 2 * kMaxRows * width + 2 * num_keys * width + kBlockRows * num_keys +
                             16 * kMaxRows + 2 * kMaxRows;
  query = static_cast<float*>(
      scratch(Scratch::attention, static_cast<size_t>(num_floats) * sizeof(float)));
  sums = query + kMaxRows * width;
  keys = sums + kMaxRows * width;
  values = keys + num_keys * width;
  scores = values + num_keys * width;
  weights = scores + kBlockRows * num_keys;
  greatest = weights + 16 * kMaxRows;
  limits = reinterpret_cast<int32_t*>(greatest + kMaxRows);
}

void begin_rows(const Attention& call, const AttentionItem& item, const ItemRows& rows,
                const Tile& tile) {
  const int64_t head_dim = call.pages.head_dim;
  const __m512 scale = _mm512_set1_ps(call.scale * kLog2E);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t entry = entry_of(item, rows, r);
    const float* source = call.query + call.work->tokens[entry] * call.query_stride +
                          head_of(rows, r) * head_dim;
    for (int64_t d = 0; d < tile.width; d += 16) {
      const __m512 values = _mm512_maskz_loadu_ps(first_lanes(head_dim - d), source + d);
      _mm512_store_ps(tile.query + r * tile.width + d, _mm512_mul_ps(values, scale));
      _mm512_store_ps(tile.sums + r * tile.width + d, _mm512_setzero_ps());
    }
    _mm512_store_ps(tile.weights + 16 * r, _mm512_setzero_ps());
    tile.greatest[r] = kNoScore;
    tile.limits[r] = call.work->limits[entry];
  }
}

int64_t count_visible(const Tile& tile, int64_t first_row, int64_t num_rows, int64_t begin,
                      int64_t num_keys, int64_t* visible) {
  int64_t most = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t limit = tile.limits[first_row + r] - begin;
    visible[r] = limit < 0 ? 0 : limit < num_keys ? limit : num_keys;
    if (visible[r] > most) most = visible[r];
  }
  return most;
}

void soften(const Tile& tile, int64_t first_row, int64_t num_rows, const int64_t* visible,
            int64_t num_vectors, float* factors) {
  alignas(64) float greatest[16] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    float* scores = tile.scores + r * tile.num_keys;
    __m512 most = _mm512_set1_ps(kNoScore);
    for (int64_t v = 0; v < num_vectors; ++v) {
      __m512 found = _mm512_load_ps(scores + 16 * v);
      if (visible[r] < 16 * (v + 1)) {
        const int64_t left = visible[r] < 16 * v ? 0 : visible[r] - 16 * v;
        found = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), first_lanes(left), found);
        _mm512_store_ps(scores + 16 * v, found);
      }
      most = _mm512_max_ps(most, found);
    }
    greatest[r] = _mm512_reduce_max_ps(most);
  }
  const __mmask16 rows = first_lanes(num_rows);
  const __m512 before = _mm512_maskz_loadu_ps(rows, tile.greatest + first_row);
  // A NaN among the scores is not passed on here; its weight is a NaN.
  const __m512 now = _mm512_max_ps(_mm512_load_ps(greatest), before);
  _mm512_store_ps(greatest, now);
  _mm512_mask_storeu_ps(tile.greatest + first_row, rows, now);
  _mm512_store_ps(factors, exp2_of_negative(_mm512_sub_ps(before, now)));
  for (int64_t r = 0; r < num_rows; ++r) {
    float* scores = tile.scores + r * tile.num_keys;
    float* weights = tile.weights + 16 * (first_row + r);
    const __m512 most = _mm512_set1_ps(greatest[r]);
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(weights), _mm512_set1_ps(factors[r]));
    for (int64_t v = 0; v < num_vectors; ++v) {
      const __m512 weight =
          exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(scores + 16 * v), most));
      _mm512_store_ps(scores + 16 * v, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    _mm512_store_ps(weights, sum);
  }
}

void end_rows(const Attention& call, const AttentionItem& item, const ItemRows& rows,
              const Tile& tile) {
  const int64_t head_dim = call.pages.head_dim;
  for (int64_t r = 0; r < rows.count; ++r) {
    const float weight = _mm512_reduce_add_ps(_mm512_load_ps(tile.weights + 16 * r));
    const float* sums = tile.sums + r * tile.width;
    const int64_t entry = entry_of(item, rows, r);
    if (item.first_part < 0) {
      const int64_t row = call.work->tokens[entry] * call.num_query_heads + head_of(rows, r);
      write_row(call.out + row * head_dim, sums, _mm512_set1_ps(1.0f / weight), head_dim);
    } else {
      const int64_t part = item.first_part + entry - item.first_token;
      const int64_t row = part * call.num_query_heads + head_of(rows, r);
      write_row(call.parts + row * head_dim, sums, _mm512_set1_ps(1.0f), head_dim);
      call.part_stats[2 * row] = tile.greatest[r];
      call.part_stats[2 * row + 1] = weight;
    }
  }
}

void arrive(const Attention& call, const AttentionItem& item, int64_t kv_head) {
  for (int64_t i = 0; i < item.num_tokens; ++i) {
    const int64_t token = call.work->tokens[item.first_token + i];
    int32_t* arrived = call.arrived + token * call.pages.num_kv_heads + kv_head;
    if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == call.work->part_count[token]) {
      *arrived = 0;
      combine(call, token, kv_head);
    }
  }
}

}  // namespace fb
