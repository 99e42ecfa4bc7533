// y = x / rms(x) * weight and its gradient, statistics in fp32, one pass over each row.
#include "products.h"

#include <cmath>

constexpr long ROWS = 64;  // whose part of the weight's gradient is summed at once, whoever does it

extern "C" void norm_forward(long rows, long size, const bf16* x, long width, const float* weight, float eps, bf16* y,
                             float* inverse) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < rows; ++r) {
    __m512 square = _mm512_setzero_ps();
    for (long j = 0; j < size; j += 16) {
      const __m512 v = load(x + r * width + j);
      square = _mm512_fmadd_ps(v, v, square);
    }
    inverse[r] = 1.0f / std::sqrt(_mm512_reduce_add_ps(square) / size + eps);
    const __m512 by = _mm512_set1_ps(inverse[r]);
    for (long j = 0; j < size; j += 16)
      store(y + r * size + j, _mm512_mul_ps(_mm512_mul_ps(load(x + r * width + j), by), _mm512_loadu_ps(weight + j)));
  }
}

// dx = (g w - u mean(g w u)) / rms, u = x / rms; the weight's gradient is the sum of g u.
// parts: fp32 [ceil(rows / 64), size], room.
extern "C" void norm_backward(long rows, long size, const bf16* x, long width, const float* weight, const float* inverse,
                              const bf16* grad, bf16* grad_x, float* grad_weight, float* parts) {
  const long blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static)
  for (long block = 0; block < blocks; ++block) {
    float* part = parts + block * size;
    std::memset(part, 0, size * sizeof(float));
    for (long r = block * ROWS; r < std::min(rows, (block + 1) * ROWS); ++r) {
      const bf16 *from = x + r * width, *g = grad + r * size;
      const __m512 by = _mm512_set1_ps(inverse[r]);
      __m512 along = _mm512_setzero_ps();
      for (long j = 0; j < size; j += 16) {
        const __m512 gu = _mm512_mul_ps(load(g + j), _mm512_mul_ps(load(from + j), by));
        _mm512_storeu_ps(part + j, _mm512_add_ps(_mm512_loadu_ps(part + j), gu));
        along = _mm512_fmadd_ps(gu, _mm512_loadu_ps(weight + j), along);
      }
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / size);
      for (long j = 0; j < size; j += 16) {
        const __m512 unit = _mm512_mul_ps(load(from + j), by);
        const __m512 gw = _mm512_mul_ps(load(g + j), _mm512_loadu_ps(weight + j));
        store(grad_x + r * size + j, _mm512_mul_ps(_mm512_fnmadd_ps(unit, mean, gw), by));
      }
    }
  }
  std::memset(grad_weight, 0, size * sizeof(float));
  for (long block = 0; block < blocks; ++block)
    for (long j = 0; j < size; j += 16)
      _mm512_storeu_ps(grad_weight + j, _mm512_add_ps(_mm512_loadu_ps(grad_weight + j), _mm512_loadu_ps(parts + block * size + j)));
}
