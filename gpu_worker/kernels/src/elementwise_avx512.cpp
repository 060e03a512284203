// What stands between the products of a layer: normalization, residual sums, the gated activation.

#include <immintrin.h>

#include <cmath>

#include "threads.h"
#include "vector_math_avx512.h"

namespace fb {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // a few microseconds

// Calls body(first, last) for ranges of rows that are each worth a task.
template <class Body>
void for_rows(int64_t num_rows, int64_t row_len, Body&& body) {
  const int64_t per_task = row_len >= kElementsPerTask ? 1 : kElementsPerTask / row_len;
  parallel_for((num_rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    body(first, first + per_task < num_rows ? first + per_task : num_rows);
  });
}

// Adds `delta`, unless null, to `row`, and returns the sum of the squares.
float add_and_square(float* row, const float* delta, int64_t n) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 64) {
    for (int v = 0; v < 4; ++v) {
      const int64_t at = i + 16 * v;
      if (at >= n) break;
      const __mmask16 mask = first_lanes(n - at);
      __m512 values = _mm512_maskz_loadu_ps(mask, row + at);
      if (delta != nullptr) {
        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, delta + at));
        _mm512_mask_storeu_ps(row + at, mask, values);
      }
      sums[v] = _mm512_fmadd_ps(values, values, sums[v]);
    }
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

void scale_row(const float* row, const float* weight, float scale, int64_t n, float* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + i), factor);
    const __m512 weights = _mm512_maskz_loadu_ps(mask, weight + i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(values, weights));
  }
}

}  // namespace
}  // namespace fb

// values (num_rows, n), plus `delta` (num_rows, n) unless that is null; what is then in `values`,
// normalized to unit root mean square and multiplied by `weight` (n), goes to `out` (num_rows, n),
// which may be `delta` or, without one, `values`.
extern "C" void fb_rms_norm(float* values, const float* delta, const float* weight, float* out,
                            int64_t num_rows, int64_t n, float eps) {
  fb::for_rows(num_rows, n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* mine = values + row * n;
      const float* added = delta == nullptr ? nullptr : delta + row * n;
      const float squares = fb::add_and_square(mine, added, n);
      const float scale = 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
      fb::scale_row(mine, weight, scale, n, out + row * n);
    }
  });
}
