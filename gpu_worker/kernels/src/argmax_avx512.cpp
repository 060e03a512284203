// The largest value of each row: greedy sampling's whole work.

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kVectors = 4;
constexpr int64_t kMinChunk = 8192;
constexpr int64_t kMaxChunks = 64;

struct Best {
  float value;
  int64_t index;
};

// The first NaN of `values`, or else the first of the largest.
Best best_of(const float* values, int64_t count) {
  __m512 best[kVectors];
  __m512i where[kVectors], at[kVectors];
  __mmask16 nan = 0;
  const __m512i lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t v = 0; v < kVectors; ++v) {
    best[v] = _mm512_set1_ps(-INFINITY);
    at[v] = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(16 * v)));
    where[v] = at[v];
  }
  const __m512i step = _mm512_set1_epi32(16 * kVectors);
  for (int64_t i = 0; i < count; i += 16 * kVectors) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t left = count - i - 16 * v;
      const __mmask16 mask = first_lanes(left > 0 ? left : 0);
      const __m512 found =
          _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), mask, values + i + 16 * v);
      nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(found, found, _CMP_UNORD_Q));
      const __mmask16 better = _mm512_cmp_ps_mask(found, best[v], _CMP_GT_OQ);
      best[v] = _mm512_mask_mov_ps(best[v], better, found);
      where[v] = _mm512_mask_mov_epi32(where[v], better, at[v]);
      at[v] = _mm512_add_epi32(at[v], step);
    }
  }
  if (nan != 0) {
    int64_t first = 0;
    while (values[first] == values[first]) ++first;
    return {values[first], first};
  }
  __m512 top = best[0];
  for (int64_t v = 1; v < kVectors; ++v) top = _mm512_max_ps(top, best[v]);
  const float value = _mm512_reduce_max_ps(top);
  int index = INT32_MAX;
  for (int64_t v = 0; v < kVectors; ++v) {
    const __mmask16 equal = _mm512_cmp_ps_mask(best[v], _mm512_set1_ps(value), _CMP_EQ_OQ);
    const int first = _mm512_mask_reduce_min_epi32(equal, where[v]);
    if (equal != 0 && first < index) index = first;
  }
  return {value, index};
}

// Whether `next`, which stands later in the row, wins.
bool is_better(const Best& next, const Best& best) {
  if (best.value != best.value) return false;
  return next.value > best.value || next.value != next.value;
}

}  // namespace
}  // namespace fb

// For each row of `values` (num_rows, n), n < 2^31: the first of the largest values and its index,
// or the first NaN and its index.
extern "C" void fb_argmax(const float* values, int64_t num_rows, int64_t n, int64_t* indices,
                          float* largest) {
  using fb::Best;
  // Few rows are cut up, so that all threads have some of them.
  int64_t num_chunks = num_rows >= 4 * fb::num_threads() ? 1 : n / fb::kMinChunk;
  num_chunks = num_chunks < 1 ? 1 : num_chunks > fb::kMaxChunks ? fb::kMaxChunks : num_chunks;
  const int64_t chunk = ((n + num_chunks - 1) / num_chunks + 15) / 16 * 16;
  Best* found = static_cast<Best*>(
      fb::scratch(fb::Scratch::other, static_cast<size_t>(num_rows * num_chunks) * sizeof(Best)));
  fb::parallel_for(num_rows * num_chunks, [&](int64_t task) {
    const int64_t row = task / num_chunks, first = task % num_chunks * chunk;
    const int64_t count = n - first < chunk ? n - first : chunk;
    found[task] = {-INFINITY, 0};
    if (count <= 0) return;
    found[task] = fb::best_of(values + row * n + first, count);
    found[task].index += first;
  });
  for (int64_t row = 0; row < num_rows; ++row) {
    Best best = found[row * num_chunks];
    for (int64_t i = 1; i < num_chunks; ++i) {
      const Best& next = found[row * num_chunks + i];
      if (fb::is_better(next, best)) best = next;
    }
    indices[row] = best.index;
    largest[row] = best.value;
  }
}
