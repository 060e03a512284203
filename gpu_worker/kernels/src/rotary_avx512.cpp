// Between the fused projection and attention: normalizing and rotating heads, filling the pages.

#include <immintrin.h>

#include <cmath>

#include "pages.h"
#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // a few microseconds
constexpr int64_t kMaxHeadDim = 256;

struct Rotation {
  fb::Pages pages;
  int64_t num_query_heads;
  float* qkv;             // (num_tokens, query heads + 2 * kv heads, head_dim)
  int64_t num_tokens;
  const float* cos;       // (num_tokens, head_dim / 2)
  const float* sin;
  const int32_t* slots;   // (num_tokens): block * block_size + offset
  void* keys;
  void* values;
  const float* query_norm;  // (head_dim), or null
  const float* key_norm;
  float eps;
};

void normalize(const float* head, const float* weight, float eps, int64_t head_dim, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < head_dim; i += 16) {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(head_dim - i), head + i);
    squares = _mm512_fmadd_ps(values, values, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(head_dim);
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
  for (int64_t i = 0; i < head_dim; i += 16) {
    const __mmask16 mask = first_lanes(head_dim - i);
    const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, head + i), factor);
    const __m512 weights = _mm512_maskz_loadu_ps(mask, weight + i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(values, weights));
  }
}

// Rotates element i with element i + head_dim / 2, and writes both as Element's numbers.
template <class Element>
void rotate(const float* head, const float* cos, const float* sin, int64_t half,
            typename Element::Stored* out) {
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = first_lanes(half - i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i);
    const __m512 s = _mm512_maskz_loadu_ps(mask, sin + i);
    const __m512 first = _mm512_maskz_loadu_ps(mask, head + i);
    const __m512 second = _mm512_maskz_loadu_ps(mask, head + half + i);
    Element::store(out + i, mask, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
    Element::store(out + half + i, mask, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
  }
}

template <class Element>
void rotate_token(const Rotation& r, int64_t token) {
  const Pages& pages = r.pages;
  const int64_t head_dim = pages.head_dim, half = head_dim / 2;
  const float* cos = r.cos + token * half;
  const float* sin = r.sin + token * half;
  float* head = r.qkv + token * (r.num_query_heads + 2 * pages.num_kv_heads) * head_dim;
  for (int64_t q = 0; q < r.num_query_heads; ++q, head += head_dim) {
    if (r.query_norm != nullptr) normalize(head, r.query_norm, r.eps, head_dim, head);
    rotate<Float32Element>(head, cos, sin, half, head);
  }
  const int64_t block = r.slots[token] / pages.block_size;
  const int64_t slot = r.slots[token] % pages.block_size;
  alignas(64) float normalized[kMaxHeadDim];
  for (int64_t kv = 0; kv < pages.num_kv_heads; ++kv, head += head_dim) {
    const int64_t offset = slot_offset(pages, block, kv, slot);
    auto* key = static_cast<typename Element::Stored*>(r.keys) + offset;
    auto* value = static_cast<typename Element::Stored*>(r.values) + offset;
    const float* source = head;
    if (r.key_norm != nullptr) {
      normalize(head, r.key_norm, r.eps, head_dim, normalized);
      source = normalized;
    }
    rotate<Element>(source, cos, sin, half, key);
    const float* new_value = head + pages.num_kv_heads * head_dim;
    for (int64_t i = 0; i < head_dim; i += 16) {
      const __mmask16 mask = first_lanes(head_dim - i);
      Element::store(value + i, mask, _mm512_maskz_loadu_ps(mask, new_value + i));
    }
  }
}

template <class Element>
void rotate_tokens(const Rotation& r) {
  const int64_t row_len = (r.num_query_heads + 2 * r.pages.num_kv_heads) * r.pages.head_dim;
  const int64_t per_task = row_len >= kElementsPerTask ? 1 : kElementsPerTask / row_len;
  parallel_for((r.num_tokens + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    const int64_t last = first + per_task < r.num_tokens ? first + per_task : r.num_tokens;
    for (int64_t token = first; token < last; ++token) rotate_token<Element>(r, token);
  });
}

}  // namespace
}  // namespace fb

// Rotates the queries in place, and writes keys (rotated) and values to their slots in the pages.
// Queries and keys are normalized per head before, where there are weights for it.
extern "C" void fb_rotate_and_store(const fb::Rotation* rotation) {
  switch (rotation->pages.type) {
    case fb::kFloat32Page: return fb::rotate_tokens<fb::Float32Element>(*rotation);
    case fb::kFloat16Page: return fb::rotate_tokens<fb::Float16Element>(*rotation);
    case fb::kBfloat16Page: return fb::rotate_tokens<fb::Bfloat16Element>(*rotation);
  }
}
