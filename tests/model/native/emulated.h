// AVX-512, its products of bf16 and AMX as plain functions, so that the kernels written for them run, and are sanitized, on
// any CPU with AVX2: read before everything else, with `-include`. Only what the kernels use. Semantics after Intel's
// Software Developer's Manual.
#pragma once
#if !defined(MOTLEY_EMULATED)
#define MOTLEY_EMULATED
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#ifdef MOTLEY_BF16
#define __AVX512BF16__ 1
#endif

namespace {
namespace emulated {

#define EMULATED inline __attribute__((always_inline))

template <class To, class From>
EMULATED To as(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
struct floats {
  float at[16];
};
struct units {
  uint32_t at[16];
};
struct halves {
  uint16_t at[16];
};

template <class F>
EMULATED __m512 each(__m512 a, __m512 b, F f) {  // f(x, y) lane by lane
  floats x = as<floats>(a);
  const floats y = as<floats>(b);
  for (int i = 0; i < 16; ++i) x.at[i] = f(x.at[i], y.at[i]);
  return as<__m512>(x);
}
EMULATED __m512 max_ps(__m512 a, __m512 b) {  // the second, where one is no number
  return each(a, b, [](float x, float y) { return x > y ? x : y; });
}
EMULATED __m512 min_ps(__m512 a, __m512 b) {
  return each(a, b, [](float x, float y) { return x < y ? x : y; });
}
EMULATED __m512 permute_ps(__m512 a, int order) {
  const floats x = as<floats>(a);
  floats y;
  for (int i = 0; i < 16; ++i) y.at[i] = x.at[i / 4 * 4 + (order >> 2 * (i % 4) & 3)];
  return as<__m512>(y);
}
// Of each 128 bits, parts of `size` units: those of the lower (or upper) half of a and b in turn.
EMULATED __m512i unpack(__m512i a, __m512i b, int size, bool upper) {
  const units x = as<units>(a), y = as<units>(b);
  units z;
  for (int i = 0; i < 16; ++i) {
    const int part = i % 4 / size, from = i / 4 * 4 + (upper ? 2 : 0) + part / 2 * size + i % size;
    z.at[i] = part % 2 ? y.at[from] : x.at[from];
  }
  return as<__m512i>(z);
}
EMULATED __m512i shuffle_i32x4(__m512i a, __m512i b, int order) {
  const units x = as<units>(a), y = as<units>(b);
  units z;
  for (int i = 0; i < 16; ++i) z.at[i] = (i < 8 ? x : y).at[(order >> i / 4 * 2 & 3) * 4 + i % 4];
  return as<__m512i>(z);
}

EMULATED uint32_t normal(uint32_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }  // denormals are zeros
EMULATED float wide(uint32_t bits) { return as<float>(normal(bits << 16)); }
EMULATED __m256bh cvtneps_pbh(__m512 a) {
  const units x = as<units>(a);
  halves y;
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = normal(x.at[i]);
    const bool number = (u & 0x7fffffff) <= 0x7f800000;
    y.at[i] = (uint16_t)(number ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 64);
  }
  return as<__m256bh>(y);
}
EMULATED float add_pair(float sum, uint32_t a, uint32_t b) {
  sum += wide(a >> 16) * wide(b >> 16);
  sum += wide(a & 0xffff) * wide(b & 0xffff);
  return sum;
}
EMULATED __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  floats z = as<floats>(sums);
  const units x = as<units>(a), y = as<units>(b);
  for (int i = 0; i < 16; ++i) z.at[i] = add_pair(z.at[i], x.at[i], y.at[i]);
  return as<__m512>(z);
}

// Tiles of a thread; all have 16 rows of 64 bytes here, and without a configuration they may not be touched.
struct Tile {
  uint32_t at[16][16];
};
thread_local Tile tiles[8];
thread_local bool configured = false;
inline Tile& tile(int which) {
  if (!configured) __builtin_trap();
  return tiles[which];
}
inline void loadconfig(const void* from) {
  const uint8_t* layout = (const uint8_t*)from;
  for (int t = 0; t < 8; ++t)
    if (layout[0] != 1 || layout[16 + 2 * t] != 64 || layout[17 + 2 * t] != 0 || layout[48 + t] != 16) __builtin_trap();
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int which) { tile(which) = {}; }
inline void loadd(int which, const void* from, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(which).at[r], (const char*)from + r * stride, 64);
}
inline void stored(int which, void* to, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((char*)to + r * stride, tile(which).at[r], 64);
}
inline void dpbf16ps(int sums, int a, int b) {
  Tile& c = tile(sums);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) c.at[m][n] = as<uint32_t>(add_pair(as<float>(c.at[m][n]), tile(a).at[m][k], tile(b).at[k][n]));
}

}  // namespace emulated
}  // namespace

#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_permute_ps
#define _mm512_permute_ps emulated::permute_ps
#define _mm512_unpacklo_epi32(a, b) emulated::unpack(a, b, 1, false)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack(a, b, 1, true)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack(a, b, 2, false)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack(a, b, 2, true)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::loadconfig
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::loadd
#define _tile_stored emulated::stored
#define _tile_dpbf16ps emulated::dpbf16ps
#endif
