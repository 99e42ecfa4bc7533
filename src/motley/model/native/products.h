// Products of bf16 matrices with fp32 sums, for one thread, out of the registers and caches of AVX-512 with bf16.
//
//     C [m, n]  (+)=  A [m, k]  B [k, n]
//
// The instruction multiplies pairs: c += a0 b0 + a1 b1, so both operands are read as 32-bit pairs of neighbours along k.
//
//     A   Left: pairs of a row lie side by side in a plain matrix (`rows_of`), or, where A is the transpose of what is
//         at hand, in panels of 8 rows, [m/8][k/2][8] (`pack_left`)
//     B   in panels of 32 columns, [n/32][k/2][32]; the last one takes 16 more, or is 16 wide if there are no more
//
// A tile of 8 x 32 sums stays in 16 registers while k passes by. m is a multiple of 8, n of 16, k of 2: who packs fills
// up with zeros.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;
using pair = uint32_t;

constexpr int TILE = 8, PANEL = 32;
constexpr long APART = 2;  // pairs left empty behind a panel, where panels would lie a power of two apart: such
                           // addresses compete for the same few places of a cache

inline long up_to(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* from) { return widen(_mm256_loadu_si256((const __m256i*)from)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
inline void copy(bf16* to, const bf16* from, long size) {  // short rows: no call
  for (long j = 0; j < size; j += 16) _mm256_storeu_si256((__m256i*)(to + j), _mm256_loadu_si256((const __m256i*)(from + j)));
}
inline __m256i bits(const bf16* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m256i bits(const float* from) { return narrow(_mm512_loadu_ps(from)); }
inline __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// 2^x to fp32's precision: the integer part by the exponent, the rest by six terms of the series.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.5403530393e-4f);
  for (float term : {1.3333558146e-3f, 9.6181291076e-3f, 5.5504108665e-2f, 2.4022650696e-1f, 6.9314718056e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(term));
  return _mm512_scalef_ps(y, whole);
}

constexpr float LOG2_E = 1.4426950409f;

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)))));
}

// Memory of one thread that is asked for again and again: numbers left in it by the last user are garbage.
template <int which, class T>
T* scratch(size_t count) {
  static thread_local std::vector<char> room;
  const size_t bytes = count * sizeof(T) + 64;
  if (room.size() < bytes) room = std::vector<char>(bytes);
  return (T*)(((uintptr_t)room.data() + 63) / 64 * 64);
}

// The left operand: pair p of row r of tile t is at[t * tile + r * row + p * step].
struct Left {
  const pair* at;
  long row, step, tile;
};
inline Left rows_of(const bf16* matrix, long width) { return {(const pair*)matrix, width / 2, 1, TILE * width / 2}; }
inline Left panels_of(const pair* packed, long pairs) { return {packed, 1, TILE, TILE * pairs}; }

template <int wide>  // in vectors of 16 columns
inline void multiply_tile(long pairs, const pair* a, long row, long step, const pair* b, float* c, long width, bool add) {
  __m512 sums[TILE][wide];
  for (int r = 0; r < TILE; ++r)
    for (int v = 0; v < wide; ++v) sums[r][v] = add ? _mm512_loadu_ps(c + r * width + 16 * v) : _mm512_setzero_ps();
  for (long p = 0; p < pairs; ++p, a += step, b += 16 * wide) {
    __m512bh right[wide];
    for (int v = 0; v < wide; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * row]);
      for (int v = 0; v < wide; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < TILE; ++r)
    for (int v = 0; v < wide; ++v) _mm512_storeu_ps(c + r * width + 16 * v, sums[r][v]);
}

// How wide the panel is that begins at column j.
inline long panel_width(long n, long j) { return n - j == PANEL + 16 ? PANEL + 16 : std::min<long>(PANEL, n - j); }

// C [m, n], rows `width` apart, from `pairs` pairs; `panel_pairs`: how many each panel of B holds.
inline void multiply(long m, long n, long pairs, Left a, const pair* b, long panel_pairs, float* c, long width, bool add) {
  for (long j = 0, wide; j < n; j += wide) {
    wide = panel_width(n, j);
    const auto tile = wide == 48 ? multiply_tile<3> : wide == 32 ? multiply_tile<2> : multiply_tile<1>;
    for (long t = 0; t < m / TILE; ++t)
      tile(pairs, a.at + t * a.tile, a.row, a.step, b + j * panel_pairs, c + t * TILE * width + j, width, add);
  }
}

// Where pair p of columns j … j + 15 of B belongs.
inline pair* in_panels(pair* packed, long n, long panel_pairs, long p, long j) {
  const long last = n < PANEL ? 0 : n / PANEL * PANEL - PANEL;  // where the last panel begins, if it is a wide one
  const long first = n % PANEL && j >= last ? last : j / PANEL * PANEL, wide = panel_width(n, first);
  return packed + first * panel_pairs + p * wide + (j - first);
}

// Rows 2p and 2p + 1 of a matrix become pair p of B's columns. high == nullptr: a row of zeros.
template <class T>
inline void pack_right(pair* packed, long n, long panel_pairs, long p, const T* low, const T* high) {
  for (long j = 0; j < n; j += 16)
    _mm512_storeu_si512(in_panels(packed, n, panel_pairs, p, j),
                        paired(bits(low + j), high ? bits(high + j) : _mm256_setzero_si256()));
}

// Rows 2p and 2p + 1 of a matrix [k, m] become pair p of its transpose as a left operand; `pairs`: how many a panel has
// room for.
inline void put_left(pair* packed, long pairs, long p, long j, __m512i both) {
  pair* to = packed + j * pairs + p * TILE;
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)(to + TILE * pairs), _mm512_extracti64x4_epi64(both, 1));
}
inline void pack_left(pair* packed, long m, long pairs, long p, const bf16* low, const bf16* high) {
  for (long j = 0; j < m; j += 16)
    put_left(packed, pairs, p, j, paired(bits(low + j), high ? bits(high + j) : _mm256_setzero_si256()));
}

inline void transpose(__m512i (&x)[16]) {  // 16 x 16 numbers of 32 bits
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      x[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + 2 + h]);
      x[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + 2 + h]);
    }
  for (int i = 0; i < 4; ++i)
    for (int h = 0; h < 2; ++h) {
      y[i + 8 * h] = _mm512_shuffle_i32x4(x[i + 8 * h], x[i + 8 * h + 4], 0x88);
      y[i + 8 * h + 4] = _mm512_shuffle_i32x4(x[i + 8 * h], x[i + 8 * h + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// 32 numbers of a row from column k on as 16 pairs; beyond `width` zeros.
inline __m512i pairs_at(const bf16* row, long k, long width) {
  const long left = (width - k) / 2;
  return _mm512_maskz_loadu_epi32(left >= 16 ? 0xffff : (1u << left) - 1, row + k);
}
inline __m512i pairs_at(const float* row, long k, long width) {
  const __m512 low = _mm512_loadu_ps(row + k);
  const __m512 high = width - k > 16 ? _mm512_loadu_ps(row + k + 16) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Rows of a matrix [n, k] become columns of B = its transpose, 16 at a time from row j on; those from `rows` on are zeros.
template <class T>
inline void pack_right_transposed(pair* packed, long n, long panel_pairs, long j, const T* matrix, long width, long k,
                                  long rows) {
  for (long first = 0; first < k; first += 32) {
    __m512i block[16];
    for (int r = 0; r < 16; ++r)
      block[r] = j + r < rows ? pairs_at(matrix + (j + r) * width, first, k) : _mm512_setzero_si512();
    transpose(block);
    for (long p = 0; p < std::min<long>(16, (k - first) / 2); ++p)
      _mm512_storeu_si512(in_panels(packed, n, panel_pairs, first / 2 + p, j), block[p]);
  }
}

// Calls put(row, column, numbers) with 16 neighbours of a row at a time for the transpose of a matrix [m, n].
template <class Put>
inline void turn(long m, long n, const float* matrix, Put put) {
  for (long i = 0; i < m; i += 16)
    for (long j = 0; j < n; j += 16) {
      __m512i block[16];
      for (int r = 0; r < 16; ++r) block[r] = _mm512_loadu_si512(matrix + (i + r) * n + j);
      transpose(block);
      for (int r = 0; r < 16; ++r) put(j + r, i, _mm512_castsi512_ps(block[r]));
    }
}

// Asks for a row that will be needed soon.
inline void fetch(const bf16* row, long size) {
  for (long j = 0; j < size; j += 32) _mm_prefetch((const char*)(row + j), _MM_HINT_T0);
}

// grad [m, n] (+)= sum over rows of left's row times right's row, `stretch` rows at a time. left and right give where row
// r is; rows may lie anywhere, so they are fetched before they are needed.
template <long stretch, class Row1, class Row2>
inline void outer_product(long rows, Row1 left, long m, Row2 right, long n, float* grad, bool add) {
  constexpr long room = stretch / 2 + APART, ahead = 6;
  pair* a = scratch<30, pair>(room * m);
  pair* b = scratch<31, pair>(room * n);
  for (long start = 0; start < rows; start += stretch) {
    const long count = std::min(stretch, rows - start), pairs = (count + 1) / 2;
    for (long p = 0; p < pairs; ++p) {
      const long r = start + 2 * p;
      const bool two = 2 * p + 1 < count;
      for (long next = r + ahead; next < std::min(r + ahead + 2, rows); ++next) {
        fetch(left(next), m);
        fetch(right(next), n);
      }
      pack_left(a, m, room, p, left(r), two ? left(r + 1) : nullptr);
      pack_right(b, n, room, p, right(r), two ? right(r + 1) : nullptr);
    }
    multiply(m, n, pairs, panels_of(a, room), b, room, grad, n, add || start > 0);
  }
}
