// Cutting one step's attention into items.

#include <algorithm>
#include <climits>

#include "attention.h"
#include "threads.h"

namespace fb {
namespace {

constexpr int64_t kFewRows = 16;         // a sequence with no more shares its prefix's items
constexpr int64_t kMinSharedKeys = 128;  // shared keys that are worth an item of their own
constexpr int64_t kKeysUnit = 64;        // ranges of keys are cut at multiples
constexpr int64_t kRowsOfReading = 8;    // reading a key costs as much as these rows' work on it
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kMinItemCost = 4096;

struct Step {
  const int32_t* query_starts;  // (num_seqs + 1)
  const int32_t* context_lens;  // (num_seqs)
  const int32_t* block_tables;  // (num_seqs, table_stride)
  int64_t table_stride;
  int64_t num_seqs;
  int64_t block_size;
  int64_t rows_per_token;  // most query heads of a key/value head
  int64_t num_kv_heads;
  int32_t* order;  // (num_seqs) for the planner's own use
  int64_t max_items;
  int64_t max_entries;
  int64_t max_parts;
};

class Planner {
 public:
  Planner(const Step& step, AttentionWork& work) : step_(step), work_(work) {
    tile_tokens_ = std::max<int64_t>(1, kMaxRows / step.rows_per_token);
    work.num_items = work.num_entries = work.num_parts = 0;
    std::fill_n(work.last_part, step.query_starts[step.num_seqs], -1);
    std::fill_n(work.part_count, step.query_starts[step.num_seqs], 0);
    max_cost_ = max_cost();
  }

  void run() {
    int64_t num_few = 0;
    for (int64_t seq = 0; seq < step_.num_seqs; ++seq) {
      if (num_new(seq) == 1 || num_new(seq) * step_.rows_per_token <= kFewRows) {
        step_.order[num_few++] = static_cast<int32_t>(seq);
      } else {
        add_chunk(seq);
      }
    }
    split(0, num_few, 0, 0);
  }

 private:
  int64_t num_new(int64_t seq) const {
    return step_.query_starts[seq + 1] - step_.query_starts[seq];
  }

  // Blocks that are full without the step's own tokens: only those are shared.
  int64_t full_blocks(int64_t seq) const {
    return (step_.context_lens[seq] - num_new(seq)) / step_.block_size;
  }

  int32_t block(int64_t seq, int64_t index) const {
    return step_.block_tables[seq * step_.table_stride + index];
  }

  int64_t cost(int64_t num_tokens, int64_t num_keys) const {
    return (num_tokens * step_.rows_per_token + kRowsOfReading) * num_keys;
  }

  int64_t max_cost() const {
    if (num_threads() == 1) return INT64_MAX;
    int64_t total = 0;
    for (int64_t seq = 0; seq < step_.num_seqs; ++seq) {
      const int64_t tiles = (num_new(seq) + tile_tokens_ - 1) / tile_tokens_;
      total += tiles * cost(std::min(num_new(seq), tile_tokens_), step_.context_lens[seq]);
    }
    const int64_t share =
        total * step_.num_kv_heads / (num_threads() * kItemsPerThread);
    return std::max(share, kMinItemCost);
  }

  // A chunk of a prompt. Its last tile has the most keys and goes first, so that threads end
  // together.
  void add_chunk(int64_t seq) {
    const int64_t num_tiles = (num_new(seq) + tile_tokens_ - 1) / tile_tokens_;
    for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
      const int64_t first = tile * tile_tokens_;
      const int64_t last = std::min(first + tile_tokens_, num_new(seq));
      const int64_t num_keys = step_.context_lens[seq] - num_new(seq) + last;
      const int64_t entry = work_.num_entries;
      add_entries(seq, first, last);
      add_ranges(seq, 0, num_keys, entry, true);
    }
  }

  // Sequences order[lo, hi) whose first `depth` blocks are the same, and whose keys below `start`
  // have been dealt with: a walk down the tree that their block tables form.
  void split(int64_t lo, int64_t hi, int64_t depth, int64_t start) {
    int32_t* order = step_.order;
    if (hi - lo > 1) {
      const int64_t first_depth = depth;
      while (all_share(lo, hi, depth)) ++depth;
      if (depth > first_depth && depth * step_.block_size - start >= kMinSharedKeys) {
        add_shared(lo, hi, start, depth * step_.block_size);
        start = depth * step_.block_size;
      }
    }
    // Those that end here, then those that go on, by their next block.
    const auto next = [&](int32_t seq) {
      return depth < full_blocks(seq) ? block(seq, depth) : -1;
    };
    std::sort(order + lo, order + hi, [&](int32_t a, int32_t b) {
      return next(a) != next(b) ? next(a) < next(b) : a < b;
    });
    while (lo < hi) {
      int64_t end = lo + 1;
      while (end < hi && next(order[end]) == next(order[lo])) ++end;
      if (end - lo == 1 || next(order[lo]) < 0) {
        for (int64_t i = lo; i < end; ++i) add_rest(order[i], start);
      } else {
        split(lo, end, depth, start);
      }
      lo = end;
    }
  }

  bool all_share(int64_t lo, int64_t hi, int64_t depth) const {
    for (int64_t i = lo; i < hi; ++i) {
      const int32_t seq = step_.order[i];
      if (depth >= full_blocks(seq) || block(seq, depth) != block(step_.order[lo], depth)) {
        return false;
      }
    }
    return true;
  }

  void add_shared(int64_t lo, int64_t hi, int64_t key_begin, int64_t key_end) {
    while (lo < hi) {
      const int64_t entry = work_.num_entries;
      const int32_t seq = step_.order[lo];
      for (; lo < hi; ++lo) {
        const int64_t next = step_.order[lo];
        const int64_t so_far = work_.num_entries - entry;
        if (so_far > 0 && so_far + num_new(next) > tile_tokens_) break;
        add_entries(next, 0, num_new(next));
      }
      add_ranges(seq, key_begin, key_end, entry, false);
    }
  }

  void add_rest(int64_t seq, int64_t start) {
    const int64_t entry = work_.num_entries;
    add_entries(seq, 0, num_new(seq));
    add_ranges(seq, start, step_.context_lens[seq], entry, start == 0);
  }

  void add_entries(int64_t seq, int64_t first, int64_t last) {
    const int64_t before = step_.context_lens[seq] - num_new(seq);
    for (int64_t i = first; i < last; ++i) {
      const int64_t entry = work_.num_entries++;
      if (entry >= step_.max_entries) continue;
      work_.tokens[entry] = static_cast<int32_t>(step_.query_starts[seq] + i);
      work_.limits[entry] = static_cast<int32_t>(before + i + 1);
    }
  }

  // The entries from `entry` on attend to these keys; `whole`: to no others.
  void add_ranges(int64_t seq, int64_t begin, int64_t end, int64_t entry, bool whole) {
    const int64_t num_tokens = work_.num_entries - entry;
    int64_t len = max_cost_ / cost(num_tokens, 1);
    len = std::max((len + kKeysUnit - 1) / kKeysUnit * kKeysUnit, 2 * kKeysUnit);
    const int64_t num_ranges = (end - begin + len - 1) / len;
    len = (end - begin + num_ranges - 1) / num_ranges;
    len = (len + kKeysUnit - 1) / kKeysUnit * kKeysUnit;
    for (; begin < end; begin += len) {
      const bool is_final = whole && num_ranges == 1;
      add_item({static_cast<int32_t>(seq), static_cast<int32_t>(begin),
                static_cast<int32_t>(std::min(begin + len, end)), static_cast<int32_t>(entry),
                static_cast<int32_t>(num_tokens),
                is_final ? -1 : static_cast<int32_t>(work_.num_parts)});
    }
  }

  void add_item(const AttentionItem& item) {
    if (work_.num_items < step_.max_items) work_.items[work_.num_items] = item;
    ++work_.num_items;
    if (item.first_part < 0) return;
    for (int64_t i = item.first_token; i < item.first_token + item.num_tokens; ++i) {
      const int64_t part = work_.num_parts++;
      if (part >= step_.max_parts || i >= step_.max_entries) continue;
      const int32_t token = work_.tokens[i];
      work_.next_part[part] = work_.last_part[token];
      work_.last_part[token] = static_cast<int32_t>(part);
      ++work_.part_count[token];
    }
  }

  const Step& step_;
  AttentionWork& work_;
  int64_t tile_tokens_;
  int64_t max_cost_;
};

}  // namespace
}  // namespace fb

// Fills `work`. Where its arrays are too short for what `work` counts afterwards, the contents are
// of no use, and the caller comes again with longer ones.
extern "C" void fb_plan_attention(const fb::Step* step, fb::AttentionWork* work) {
  fb::Planner(*step, *work).run();
}
