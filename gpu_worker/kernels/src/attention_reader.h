// Finding keys and values in the pages.

#pragma once

#include <cstdint>

#include "attention.h"
#include "attention_rows.h"

namespace fb {
namespace {  // files with other instruction sets have copies of their own

// Reads the tiles of a task's keys and values one after the other. While one is read, the next
// one's memory is fetched: blocks lie where they may, and the processor foresees only what follows
// within a few kilobytes.
template <class Element>
class TileReader {
 public:
  using Stored = typename Element::Stored;

  // `following`: the task that this thread will likely do next.
  TileReader(const Attention& call, const Task& task, const Task& following, int64_t tile_keys)
      : call_(call),
        task_(task),
        following_(following),
        tile_keys_(tile_keys),
        next_begin_(task.item->key_begin) {
    find(task, next_begin_, offsets_[next_]);
  }

  // Goes on to the next tile. Returns how many keys it has.
  int64_t advance() {
    const int64_t left = task_.item->key_end - next_begin_;
    const int64_t count = left < tile_keys_ ? left : tile_keys_;
    next_begin_ += count;
    next_ = 1 - next_;
    if (next_begin_ < task_.item->key_end) {
      find(task_, next_begin_, offsets_[next_]);
    } else {
      find(following_, following_.item->key_begin, offsets_[next_]);
    }
    return count;
  }

  // The tile's slots; those beyond the last one repeat it.
  const Stored* key(int64_t slot) const {
    return static_cast<const Stored*>(call_.keys) + offsets_[1 - next_][slot];
  }
  const Stored* value(int64_t slot) const {
    return static_cast<const Stored*>(call_.values) + offsets_[1 - next_][slot];
  }

  // Asks for the elements from `d` on of a slot of the next tile.
  void fetch_key(int64_t slot, int64_t d) const { fetch(call_.keys, slot, d); }
  void fetch_value(int64_t slot, int64_t d) const { fetch(call_.values, slot, d); }

 private:
  void find(const Task& task, int64_t begin, int64_t* offsets) const {
    const Pages& pages = call_.pages;
    const int32_t* table = call_.block_tables + task.item->seq * call_.table_stride;
    const int64_t left = task.item->key_end - begin;
    const int64_t count = left < tile_keys_ ? left : tile_keys_;
    int64_t block = begin / pages.block_size, slot = begin % pages.block_size;
    for (int64_t i = 0; i < count; slot = 0, ++block) {
      int64_t offset = slot_offset(pages, table[block], task.kv_head, slot);
      const int64_t rest = i + pages.block_size - slot;
      for (const int64_t stop = rest < count ? rest : count; i < stop; ++i) {
        offsets[i] = offset;
        offset += pages.head_dim;
      }
    }
    for (int64_t i = count; i < tile_keys_; ++i) offsets[i] = offsets[count - 1];
  }

  void fetch(const void* memory, int64_t slot, int64_t d) const {
    if (d % (64 / sizeof(Stored)) == 0) {
      __builtin_prefetch(static_cast<const Stored*>(memory) + offsets_[next_][slot] + d, 0, 2);
    }
  }

  const Attention& call_;
  const Task& task_;
  const Task& following_;
  int64_t tile_keys_;
  int64_t next_begin_;  // the first key of the task's next tile
  int next_ = 0;        // the next tile's place in `offsets_`
  int64_t offsets_[2][kMaxTileKeys];
};

}  // namespace
}  // namespace fb
