// Products of matrices with sums in fp32, for one thread, out of registers and caches.
//
//     C [m, n]  (+)=  A [m, k]  B [k, n]
//
// Operands are read in units of 32 bits along k: a number of fp32, or a pair of bf16, which the instruction multiplies as
// c += a0 b0 + a1 b1.
//
//     A   Left: the units of a row lie side by side in a plain matrix (`rows_of`). Where A is the transpose of what is at
//         hand, fp32 reads the columns of the plain matrix (`columns_of`), bf16 pairs packed in panels of TILE rows,
//         [m/TILE][k/2][TILE]
//     B   in panels of PANEL columns, [n/PANEL][k/DEPTH][PANEL]; with AVX-512 the last one takes 16 more, or is 16 wide if
//         there are no more
//
// A tile of TILE x PANEL sums stays in registers while k passes by. n is a multiple of 16, k of DEPTH, m anything.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE = 8, PANEL = 32;
#elif defined(__AVX2__)
constexpr int TILE = 6, PANEL = 16;  // 12 of 16 registers hold sums
#else
constexpr int TILE = 4, PANEL = 16;  // 16 of 32
#endif
constexpr long APART = 2;  // units left empty behind a panel, where panels would lie a power of two apart: such
                           // addresses compete for the same few places of a cache

// sums + left right, unit by unit.
INLINE floats multiplied(floats sums, uints left, uints right) {
#if !defined(MOTLEY_BF16)
  return sums + (floats)left * (floats)right;
#elif defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
#else
  return vbfdotq_f32(sums, (bfloat16x8_t)left, (bfloat16x8_t)right);
#endif
}

// The left operand: unit p of row r of tile t is at[t * tile + r * row + p * step].
struct Left {
  const unit* at;
  long row, step, tile;
};
inline Left rows_of(const number* matrix, long width) {
  return {(const unit*)matrix, width / DEPTH, 1, TILE * width / DEPTH};
}
inline Left columns_of(const float* matrix, long width) { return {(const unit*)matrix, 1, width, TILE}; }
#if defined(MOTLEY_AMX)
inline Left panels_of(const unit* packed, long units) { return {packed, units, 1, TILE * units}; }  // tiles want rows
#else
inline Left panels_of(const unit* packed, long units) { return {packed, 1, TILE, TILE * units}; }
#endif

template <int rows, int wide>  // in sixteens of columns
__attribute__((noinline)) void multiply_tile(long units, const unit* a, long row, long step, const unit* b, float* c, long width, bool add) {
  floats sums[rows][wide * PARTS];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < wide * PARTS; ++v)
      if (add)
        std::memcpy(&sums[r][v], c + r * width + v * LANES, sizeof(floats));
      else
        sums[r][v] = floats{};
  for (long p = 0; p < units; ++p, a += step, b += 16 * wide) {
    uints right[wide * PARTS];
    for (int v = 0; v < wide * PARTS; ++v) std::memcpy(&right[v], b + v * LANES, sizeof(uints));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const uints left = uints{} + a[r * row];
      for (int v = 0; v < wide * PARTS; ++v) sums[r][v] = multiplied(sums[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < wide * PARTS; ++v) std::memcpy(c + r * width + v * LANES, &sums[r][v], sizeof(floats));
}

// The last tile may have any number of rows: by fours, twos and ones.
template <int wide>
INLINE void multiply_rows(long count, long units, const unit* a, long row, long step, const unit* b, float* c, long width,
                          bool add) {
  if (count >= TILE) return multiply_tile<TILE, wide>(units, a, row, step, b, c, width, add);
  if constexpr (TILE > 4)
    if (count >= 4) {
      multiply_tile<4, wide>(units, a, row, step, b, c, width, add);
      a += 4 * row, c += 4 * width, count -= 4;
    }
  if (count >= 2) {
    multiply_tile<2, wide>(units, a, row, step, b, c, width, add);
    a += 2 * row, c += 2 * width, count -= 2;
  }
  if (count) multiply_tile<1, wide>(units, a, row, step, b, c, width, add);
}

// How wide the panel is that begins at column j.
INLINE long panel_width(long n, long j) { return PANEL > 16 && n - j == PANEL + 16 ? PANEL + 16 : least(PANEL, n - j); }

// C [m, one panel], rows `width` apart.
__attribute__((noinline)) void multiply_panel(long m, long wide, long units, Left a, const unit* b, float* c, long width, bool add) {
  for (long i = 0; i < m; i += TILE) {
    const unit* left = a.at + i / TILE * a.tile;
    if constexpr (PANEL > 16) {
      if (wide == 48) {
        multiply_rows<3>(m - i, units, left, a.row, a.step, b, c + i * width, width, add);
        continue;
      }
      if (wide == 32) {
        multiply_rows<2>(m - i, units, left, a.row, a.step, b, c + i * width, width, add);
        continue;
      }
    }
    multiply_rows<1>(m - i, units, left, a.row, a.step, b, c + i * width, width, add);
  }
}

// Where unit p of columns j … j + 15 of B belongs.
INLINE unit* in_panels(unit* packed, long n, long panel_units, long p, long j) {
  if constexpr (PANEL == 16) return packed + j * panel_units + p * 16;
  const long last = n < PANEL ? 0 : n / PANEL * PANEL - PANEL;  // where the last panel begins, if it is a wide one
  const long first = n % PANEL && j >= last ? last : j / PANEL * PANEL, wide = panel_width(n, first);
  return packed + first * panel_units + p * wide + (j - first);
}

// Sixteen units.
struct units16 {
  uints part[PARTS];
};
INLINE void store(unit* to, units16 x) {
  for (int i = 0; i < PARTS; ++i) std::memcpy(to + i * LANES, &x.part[i], sizeof(uints));
}
INLINE units16 units_of(vec x) {
  units16 y;
  for (int i = 0; i < PARTS; ++i) y.part[i] = (uints)x.part[i];
  return y;
}
struct halves16 {
  halves part[PARTS];
};
INLINE halves16 bits(const bf16* from) {
  halves16 y;
  std::memcpy(y.part, from, sizeof y);
  return y;
}
INLINE halves16 bits(vec x) {
  halves16 y;
  for (int i = 0; i < PARTS; ++i) y.part[i] = rounded(x.part[i]);
  return y;
}
INLINE halves16 bits(const float* from) { return bits(load(from)); }
INLINE units16 paired(halves16 low, halves16 high) {
  units16 y;
  for (int i = 0; i < PARTS; ++i)
    y.part[i] = __builtin_convertvector(low.part[i], uints) | (__builtin_convertvector(high.part[i], uints) << 16);
  return y;
}

// Unit p of sixteen columns of a matrix from column j on; row(i) is where row i begins, those from `count` on are zeros.
template <class Row>
INLINE units16 units_of_columns(long p, long j, const Row& row, long count) {
  if constexpr (DEPTH == 2)
    return paired(bits(row(2 * p) + j), 2 * p + 1 < count ? bits(row(2 * p + 1) + j) : halves16{});
  else
    return units_of(load(row(p) + j));
}

// The rows of a matrix as unit p of B's columns.
template <class Row>
INLINE void pack_right(unit* packed, long n, long panel_units, long p, const Row& row, long count) {
  for (long j = 0; j < n; j += 16) store(in_panels(packed, n, panel_units, p, j), units_of_columns(p, j, row, count));
}

// All `count` rows of a matrix [count, n] as B; `panel_units`: how many a panel has room for.
template <class Row>
INLINE void pack_right(unit* packed, long n, long panel_units, const Row& row, long count) {
  for (long p = 0; p < (count + DEPTH - 1) / DEPTH; ++p) pack_right(packed, n, panel_units, p, row, count);
}

// Units p of rows j … j + 15 of a left operand in panels, of room for `units` units each.
INLINE void put_left(unit* packed, long units, long p, long j, units16 x) {
  unit sixteen[16];
  store(sixteen, x);
#if defined(MOTLEY_AMX)
  for (int i = 0; i < 16; ++i) packed[(j + i) * units + p] = sixteen[i];
#else
  for (int i = 0; i < 16; i += TILE)
    std::memcpy(packed + (j + i) * units + p * TILE, sixteen + i, least(TILE, 16 - i) * sizeof(unit));
#endif
}

// Sixteen by sixteen units change places with their mirror images.
INLINE void transpose_lanes(uints (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
  __m512i z[16];
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      z[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + 2 + h]);
      z[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + 2 + h]);
    }
  for (int i = 0; i < 4; ++i)
    for (int h = 0; h < 2; ++h) {
      y[i + 8 * h] = _mm512_shuffle_i32x4(z[i + 8 * h], z[i + 8 * h + 4], 0x88);
      y[i + 8 * h + 4] = _mm512_shuffle_i32x4(z[i + 8 * h], z[i + 8 * h + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    x[i] = (uints)_mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = (uints)_mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
#elif defined(__AVX2__)
  __m256 y[8], z[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      z[i + 2 * h] = _mm256_shuffle_ps(y[i + h], y[i + 2 + h], 0x44);
      z[i + 2 * h + 1] = _mm256_shuffle_ps(y[i + h], y[i + 2 + h], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = (uints)_mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
    x[i + 4] = (uints)_mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
  }
#else
  const uint32x4x2_t low = vtrnq_u32(x[0], x[1]), high = vtrnq_u32(x[2], x[3]);
  for (int i = 0; i < 2; ++i) {
    x[i] = vcombine_u32(vget_low_u32(low.val[i]), vget_low_u32(high.val[i]));
    x[i + 2] = vcombine_u32(vget_high_u32(low.val[i]), vget_high_u32(high.val[i]));
  }
#endif
}

// get(r, part) gives lanes of row r of a block of 16 x 16 units, put(row, part, lanes) takes those of its transpose.
template <class Get, class Put>
INLINE void transpose(const Get& get, const Put& put) {
  for (int down = 0; down < PARTS; ++down)
    for (int across = 0; across < PARTS; ++across) {
      uints block[LANES];
      for (int r = 0; r < LANES; ++r) block[r] = get(down * LANES + r, across);
      transpose_lanes(block);
      for (int r = 0; r < LANES; ++r) put(across * LANES + r, down, block[r]);
    }
}

// LANES units of a row from number k on; beyond `width` zeros.
INLINE uints units_at(const float* row, long k, long width) {
  uints x{};
#if defined(MOTLEY_BF16)
  bf16 both[2 * LANES] = {};
  for (int i = 0; i < 2 * LANES && k + i < width; i += LANES) store_part(both + i, load_part(row + k + i));
  std::memcpy(&x, both, sizeof x);
#else
  if (k < width) std::memcpy(&x, row + k, sizeof x);
#endif
  return x;
}
INLINE uints units_at(const bf16* row, long k, long width) {
  uints x{};
  if (k + 2 * LANES <= width)
    std::memcpy(&x, row + k, sizeof x);
  else if (k < width)
    std::memcpy(&x, row + k, (width - k) * sizeof(bf16));
  return x;
}

// Rows of a matrix [n, k] become columns of B = its transpose, 16 at a time from row j on; those from `rows` on are zeros.
template <class T>
inline void pack_right_transposed(unit* packed, long n, long panel_units, long j, const T* matrix, long width, long k,
                                  long rows) {
  for (long first = 0; first < k; first += 16 * DEPTH) {
    const long held = (k - first) / DEPTH;
    transpose(
        [&](int r, int part) {
          return j + r < rows ? units_at(matrix + (j + r) * width, first + part * LANES * DEPTH, k) : uints{};
        },
        [&](int p, int part, uints x) {
          if (p < held) std::memcpy(in_panels(packed, n, panel_units, first / DEPTH + p, j) + part * LANES, &x, sizeof x);
        });
  }
}

// Calls put(row, column, numbers) with LANES neighbours of a row at a time for the transpose of a matrix [m, n].
template <class Put>
INLINE void turn(long m, long n, const float* matrix, const Put& put) {
  for (long i = 0; i < m; i += 16)
    for (long j = 0; j < n; j += 16)
      transpose(
          [&](int r, int part) {
            uints x;
            std::memcpy(&x, matrix + (i + r) * n + j + part * LANES, sizeof x);
            return x;
          },
          [&](int r, int part, uints x) { put(j + r, i + part * LANES, (floats)x); });
}

}  // namespace

#if defined(MOTLEY_AMX)
#include "products_amx.h"
#endif

namespace {

// C [m, n], rows `width` apart, from `units` units; `panel_units`: how many each panel of B holds, of which the first one
// taken is `from`.
inline void multiply(long m, long n, long units, Left a, const unit* b, long panel_units, float* c, long width, bool add,
                     long from = 0) {
#if defined(MOTLEY_AMX)
  const Tiles tiles;
#endif
  for (long j = 0, wide; j < n; j += wide) {
    wide = panel_width(n, j);
#if defined(MOTLEY_AMX)
    multiply_panel_by_tiles(m, wide, units, a, b + j * panel_units + from * wide, c + j, width, add);
#else
    multiply_panel(m, wide, units, a, b + j * panel_units + from * wide, c + j, width, add);
#endif
  }
}

}  // namespace

namespace {

// Rows `start` to `start + count` of a matrix, whose row r begins at row(r), as the columns of a left operand [m, count].
// Rows may lie anywhere, so they are fetched before they are needed. For at most `stretch` rows.
template <long stretch, class Row>
inline Left pack_left(const Row& row, long start, long count, long m) {
  constexpr long room = stretch / DEPTH + APART;
  unit* packed = scratch<30, unit>(room * (m + 16));
  const auto here = [&](long r) { return row(start + r); };
  for (long p = 0; p < (count + DEPTH - 1) / DEPTH; ++p) {
    for (long next = DEPTH * p + AHEAD; next < least(DEPTH * (p + 1) + AHEAD, count); ++next) fetch(here(next), m);
    if constexpr (DEPTH == 2)
      for (long j = 0; j < m; j += 16) put_left(packed, room, p, j, units_of_columns(p, j, here, count));
    else
      copy((number*)packed + p * (m + 16), here(p), m);
  }
  return DEPTH == 2 ? panels_of(packed, room) : columns_of((const float*)packed, m + 16);
}

// grad [m, n] (+)= sum over rows of left's row times right's row, `stretch` rows at a time. left and right give where row
// r is.
template <long stretch, class Row1, class Row2>
inline void outer_product(long rows, const Row1& left, long m, const Row2& right, long n, float* grad, bool add) {
  constexpr long room = stretch / DEPTH + APART;
  unit* packed = scratch<31, unit>(room * n);
  for (long start = 0; start < rows; start += stretch) {
    const long count = least(stretch, rows - start), units = (count + DEPTH - 1) / DEPTH;
    const auto here = [&](long r) { return right(start + r); };
    for (long p = 0; p < units; ++p) {
      for (long next = DEPTH * p + AHEAD; next < least(DEPTH * (p + 1) + AHEAD, count); ++next) fetch(here(next), n);
      pack_right(packed, n, room, p, here, count);
    }
    multiply(m, n, units, pack_left<stretch>(left, start, count, m), packed, room, grad, n, add || start > 0);
  }
}

// The same with all of right's rows packed already, in panels of `panel_units`.
template <long stretch, class Row>
inline void outer_product(long rows, const Row& left, long m, const unit* packed, long panel_units, long n, float* grad,
                          bool add) {
  static_assert(stretch % DEPTH == 0);
  for (long start = 0; start < rows; start += stretch) {
    const long count = least(stretch, rows - start), units = (count + DEPTH - 1) / DEPTH;
    multiply(m, n, units, pack_left<stretch>(left, start, count, m), packed, panel_units, grad, n, add || start > 0,
             start / DEPTH);
  }
}

}  // namespace
