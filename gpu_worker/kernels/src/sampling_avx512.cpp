// Drawing a token for each row of logits, from what top-k, top-p and min-p leave.
//
// A row stays in one core's cache from its logits to its token. Its weights are probabilities but
// for a factor: the most likely token has weight 1. The filters all keep the tokens of at least
// some weight, so a row needs one threshold, and nothing is sorted to find it: a radix search over
// the bits of the weights that may decide about it, which are few.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kChunk = 256;
constexpr float kLeastScore = -87.0f;  // of lower ones the weight is 0
constexpr float kLevels[] = {1e-2f, 1e-4f, 1e-6f, 0.0f};
constexpr int kShifts[] = {20, 10, 0};
constexpr int64_t kNumBuckets = 1 << 10;

struct Filters {
  int64_t top_k;
  float top_p;
  float min_p;
};

struct Kept {
  int64_t count;
  double sum;
};

// The greatest of a row's logits, or NaN if there is one among them.
float highest(const float* logits, int64_t n) {
  __m512 best = _mm512_set1_ps(-INFINITY);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 x = _mm512_mask_loadu_ps(best, lanes, logits + i);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
    best = _mm512_max_ps(x, best);
  }
  return nan ? NAN : _mm512_reduce_max_ps(best);
}

// logits -> weights, in place.
void to_weights(float* logits, int64_t n, float best, float temperature) {
  const __m512 top = _mm512_set1_ps(best), divisor = _mm512_set1_ps(temperature);
  const __m512 least = _mm512_set1_ps(kLeastScore);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 logit = _mm512_maskz_loadu_ps(lanes, logits + i);
    const __m512 score = _mm512_div_ps(_mm512_sub_ps(logit, top), divisor);
    const __mmask16 counts = _mm512_cmp_ps_mask(score, least, _CMP_GE_OQ);
    const __m512 weight = _mm512_maskz_mov_ps(counts, exp(score));
    _mm512_mask_storeu_ps(logits + i, lanes, weight);
  }
}

// Moves the weights from `level` up to the front of `out`, which has room for 16 more.
Kept at_least(const float* weights, int64_t n, float level, float* out) {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 w = _mm512_maskz_loadu_ps(lanes, weights + i);
    const __mmask16 keep = _mm512_mask_cmp_ps_mask(lanes, w, _mm512_set1_ps(level), _CMP_GE_OQ);
    const __m512 kept = _mm512_maskz_compress_ps(keep, w);
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(kept)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(kept, 1)));
    _mm512_storeu_ps(out + count, kept);
    count += __builtin_popcount(keep);
  }
  return {count, _mm512_reduce_add_pd(_mm512_add_pd(low, high))};
}

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The weight at which the sum (or the number) of the weights in descending order reaches `wanted`.
// `weights` is used up. Weights are at most 1, so that their bits order them and begin with 00.
float reaching(float* weights, int64_t count, double wanted, bool by_number) {
  double sums[kNumBuckets];
  int32_t numbers[kNumBuckets];
  uint32_t found = 0;
  for (const int shift : kShifts) {
    memset(sums, 0, sizeof sums);
    memset(numbers, 0, sizeof numbers);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bucket = bits_of(weights[i]) >> shift & (kNumBuckets - 1);
      sums[bucket] += by_number ? 1.0 : weights[i];
      ++numbers[bucket];
    }
    // Should rounding keep the sum below what is wanted, the last one that is there takes it.
    uint32_t bucket = 0;
    for (int64_t b = kNumBuckets - 1; b >= 0; --b) {
      if (!numbers[b]) continue;
      bucket = static_cast<uint32_t>(b);
      if (sums[b] >= wanted) break;
      wanted -= sums[b];
    }
    found |= bucket << shift;
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i)
      if ((bits_of(weights[i]) >> shift & (kNumBuckets - 1)) == bucket) weights[left++] = weights[i];
    count = left;
  }
  float weight;
  memcpy(&weight, &found, sizeof weight);
  return weight;
}

// The lowest weight to keep: min-p comes first, then top-k, then top-p over what is left.
float threshold_of(const float* weights, int64_t n, const Filters& filters, float* room) {
  float threshold = filters.min_p;
  if (filters.top_k < n) {
    for (const float level : kLevels) {
      const Kept likely = at_least(weights, n, level, room);
      if (likely.count < filters.top_k) continue;
      const float kth = reaching(room, likely.count, static_cast<double>(filters.top_k), true);
      if (kth > threshold) threshold = kth;
      break;
    }
  }
  if (filters.top_p >= 1.0f) return threshold;
  const double wanted = filters.top_p * at_least(weights, n, threshold, room).sum;
  for (const float level : kLevels) {
    const float lowest = level > threshold ? level : threshold;
    const Kept likely = at_least(weights, n, lowest, room);
    if (likely.sum < wanted && lowest > threshold) continue;
    const float last = reaching(room, likely.count, wanted, false);
    return last > threshold ? last : threshold;
  }
  return threshold;
}

// The token at which the sum of the weights that are kept first exceeds `share` of the total.
int64_t draw(const float* weights, int64_t n, float threshold, double share, double* sums) {
  const int64_t num_chunks = (n + kChunk - 1) / kChunk;
  const __m512 lowest = _mm512_set1_ps(threshold);
  double total = 0.0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t end = chunk + 1 < num_chunks ? (chunk + 1) * kChunk : n;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = chunk * kChunk; i < end; i += 16) {
      const __m512 w = _mm512_maskz_loadu_ps(first_lanes(end - i), weights + i);
      const __mmask16 keep = _mm512_cmp_ps_mask(w, lowest, _CMP_GE_OQ);
      sum = _mm512_mask_add_ps(sum, keep, sum, w);
    }
    total += _mm512_reduce_add_ps(sum);
    sums[chunk] = total;
  }
  const double target = share * total;
  int64_t chunk = 0;
  while (chunk + 1 < num_chunks && sums[chunk] <= target) ++chunk;
  // Rounding may carry the target out of the chunk: its last possible token takes it.
  double reached = chunk ? sums[chunk - 1] : 0.0;
  int64_t token = chunk * kChunk;
  for (int64_t i = chunk * kChunk; i < n && i < (chunk + 1) * kChunk; ++i) {
    if (weights[i] < threshold || weights[i] == 0.0f) continue;
    token = i;
    reached += weights[i];
    if (reached > target) break;
  }
  return token;
}

}  // namespace
}  // namespace fb

// For each row of `logits` (num_rows, n), which is overwritten: a token, and the greatest logit.
// Rows whose greatest logit is not finite get token 0. `top_k` is n for none, `top_p` 1, `min_p` 0;
// `temperature` is above 0; 0 < `shares` < 1.
extern "C" void fb_draw(float* logits, int64_t num_rows, int64_t n, const float* temperature,
                        const int64_t* top_k, const float* top_p, const float* min_p,
                        const double* shares, int64_t* tokens, float* best) {
  const int64_t num_chunks = (n + fb::kChunk - 1) / fb::kChunk;
  fb::parallel_for(num_rows, [&](int64_t row) {
    float* weights = logits + row * n;
    best[row] = fb::highest(weights, n);
    tokens[row] = 0;
    if (!std::isfinite(best[row])) return;
    fb::to_weights(weights, n, best[row], temperature[row]);
    double* sums = static_cast<double*>(fb::scratch(
        fb::Scratch::other, static_cast<size_t>(num_chunks * 8 + (n + 16) * 4)));
    float* room = reinterpret_cast<float*>(sums + num_chunks);
    const fb::Filters filters{top_k[row], top_p[row], min_p[row]};
    const float threshold = fb::threshold_of(weights, n, filters, room);
    tokens[row] = fb::draw(weights, n, threshold, shares[row], sums);
  });
}
