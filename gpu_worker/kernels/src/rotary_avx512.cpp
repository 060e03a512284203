// Between the fused projection and attention: normalizing and rotating heads, filling the pages.
//
// Where pages mix keys (cache/key_mixing.py), queries are mixed as well: their products stay.

#include <immintrin.h>

#include <cmath>

#include "hadamard_avx512.h"
#include "page_row_avx512.h"
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
  uint16_t* key_scales;  // null where pages have none
  uint16_t* value_scales;
  const float* query_norm;  // (head_dim), or null
  const float* key_norm;
  float eps;
};

// The greatest power of two, up to 64, that divides head_dim.
int64_t mixed_len(int64_t head_dim) {
  const int64_t len = head_dim & -head_dim;
  return len < 64 ? len : 64;
}

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

// Rotates element i with element i + head_dim / 2; `out` may be `head`.
void rotate(const float* head, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = first_lanes(half - i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i);
    const __m512 s = _mm512_maskz_loadu_ps(mask, sin + i);
    const __m512 first = _mm512_maskz_loadu_ps(mask, head + i);
    const __m512 second = _mm512_maskz_loadu_ps(mask, head + half + i);
    const __m512 rotated = _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s));
    _mm512_mask_storeu_ps(out + i, mask, rotated);
    _mm512_mask_storeu_ps(out + half + i, mask,
                          _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
  }
}

template <class Element>
void rotate_token(const Rotation& r, int64_t token) {
  using Stored = typename Element::Stored;
  const Pages& pages = r.pages;
  const int64_t head_dim = pages.head_dim, half = head_dim / 2, mixed = mixed_len(head_dim);
  // All of the transform's norm, so that keys are sums and nothing else.
  const float query_factor = 1.0f / static_cast<float>(mixed);
  const float* cos = r.cos + token * half;
  const float* sin = r.sin + token * half;
  float* head = r.qkv + token * (r.num_query_heads + 2 * pages.num_kv_heads) * head_dim;
  for (int64_t q = 0; q < r.num_query_heads; ++q, head += head_dim) {
    if (r.query_norm != nullptr) normalize(head, r.query_norm, r.eps, head_dim, head);
    rotate(head, cos, sin, half, head);
    if constexpr (Element::kMixed) hadamard_row(head, head_dim, mixed, query_factor);
  }
  const int64_t block = r.slots[token] / pages.block_size;
  const int64_t slot = r.slots[token] % pages.block_size;
  alignas(64) float rotated[kMaxHeadDim];
  for (int64_t kv = 0; kv < pages.num_kv_heads; ++kv, head += head_dim) {
    const float* source = head;
    if (r.key_norm != nullptr) {
      normalize(head, r.key_norm, r.eps, head_dim, rotated);
      source = rotated;
    }
    rotate(source, cos, sin, half, rotated);
    if constexpr (Element::kMixed) hadamard_row(rotated, head_dim, mixed, 1.0f);
    const int64_t offset = slot_offset(pages, block, kv, slot);
    uint16_t *key_scale = nullptr, *value_scale = nullptr;
    if constexpr (Element::kScaled) {
      const int64_t scale = scale_offset(pages, block, kv, slot);
      key_scale = r.key_scales + scale;
      value_scale = r.value_scales + scale;
    }
    store_row<Element>(rotated, head_dim, static_cast<Stored*>(r.keys) + offset, key_scale);
    store_row<Element>(head + pages.num_kv_heads * head_dim, head_dim,
                       static_cast<Stored*>(r.values) + offset, value_scale);
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
    case fb::kFp8Page: return fb::rotate_tokens<fb::Fp8Element>(*rotation);
    case fb::kInt8Page: return fb::rotate_tokens<fb::Int8Element>(*rotation);
  }
}
