// One layer's pages of the KV-cache, as cache/pages.py lays them out.

#pragma once

#include <cstdint>

namespace fb {

enum PageType : int64_t {
  kFloat32Page = 0,
  kFloat16Page = 1,
  kBfloat16Page = 2,
  kFp8Page = 3,
  kInt8Page = 4,
};

// Strides count elements, or scales. Slot `s` of a block and head lies `s * head_dim` behind its
// start, and its scale, where the type has them, `s` behind the start of the head's scales.
struct Pages {
  PageType type;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;    // slots
  int64_t block_stride;  // from a block to the next one
  int64_t head_stride;   // from a head to the next one
  int64_t scale_block_stride;
  int64_t scale_head_stride;
};

namespace {  // each unit its own copy: they are compiled for different processors

inline int64_t slot_offset(const Pages& pages, int64_t block, int64_t head, int64_t slot) {
  return block * pages.block_stride + head * pages.head_stride + slot * pages.head_dim;
}

inline int64_t scale_offset(const Pages& pages, int64_t block, int64_t head, int64_t slot) {
  return block * pages.scale_block_stride + head * pages.scale_head_stride + slot;
}

}  // namespace

}  // namespace fb
