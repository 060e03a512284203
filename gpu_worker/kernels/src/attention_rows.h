// The rows of an item: their state from tile to tile of keys, and what becomes of it.

#pragma once

#include <cstdint>

#include "attention.h"

namespace fb {

constexpr int kBlockRows = 6;
constexpr int64_t kMaxTileKeys = 64;

// One thread's memory for an item. The row-wise arrays have `width` columns, head_dim rounded up to
// whole vectors.
struct Tile {
  int64_t width;
  int64_t num_keys;  // of a full tile
  float* query;      // (kMaxRows, width), scaled
  float* sums;       // (kMaxRows, width) weighted values
  float* keys;       // (width, num_keys)
  float* values;     // (num_keys, width)
  float* scores;     // (kBlockRows, num_keys)
  float* weights;    // (kMaxRows, 16) sums of weights, by lane
  float* greatest;   // (kMaxRows) greatest score so far
  int32_t* limits;   // (kMaxRows) keys below are visible

  explicit Tile(int64_t head_dim);
};

// Rows [first, first + count) of an item: row r is query head r % group of its token r / group.
struct ItemRows {
  int64_t first;
  int64_t count;
  int64_t group;
  int64_t first_head;
};

// Item `item` of key/value head `kv_head`.
struct Task {
  const AttentionItem* item;
  int64_t kv_head;
};

// Takes in the rows' queries; nothing is attended to yet.
void begin_rows(const Attention& call, const AttentionItem& item, const ItemRows& rows,
                const Tile& tile);

// How many of a tile's keys, which are `num_keys` from `begin` on, each of a block's rows sees.
// Returns the most.
int64_t count_visible(const Tile& tile, int64_t first_row, int64_t num_rows, int64_t begin,
                      int64_t num_keys, int64_t* visible);

// Turns a block's scores into weights (an online softmax, arXiv 1805.02867); `visible[r]` of them
// count. Returns in `factors` (16) what the rows' former sums are to be multiplied by.
void soften(const Tile& tile, int64_t first_row, int64_t num_rows, const int64_t* visible,
            int64_t num_vectors, float* factors);

// Writes results or, where the item has them, parts.
void end_rows(const Attention& call, const AttentionItem& item, const ItemRows& rows,
              const Tile& tile);

// attention_amx.cpp: whether it takes rows of this number and form, and attention to all keys of
// their task between begin_rows and end_rows. `following` is what the thread will likely do next.
bool is_for_amx(const Attention& call, const ItemRows& rows);
void attend_amx(const Attention& call, const Task& task, const Task& following,
                const ItemRows& rows, const Tile& tile);

// Says that an item's parts are there, and combines those of tokens of which it was the last.
void arrive(const Attention& call, const AttentionItem& item, int64_t kv_head);

}  // namespace fb
