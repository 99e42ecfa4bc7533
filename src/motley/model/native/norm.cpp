// y = x / rms(x) * weight and its gradient, statistics in fp32, one pass over each row.
#include "simd.h"

constexpr long ROWS = 64;  // whose part of the weight's gradient is summed at once, whoever does it

KERNEL(norm_forward)(long rows, long size, const number* x, long width, const float* weight, float eps, number* y,
                     float* inverse) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < rows; ++r) {
    vec square = splat(0);
    for (long j = 0; j < size; j += 16) {
      const vec v = load(x + r * width + j);
      square = fma(v, v, square);
    }
    inverse[r] = 1.0f / std::sqrt(sum_of(square) / size + eps);
    const vec by = splat(inverse[r]);
    for (long j = 0; j < size; j += 16) store(y + r * size + j, load(x + r * width + j) * by * load(weight + j));
  }
}

// dx = (g w - u mean(g w u)) / rms, u = x / rms; the weight's gradient is the sum of g u.
// parts: fp32 [ceil(rows / 64), size], room.
KERNEL(norm_backward)(long rows, long size, const number* x, long width, const float* weight, const float* inverse,
                      const number* grad, number* grad_x, float* grad_weight, float* parts) {
  const long blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static)
  for (long block = 0; block < blocks; ++block) {
    float* part = parts + block * size;
    std::memset(part, 0, size * sizeof(float));
    for (long r = block * ROWS; r < least(rows, (block + 1) * ROWS); ++r) {
      const number *from = x + r * width, *g = grad + r * size;
      const vec by = splat(inverse[r]);
      vec along = splat(0);
      for (long j = 0; j < size; j += 16) {
        const vec gu = load(g + j) * (load(from + j) * by);
        store(part + j, load(part + j) + gu);
        along = fma(gu, load(weight + j), along);
      }
      const vec mean = splat(-sum_of(along) / size);
      for (long j = 0; j < size; j += 16)
        store(grad_x + r * size + j, fma(load(from + j) * by, mean, load(g + j) * load(weight + j)) * by);
    }
  }
  std::memset(grad_weight, 0, size * sizeof(float));
  for (long block = 0; block < blocks; ++block)
    for (long j = 0; j < size; j += 16)
      store(grad_weight + j, load(grad_weight + j) + load(parts + block * size + j));
}
