// Paged attention of one step: what is to be computed, cut into items that threads take up.
//
// An item is a range of one sequence's keys with the tokens that attend to it: a decode token, a
// tile of a prefill chunk, or the tokens of several sequences whose block tables begin with the
// same blocks, so that these are read once for all. It is computed for each key/value head. Where
// a token's keys are spread over several items, each leaves a partial result (its "part"), and
// whoever finishes the last one combines them.

#pragma once

#include <cstdint>

#include "pages.h"

namespace fb {

struct AttentionItem {
  int32_t seq;  // whose block table is read
  int32_t key_begin;
  int32_t key_end;
  int32_t first_token;  // in AttentionWork's tokens and limits
  int32_t num_tokens;
  int32_t first_part;  // its tokens' parts are numbered from here; -1: results are final
};

// One step's items. Written by plan_attention into memory of the caller's.
struct AttentionWork {
  int64_t num_items;
  int64_t num_entries;
  int64_t num_parts;
  AttentionItem* items;
  int32_t* tokens;      // (num_entries) rows of the step
  int32_t* limits;      // (num_entries) keys below this one are visible to the token
  int32_t* next_part;   // (num_parts) another part of the same token, or -1
  int32_t* last_part;   // (tokens of the step) a token's first part to look at, or -1
  int32_t* part_count;  // (tokens of the step)
};

// A row is a query head of a token. So many are worked on together, and items are cut to fit.
constexpr int64_t kMaxRows = 96;

// One layer's call.
struct Attention {
  Pages pages;
  int64_t num_query_heads;
  const int32_t* query_begin;  // (num_kv_heads + 1) query heads of each key/value head
  const int32_t* block_tables;
  int64_t table_stride;
  const AttentionWork* work;
  float* parts;       // (num_parts, query heads, head_dim): sums of weighted values
  float* part_stats;  // (num_parts, query heads, 2): the greatest score and the weights' sum
  int32_t* arrived;   // (tokens of the step, kv heads) parts that are there; zeros between calls
  float scale;
  float* out;          // (tokens, query heads, head_dim)
  const float* query;  // (tokens, query heads, head_dim), rows query_stride apart
  int64_t query_stride;
  const void* keys;
  const void* values;
  const uint16_t* key_scales;  // bfloat16; null where pages have none
  const uint16_t* value_scales;
};

// Scores are kept in units of ln 2: weights are powers of two. No real score is as low as this.
constexpr float kNoScore = -1e30f;
constexpr float kLog2E = 1.44269504f;

}  // namespace fb
