// Sixteen numbers at a time, on whatever vectors the target has: one of AVX-512, two of AVX2, four of NEON.
//
//     MOTLEY_TARGET    instruction sets (flags in build.py)        number    products
//     avx2             AVX2 and FMA                                 fp32      fp32
//     avx512           AVX-512 f, bw, vl, dq                        fp32      fp32
//     avx512bf16       the same and bf16                            bf16      pairs of bf16, sums in fp32
//     amx              the same and tiles (products_amx.h)          bf16      tiles of bf16, sums in fp32
//     neon             NEON of any 64-bit Arm                       fp32      fp32
//     neonbf16         the same and bf16                            bf16      pairs of bf16, sums in fp32
//
// Every source is compiled once a target and reads the same for all: arithmetic is that of the compiler's vector types,
// and only what they cannot say (maximum, transposition, products of bf16) is written for each. All of it has internal
// linkage, and nothing of std:: that is not a constant expression is used: code of one target that the linker shared with
// another would be run by machines that lack its instructions.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define MOTLEY_JOIN(name, dtype, target) name##_##dtype##_##target
#define MOTLEY_NAMED(name, dtype, target) MOTLEY_JOIN(name, dtype, target)
#if defined(MOTLEY_BF16)
#define KERNEL(name) extern "C" __attribute__((visibility("default"))) void MOTLEY_NAMED(name, bf16, MOTLEY_TARGET)
#else
#define KERNEL(name) extern "C" __attribute__((visibility("default"))) void MOTLEY_NAMED(name, fp32, MOTLEY_TARGET)
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int PARTS = 16 / LANES;  // vectors of the machine in sixteen numbers

using bf16 = uint16_t;
// What products are made of: a number of fp32, or a pair of neighbouring bf16, wherever they lie.
typedef uint32_t unit __attribute__((may_alias, aligned(2)));
#if defined(MOTLEY_BF16)
using number = bf16;
#else
using number = float;
#endif
constexpr long DEPTH = sizeof(unit) / sizeof(number);  // numbers of a unit

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

inline long least(long a, long b) { return a < b ? a : b; }
inline long most(long a, long b) { return a > b ? a : b; }
inline long up_to(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

// Sixteen numbers of fp32.
struct vec {
  floats part[PARTS];
};

// Which of sixteen numbers: all bits of a lane, or none.
struct mask {
  ints part[PARTS];
};

template <class F>
INLINE vec each(F f) {  // written out: loops over parts would keep them in memory
  vec y;
  y.part[0] = f(0);
  if constexpr (PARTS > 1) y.part[1] = f(1);
  if constexpr (PARTS > 2) y.part[2] = f(2), y.part[3] = f(3);
  return y;
}

template <class F>
INLINE mask each_mask(F f) {
  mask y;
  y.part[0] = f(0);
  if constexpr (PARTS > 1) y.part[1] = f(1);
  if constexpr (PARTS > 2) y.part[2] = f(2), y.part[3] = f(3);
  return y;
}

INLINE floats all_of(float x) { return floats{} + x; }
INLINE vec splat(float x) {
  return each([&](int) { return all_of(x); });
}
INLINE vec operator+(vec a, vec b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}
INLINE vec operator-(vec a, vec b) {
  return each([&](int i) { return a.part[i] - b.part[i]; });
}
INLINE vec operator*(vec a, vec b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}
INLINE vec operator/(vec a, vec b) {
  return each([&](int i) { return a.part[i] / b.part[i]; });
}
INLINE vec fma(vec a, vec b, vec c) {  // a b + c: the compiler is told to contract (-ffp-contract=fast)
  return each([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
}

INLINE floats larger(floats a, floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return vmaxq_f32(a, b);
#endif
}
INLINE floats smaller(floats a, floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return vminq_f32(a, b);
#endif
}
INLINE vec larger(vec a, vec b) {
  return each([&](int i) { return larger(a.part[i], b.part[i]); });
}
INLINE floats chosen(ints where, floats a, floats b) { return (floats)(((ints)a & where) | ((ints)b & ~where)); }
INLINE vec chosen(mask where, vec a, vec b) {
  return each([&](int i) { return chosen(where.part[i], a.part[i], b.part[i]); });
}

INLINE float sum_of(vec x) {
  floats all = x.part[0];
  for (int i = 1; i < PARTS; ++i) all += x.part[i];
  float lanes[LANES], sum = 0;
  std::memcpy(lanes, &all, sizeof all);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return sum + lanes[0];
}
INLINE float largest_of(vec x) {
  floats all = x.part[0];
  for (int i = 1; i < PARTS; ++i) all = larger(all, x.part[i]);
  float lanes[LANES];
  std::memcpy(lanes, &all, sizeof all);
  for (int i = 1; i < LANES; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

INLINE ints numbered(int first) {  // first, first + 1, …
  ints y;
  for (int i = 0; i < LANES; ++i) y[i] = first + i;
  return y;
}
INLINE mask first_lanes(long count) {
  return each_mask([&](int i) { return numbered(i * LANES) < (ints{} + (int32_t)least(most(count, 0), 16)); });
}
INLINE mask both(mask a, mask b) {
  return each_mask([&](int i) { return a.part[i] & b.part[i]; });
}
INLINE mask equal(const int32_t* from, int32_t to) {
  return each_mask([&](int i) {
    ints x;
    std::memcpy(&x, from + i * LANES, sizeof x);
    return x == (ints{} + to);
  });
}

// Sixteen numbers of either format in memory, at any address.
INLINE floats load_part(const float* from) {
  floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE vec load(const float* from) {
  return each([&](int i) { return load_part(from + i * LANES); });
}
INLINE void store(float* to, vec x) {
  for (int i = 0; i < PARTS; ++i) std::memcpy(to + i * LANES, &x.part[i], sizeof(floats));
}
INLINE vec load(const bf16* from) {
  return each([&](int i) {
    halves x;
    std::memcpy(&x, from + i * LANES, sizeof x);
    return (floats)(__builtin_convertvector(x, uints) << 16);
  });
}
INLINE halves rounded(floats x) {  // to bf16, to the nearest, ties to even
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh(x);
#else
  const uints u = (uints)x;
  const uints near = (u + 0x7fff + ((u >> 16) & 1)) >> 16, not_a_number = (u >> 16) | 64;
  const uints nan = (uints)(x != x);
  return __builtin_convertvector((near & ~nan) | (not_a_number & nan), halves);
#endif
}
INLINE void store_part(float* to, floats x) { std::memcpy(to, &x, sizeof x); }
INLINE void store_part(bf16* to, floats x) {
  const halves y = rounded(x);
  std::memcpy(to, &y, sizeof y);
}
INLINE void store(bf16* to, vec x) {
  for (int i = 0; i < PARTS; ++i) store_part(to + i * LANES, x.part[i]);
}

// 2^x to fp32's precision, for x in -126 … 127 (what lies beyond counts as the bound): the integer part by the exponent,
// the rest by six terms of the series.
INLINE floats power_of_two(floats x) {
  x = smaller(all_of(127.0f), larger(all_of(-126.0f), x));  // in this order: x86 gives the second where one is no number
  const floats whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the nearest integer
  const floats f = x - whole;
  floats y = all_of(1.5403530393e-4f);
  y = y * f + 1.3333558146e-3f;
  y = y * f + 9.6181291076e-3f;
  y = y * f + 5.5504108665e-2f;
  y = y * f + 2.4022650696e-1f;
  y = y * f + 6.9314718056e-1f;
  y = y * f + 1.0f;
  return y * (floats)((__builtin_convertvector(whole, ints) + 127) << 23);
}
INLINE vec exp2(vec x) {
  return each([&](int i) { return power_of_two(x.part[i]); });
}

constexpr float LOG2_E = 1.4426950409f;

INLINE vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exp2(x * splat(-LOG2_E))); }

// Memory of one thread that is asked for again and again: numbers left in it by the last user are garbage.
struct Room {
  void* at = nullptr;
  size_t bytes = 0;
  ~Room() { std::free(at); }
};
template <int which, class T>
T* scratch(size_t count) {
  static thread_local Room room;
  const size_t bytes = up_to(count * sizeof(T) + 64, 64);
  if (room.bytes < bytes) {
    std::free(room.at);
    room.at = std::aligned_alloc(64, bytes);
    if (room.at == nullptr) std::abort();  // as operator new would end the process
    room.bytes = bytes;
  }
  return (T*)room.at;
}

INLINE void copy(number* to, const number* from, long size) {  // short rows in whole sixteens: no call
  for (long j = 0; j < size; j += 16) std::memcpy(to + j, from + j, 16 * sizeof(number));
}

// Rows that lie anywhere are asked for this many rows before they are needed.
constexpr long AHEAD = 6;

INLINE void fetch(const number* row, long size) {
  for (long j = 0; j < size; j += 64 / (long)sizeof(number)) __builtin_prefetch(row + j);
}

}  // namespace
