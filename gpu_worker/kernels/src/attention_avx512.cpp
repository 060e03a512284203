// Paged attention in float32 arithmetic.

#include "attention.h"
#include "attention_few_avx512.h"
#include "attention_many_avx512.h"
#include "attention_reader.h"
#include "attention_rows.h"
#include "elements_avx512.h"
#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kMostOfFewRows = 8;  // above, transposing the keys pays

template <class Element>
void attend(const Attention& call, const Task& task, const Task& following) {
  const AttentionItem& item = *task.item;
  const int64_t head_dim = call.pages.head_dim;
  const Tile tile(head_dim);
  ItemRows rows{};
  rows.first_head = call.query_begin[task.kv_head];
  rows.group = call.query_begin[task.kv_head + 1] - rows.first_head;
  const int64_t num_rows = item.num_tokens * rows.group;
  for (; rows.first < num_rows; rows.first += kMaxRows) {
    rows.count = num_rows - rows.first < kMaxRows ? num_rows - rows.first : kMaxRows;
    begin_rows(call, item, rows, tile);
    if (is_for_amx(call, rows)) {
      attend_amx(call, task, following, rows, tile);
    } else {
      TileReader<Element> reader(call, task, following, tile.num_keys);
      for (int64_t key = item.key_begin; key < item.key_end; key += tile.num_keys) {
        const int64_t num_keys = reader.advance();
        if (rows.count <= kMostOfFewRows) {
          attend_few(reader, head_dim, rows.count, key, num_keys, tile);
        } else {
          attend_many(reader, head_dim, rows.count, key, num_keys, tile);
        }
      }
    }
    end_rows(call, item, rows, tile);
  }
  if (item.first_part >= 0) arrive(call, item, task.kv_head);
}

template <class Element>
void attend_all(const Attention& call) {
  // The heads of an item one after the other: their keys lie side by side in each block, and so do
  // their values. Items that read the same blocks are neighbours, and meet them in the cache.
  const int64_t num_heads = call.pages.num_kv_heads;
  const int64_t num_tasks = call.work->num_items * num_heads;
  const auto task_at = [&](int64_t index) {
    return Task{call.work->items + index / num_heads, index % num_heads};
  };
  parallel_for(num_tasks, [&](int64_t index) {
    const int64_t following = index + num_threads();
    attend<Element>(call, task_at(index), task_at(following < num_tasks ? following : index));
  });
}

}  // namespace
}  // namespace fb

extern "C" void fb_attend(const fb::Attention* call) {
  switch (call->pages.type) {
    case fb::kFloat32Page: return fb::attend_all<fb::Float32Element>(*call);
    case fb::kFloat16Page: return fb::attend_all<fb::Float16Element>(*call);
    case fb::kBfloat16Page: return fb::attend_all<fb::Bfloat16Element>(*call);
    case fb::kFp8Page: return fb::attend_all<fb::Fp8Element>(*call);
    case fb::kInt8Page: return fb::attend_all<fb::Int8Element>(*call);
  }
}
