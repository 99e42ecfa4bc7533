// Muon's step for many matrices at once, each by one thread: momentum, Newton-Schulz in bf16, decay, update.
//
//     m <- m + (g - m)(1 - momentum)       x = g + (m - g) momentum, over its length
//     five times  G = x x^T    x <- a x + (b G + c G G) x      G and its polynomial are symmetric: half is computed
//     w <- w (1 - decay) - rate x
#include "products.h"

#include <cmath>

constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;

// The upper half of a symmetric product, then mirrored: S [m, m].
static void multiply_symmetric(long m, long pairs, Left a, const pair* b, long panel_pairs, float* s) {
  for (long j = 0, wide; j < m; j += wide) {
    wide = panel_width(m, j);
    multiply(j + wide, wide, pairs, a, b + j * panel_pairs, panel_pairs, s + j, m, false);
  }
  for (long i = 0; i < m; i += 16)
    for (long j = i; j < m; j += 16) {
      __m512i block[16];
      for (int r = 0; r < 16; ++r) block[r] = _mm512_loadu_si512(s + (i + r) * m + j);
      transpose(block);
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(s + (j + r) * m + i, block[r]);
    }
}

// x [m, n], m <= n, bf16, in place.
static void orthogonalize(long m, long n, long iterations, bf16* x) {
  pair* columns = scratch<1, pair>((n / 2 + APART) * m);  // x^T
  pair* rows = scratch<2, pair>((m / 2 + APART) * n);     // x, then its Gram matrix
  float* sums = scratch<3, float>(m * std::max(m, n));
  bf16* gram = scratch<4, bf16>(m * m);
  const long wide = n / 2 + APART, high = m / 2 + APART;
  for (long step = 0; step < iterations; ++step) {
    for (long j = 0; j < m; j += 16) pack_right_transposed(columns, m, wide, j, x, n, n, m);
    multiply_symmetric(m, n / 2, rows_of(x, n), columns, wide, sums);
    for (long i = 0; i < m * m; i += 16) store(gram + i, _mm512_loadu_ps(sums + i));
    for (long p = 0; p < m / 2; ++p) pack_right(rows, m, high, p, gram + 2 * p * m, gram + (2 * p + 1) * m);
    multiply_symmetric(m, m / 2, rows_of(gram, m), rows, high, sums);
    for (long i = 0; i < m * m; i += 16)
      store(gram + i, _mm512_fmadd_ps(_mm512_set1_ps(C), _mm512_loadu_ps(sums + i), _mm512_mul_ps(_mm512_set1_ps(B), load(gram + i))));
    for (long p = 0; p < m / 2; ++p) pack_right(rows, n, high, p, x + 2 * p * n, x + (2 * p + 1) * n);
    multiply(m, n, m / 2, rows_of(gram, m), rows, high, sums, n, false);
    for (long i = 0; i < m * n; i += 16) store(x + i, _mm512_fmadd_ps(_mm512_set1_ps(A), load(x + i), _mm512_loadu_ps(sums + i)));
  }
}

// Matrix i is sizes[2i] x sizes[2i + 1] numbers at gradients[i], momenta[i] (fp32, or bf16 if so told) and weights[i].
extern "C" void muon_step(long count, const int64_t* sizes, const float* const* gradients, void* const* momenta,
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
    bf16* x = scratch<6, bf16>(numbers);
    __m512 square = _mm512_setzero_ps();
    for (long j = 0; j < numbers; j += 16) {
      const __m512 grad = _mm512_loadu_ps(g + j);
      const __m512 old = momenta_in_bf16 ? load((bf16*)momenta[i] + j) : _mm512_loadu_ps((float*)momenta[i] + j);
      const __m512 now = _mm512_fmadd_ps(_mm512_sub_ps(grad, old), _mm512_set1_ps(1 - momentum), old);
      if (momenta_in_bf16)
        store((bf16*)momenta[i] + j, now);
      else
        _mm512_storeu_ps((float*)momenta[i] + j, now);
      const __m512 look = _mm512_fmadd_ps(_mm512_sub_ps(now, grad), _mm512_set1_ps(momentum), grad);
      _mm512_storeu_ps(ahead + j, look);
      square = _mm512_fmadd_ps(look, look, square);
    }
    const __m512 by = _mm512_set1_ps(1.0f / (std::sqrt(_mm512_reduce_add_ps(square)) + 1e-7f));
    if (tall)
      turn(height, width, ahead, [&](long r, long c, __m512 v) { store(x + r * n + c, _mm512_mul_ps(v, by)); });
    else
      for (long j = 0; j < numbers; j += 16) store(x + j, _mm512_mul_ps(_mm512_loadu_ps(ahead + j), by));
    orthogonalize(m, n, iterations, x);
    const __m512 keep = _mm512_set1_ps(kept), rate = _mm512_set1_ps(rates[i]);
    const auto learn = [&](float* to, __m512 v) {
      _mm512_storeu_ps(to, _mm512_fnmadd_ps(v, rate, _mm512_mul_ps(_mm512_loadu_ps(to), keep)));
    };
    if (tall) {
      for (long j = 0; j < numbers; j += 16) _mm512_storeu_ps(ahead + j, load(x + j));
      turn(m, n, ahead, [&](long r, long c, __m512 v) { learn(w + r * width + c, v); });
    } else {
      for (long j = 0; j < numbers; j += 16) learn(w + j, load(x + j));
    }
  }
}
