// Muon's step for many matrices at once, each by one thread: momentum, Newton-Schulz, decay, update.
//
//     m <- m + (g - m)(1 - momentum)       x = g + (m - g) momentum, over its length
//     five times  G = x x^T    x <- a x + (b G + c G G) x      G and its polynomial are symmetric: half is computed
//     w <- w (1 - decay) - rate x
#include "products.h"

namespace {

constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;

// The upper half of a symmetric product, then mirrored: S [m, m].
void multiply_symmetric(long m, long units, Left a, const unit* b, long panel_units, float* s) {
  for (long j = 0, wide; j < m; j += wide) {
    wide = panel_width(m, j);
    multiply(j + wide, wide, units, a, b + j * panel_units, panel_units, s + j, m, false);
  }
  for (long i = 0; i < m; i += 16)
    for (long j = i; j < m; j += 16)
      transpose(
          [&](int r, int part) {
            uints x;
            std::memcpy(&x, s + (i + r) * m + j + part * LANES, sizeof x);
            return x;
          },
          [&](int r, int part, uints x) { std::memcpy(s + (j + r) * m + i + part * LANES, &x, sizeof x); });
}

// x [m, n], m <= n, in place.
void orthogonalize(long m, long n, long iterations, number* x) {
  const long wide = n / DEPTH + APART, high = m / DEPTH + APART;
  unit* columns = scratch<1, unit>(wide * m);  // x^T
  unit* rows = scratch<2, unit>(high * n);     // x, then its Gram matrix
  float* sums = scratch<3, float>(m * most(m, n));
  number* gram = scratch<4, number>(m * m);
  for (long step = 0; step < iterations; ++step) {
    for (long j = 0; j < m; j += 16) pack_right_transposed(columns, m, wide, j, x, n, n, m);
    multiply_symmetric(m, n / DEPTH, rows_of(x, n), columns, wide, sums);
    for (long i = 0; i < m * m; i += 16) store(gram + i, load(sums + i));
    pack_right(rows, m, high, [&](long i) { return gram + i * m; }, m);
    multiply_symmetric(m, m / DEPTH, rows_of(gram, m), rows, high, sums);
    for (long i = 0; i < m * m; i += 16) store(gram + i, fma(splat(C), load(sums + i), splat(B) * load(gram + i)));
    pack_right(rows, n, high, [&](long i) { return x + i * n; }, m);
    multiply(m, n, m / DEPTH, rows_of(gram, m), rows, high, sums, n, false);
    for (long i = 0; i < m * n; i += 16) store(x + i, fma(splat(A), load(x + i), load(sums + i)));
  }
}

}  // namespace

// Matrix i is sizes[2i] x sizes[2i + 1] numbers at gradients[i], momenta[i] (fp32, or bf16 if so told) and weights[i].
KERNEL(muon_step)(long count, const int64_t* sizes, const float* const* gradients, void* const* momenta,
                  float* const* weights, const float* rates, float momentum, float kept, long iterations,
                  long momenta_in_bf16) {
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < count; ++i) {
    const long height = sizes[2 * i], width = sizes[2 * i + 1], numbers = height * width;
    const bool tall = height > width;
    const long m = tall ? width : height, n = tall ? height : width;
    const float* g = gradients[i];
    float* w = weights[i];
    float* ahead = scratch<5, float>(numbers);
    number* x = scratch<6, number>(numbers);
    vec square = splat(0);
    for (long j = 0; j < numbers; j += 16) {
      const vec grad = load(g + j), old = momenta_in_bf16 ? load((bf16*)momenta[i] + j) : load((float*)momenta[i] + j);
      const vec now = fma(grad - old, splat(1 - momentum), old);
      if (momenta_in_bf16)
        store((bf16*)momenta[i] + j, now);
      else
        store((float*)momenta[i] + j, now);
      const vec look = fma(now - grad, splat(momentum), grad);
      store(ahead + j, look);
      square = fma(look, look, square);
    }
    const float by = 1.0f / (std::sqrt(sum_of(square)) + 1e-7f);
    if (tall)
      turn(height, width, ahead, [&](long r, long c, floats v) { store_part(x + r * n + c, v * all_of(by)); });
    else
      for (long j = 0; j < numbers; j += 16) store(x + j, load(ahead + j) * splat(by));
    orthogonalize(m, n, iterations, x);
    const float rate = rates[i];
    if (tall) {
      for (long j = 0; j < numbers; j += 16) store(ahead + j, load(x + j));
      turn(m, n, ahead, [&](long r, long c, floats v) {
        float* to = w + r * width + c;
        store_part(to, load_part(to) * all_of(kept) - v * all_of(rate));
      });
    } else {
      for (long j = 0; j < numbers; j += 16) store(w + j, load(w + j) * splat(kept) - load(x + j) * splat(rate));
    }
  }
}
