// Finding keys and values in the pages.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "attention_rows.h"
#include "elements_avx512.h"
#include "vector_math_avx512.h"

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
    find(task, next_begin_);
  }

  // Goes on to the next tile. Returns how many keys it has.
  int64_t advance() {
    const int64_t begin = next_begin_, count = num_keys(task_, begin);
    if constexpr (Element::kScaled) read_scales(begin, count);
    next_begin_ += count;
    next_ = 1 - next_;
    if (next_begin_ < task_.item->key_end) {
      find(task_, next_begin_);
    } else {
      find(following_, following_.item->key_begin);
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

  // What the tile's keys and values, as they are loaded, are to be multiplied by, by slot; zeros
  // beyond the last one.
  const float* key_scales() const { return key_scales_; }
  const float* value_scales() const { return value_scales_; }

  // Asks for the elements from `d` on of a slot of the next tile.
  void fetch_key(int64_t slot, int64_t d) const { fetch(call_.keys, slot, d); }
  void fetch_value(int64_t slot, int64_t d) const { fetch(call_.values, slot, d); }

 private:
  int64_t num_keys(const Task& task, int64_t begin) const {
    const int64_t left = task.item->key_end - begin;
    return left < tile_keys_ ? left : tile_keys_;
  }

  // Calls `run(first, last, block, slot)` for keys [first, last) of a tile, which lie in `block`
  // from `slot` on.
  template <class Run>
  void for_each_run(const Task& task, int64_t begin, int64_t count, Run&& run) const {
    const int64_t block_size = call_.pages.block_size;
    const int32_t* table = call_.block_tables + task.item->seq * call_.table_stride;
    int64_t block = begin / block_size, slot = begin % block_size;
    for (int64_t first = 0; first < count; slot = 0, ++block) {
      const int64_t rest = first + block_size - slot;
      const int64_t last = rest < count ? rest : count;
      run(first, last, table[block], slot);
      first = last;
    }
  }

  // Notes where the next tile's slots lie.
  void find(const Task& task, int64_t begin) {
    const Pages& pages = call_.pages;
    const int64_t count = num_keys(task, begin);
    int64_t* offsets = offsets_[next_];
    for_each_run(task, begin, count, [&](int64_t i, int64_t last, int64_t block, int64_t slot) {
      if constexpr (Element::kScaled) {
        const int64_t scale = scale_offset(pages, block, task.kv_head, slot);
        __builtin_prefetch(call_.key_scales + scale, 0, 2);
        __builtin_prefetch(call_.value_scales + scale, 0, 2);
      }
      for (int64_t offset = slot_offset(pages, block, task.kv_head, slot); i < last; ++i) {
        offsets[i] = offset;
        offset += pages.head_dim;
      }
    });
    for (int64_t i = count; i < tile_keys_; ++i) offsets[i] = offsets[count - 1];
  }

  void read_scales(int64_t begin, int64_t count) {
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t i = 0; i < tile_keys_; i += 16) {
      _mm512_store_ps(key_scales_ + i, zero);
      _mm512_store_ps(value_scales_ + i, zero);
    }
    for_each_run(task_, begin, count, [&](int64_t i, int64_t last, int64_t block, int64_t slot) {
      const int64_t offset = scale_offset(call_.pages, block, task_.kv_head, slot) - i;
      for (; i < last; i += 16) {
        const __mmask16 mask = first_lanes(last - i);
        const __m512 of_keys = load_scales<Element>(mask, call_.key_scales + offset + i);
        const __m512 of_values = load_scales<Element>(mask, call_.value_scales + offset + i);
        _mm512_mask_storeu_ps(key_scales_ + i, mask, of_keys);
        _mm512_mask_storeu_ps(value_scales_ + i, mask, of_values);
      }
    });
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
  alignas(64) float key_scales_[Element::kScaled ? kMaxTileKeys : 16];
  alignas(64) float value_scales_[Element::kScaled ? kMaxTileKeys : 16];
};

}  // namespace
}  // namespace fb
