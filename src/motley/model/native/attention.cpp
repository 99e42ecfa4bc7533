// Causal attention of MLA in its expanded form, from what the projections give to what the output projection takes:
// rotation, heads, mask and softmax in one pass. One (row, head) after another, 64 queries at a time:
//
//     forward    S = Q K^T    P = exp(S scale - max)    O = P V / sum P         kept: log of the sums
//     backward   P again      dP = dO V^T               dS = P (dP - dO . O) scale
//                dV += P^T dO     dQ = dS K     dK += dS^T Q
//
// Keys and values of a head stay in a core's cache; probabilities never leave it.
#include "products.h"

#include <cmath>

constexpr long QUERIES = 64, PAIRS = QUERIES / 2 + APART;

struct Shape {
  long batch, seq, heads, nope, rope, value, latent_width;
  float scale;
  long qk() const { return nope + rope; }
};

// Turns by angle (or back): pairs lie side by side, (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).
// cos and sin are fp32, each twice, sin with the sign that its place takes.
static inline __m512 turned(__m512 x, const float* cos, const float* sin, bool back) {
  const __m512 other = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_loadu_ps(sin));
  const __m512 own = _mm512_mul_ps(x, _mm512_loadu_ps(cos));
  return back ? _mm512_sub_ps(own, other) : _mm512_add_ps(own, other);
}

// fp32 [seq, rope] each from bf16 [seq, rope / 2].
static void spread_angles(const Shape& s, const bf16* cos, const bf16* sin, float* cosines, float* sines) {
  for (long i = 0; i < s.seq * s.rope; ++i) {
    const pair c = (pair)cos[i / 2] << 16, n = (pair)sin[i / 2] << 16;
    std::memcpy(cosines + i, &c, 4);
    std::memcpy(sines + i, &n, 4);
    if (i % 2 == 0) sines[i] = -sines[i];
  }
}

// One head's key or query: its own part, then the turned one.
static inline void assemble(const Shape& s, const bf16* own, const bf16* turning, const float* cos, const float* sin,
                            bf16* to) {
  copy(to, own, s.nope);
  for (long j = 0; j < s.rope; j += 16) store(to + s.nope + j, turned(load(turning + j), cos + j, sin + j, false));
}

struct Inputs {
  const bf16 *q, *kv, *k_rope;
  const float *cos, *sin;
  const int64_t* documents;  // [batch, seq] or nullptr
};

static Inputs inputs_of(const Shape& s, const bf16* q, const bf16* kv, const bf16* k_rope, const bf16* cos, const bf16* sin,
                        const int64_t* documents) {
  float* cosines = scratch<0, float>(2 * s.seq * s.rope);
  float* sines = cosines + s.seq * s.rope;
  spread_angles(s, cos, sin, cosines, sines);
  return {q, kv, k_rope, cosines, sines, documents};
}

static void keys_of(const Shape& s, const Inputs& in, long b, long h, long held, bf16* keys) {
  for (long t = 0; t < s.seq; ++t)
    assemble(s, in.kv + ((b * s.seq + t) * s.heads + h) * (s.nope + s.value), in.k_rope + (b * s.seq + t) * s.latent_width,
             in.cos + t * s.rope, in.sin + t * s.rope, keys + t * s.qk());
  std::memset(keys + s.seq * s.qk(), 0, (held - s.seq) * s.qk() * sizeof(bf16));
}

static void queries_of(const Shape& s, const Inputs& in, long b, long h, long start, long count, bf16* queries) {
  for (long r = 0; r < count; ++r) {
    const bf16* q = in.q + ((b * s.seq + start + r) * s.heads + h) * s.qk();
    assemble(s, q, q + s.nope, in.cos + (start + r) * s.rope, in.sin + (start + r) * s.rope, queries + r * s.qk());
  }
  std::memset(queries + count * s.qk(), 0, (QUERIES - count) * s.qk() * sizeof(bf16));
}

// Which of keys j … j + 15 query t sees.
static inline __mmask16 seen(const int64_t* documents, long t, long j) {
  const long most = t - j + 1;
  __mmask16 mask = most >= 16 ? 0xffff : most <= 0 ? 0 : (1u << most) - 1;
  if (documents == nullptr || mask == 0) return mask;
  const __m512i own = _mm512_set1_epi64(documents[t]);
  const auto same = [&](int at) {
    return _mm512_cmpeq_epi64_mask(own, _mm512_maskz_loadu_epi64((__mmask8)(mask >> at), documents + j + at));
  };
  return mask & (__mmask16)(same(0) | same(8) << 8);
}

extern "C" void attention_forward(long batch, long seq, long heads, long nope, long rope, long value, long latent_width,
                                  float scale, const bf16* q, const bf16* kv, const bf16* k_rope, const bf16* cos,
                                  const bf16* sin, const int64_t* documents, bf16* out, float* logs) {
  const Shape s{batch, seq, heads, nope, rope, value, latent_width, scale};
  const long held = up_to(seq, QUERIES), width = s.qk();
  const Inputs in = inputs_of(s, q, kv, k_rope, cos, sin, documents);
#pragma omp parallel for schedule(dynamic)
  for (long item = 0; item < batch * heads; ++item) {
    const long b = item / heads, h = item % heads;
    bf16* keys = scratch<1, bf16>(held * width);
    pair* keys_right = scratch<2, pair>(held * width / 2);
    pair* values_right = scratch<3, pair>(held / 2 * value);
    bf16* queries = scratch<4, bf16>(QUERIES * width);
    float* scores = scratch<5, float>(QUERIES * held);
    bf16* probabilities = scratch<6, bf16>(QUERIES * held);
    float* mixed = scratch<7, float>(QUERIES * value);
    keys_of(s, in, b, h, held, keys);
    for (long j = 0; j < held; j += 16) pack_right_transposed(keys_right, held, width / 2, j, keys, width, width, held);
    for (long p = 0; p < held / 2; ++p) {
      const bf16* v = kv + ((b * seq + std::min(2 * p, seq - 1)) * heads + h) * (nope + value) + nope;
      pack_right(values_right, value, held / 2, p, v, 2 * p + 1 < seq ? v + heads * (nope + value) : nullptr);
    }
    const int64_t* own = documents ? documents + b * seq : nullptr;
    for (long start = 0; start < seq; start += QUERIES) {
      const long count = std::min(QUERIES, seq - start), end = start + QUERIES;
      queries_of(s, in, b, h, start, count, queries);
      multiply(QUERIES, end, width / 2, rows_of(queries, width), keys_right, width / 2, scores, held, false);
      float sums[QUERIES], largest[QUERIES];
      for (long r = 0; r < QUERIES; ++r) {
        float* row = scores + r * held;
        bf16* to = probabilities + r * held;
        const long t = std::min(start + r, seq - 1);
        const long plain = own ? 0 : (t + 1) / 16 * 16;  // keys that are all seen
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        long j = 0;
        for (; j < plain; j += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(row + j));
        for (; j <= t; j += 16) top = _mm512_mask_max_ps(top, seen(own, t, j), top, _mm512_loadu_ps(row + j));
        largest[r] = _mm512_reduce_max_ps(top) * scale;
        const __m512 by = _mm512_set1_ps(scale * LOG2_E), less = _mm512_set1_ps(largest[r] * LOG2_E);
        for (j = 0; j < plain; j += 16) {
          const __m512 e = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, less));
          sum = _mm512_add_ps(sum, e);
          store(to + j, e);
        }
        for (; j <= t; j += 16) {
          const __m512 e = _mm512_maskz_mov_ps(seen(own, t, j), exp2(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, less)));
          sum = _mm512_add_ps(sum, e);
          store(to + j, e);
        }
        if (j < end) std::memset(to + j, 0, (end - j) * sizeof(bf16));
        sums[r] = _mm512_reduce_add_ps(sum);
      }
      multiply(QUERIES, value, end / 2, rows_of(probabilities, held), values_right, held / 2, mixed, value, false);
      for (long r = 0; r < count; ++r) {
        const __m512 by = _mm512_set1_ps(1.0f / sums[r]);
        bf16* to = out + ((b * seq + start + r) * heads + h) * value;
        for (long j = 0; j < value; j += 16) store(to + j, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * value + j), by));
        logs[(b * heads + h) * seq + start + r] = largest[r] + std::log(sums[r]);
      }
    }
  }
}

// grad_rope_by_head: fp32 [batch, heads, seq, rope], room.
extern "C" void attention_backward(long batch, long seq, long heads, long nope, long rope, long value, long latent_width,
                                   float scale, const bf16* q, const bf16* kv, const bf16* k_rope, const bf16* cos,
                                   const bf16* sin, const int64_t* documents, const bf16* out, const float* logs,
                                   const bf16* grad, bf16* grad_q, bf16* grad_kv, bf16* grad_k_rope,
                                   float* grad_rope_by_head) {
  const Shape s{batch, seq, heads, nope, rope, value, latent_width, scale};
  const long held = up_to(seq, QUERIES), width = s.qk();
  const Inputs in = inputs_of(s, q, kv, k_rope, cos, sin, documents);
#pragma omp parallel for schedule(dynamic)
  for (long item = 0; item < batch * heads; ++item) {
    const long b = item / heads, h = item % heads;
    bf16* keys = scratch<1, bf16>(held * width);
    pair* keys_columns = scratch<2, pair>(held * width / 2);  // K^T
    pair* keys_rows = scratch<3, pair>(held * width / 2);     // K
    pair* values_columns = scratch<4, pair>(held * value / 2);
    bf16* values = scratch<5, bf16>(held * value);
    bf16* queries = scratch<6, bf16>(QUERIES * width);
    pair* queries_right = scratch<7, pair>(QUERIES / 2 * width);
    bf16* upstream = scratch<8, bf16>(QUERIES * value);
    pair* upstream_right = scratch<9, pair>(QUERIES / 2 * value);
    float* scores = scratch<10, float>(QUERIES * held);
    float* grad_p = scratch<11, float>(QUERIES * held);
    bf16* grad_s = scratch<12, bf16>(QUERIES * held);
    pair* p_left = scratch<13, pair>(PAIRS * held);
    pair* s_left = scratch<14, pair>(PAIRS * held);
    float* grad_queries = scratch<15, float>(QUERIES * width);
    float* grad_keys = scratch<16, float>(held * width);
    float* grad_values = scratch<17, float>(held * value);
    keys_of(s, in, b, h, held, keys);
    for (long t = 0; t < held; ++t)
      if (t < seq)
        copy(values + t * value, kv + ((b * seq + t) * heads + h) * (nope + value) + nope, value);
      else
        std::memset(values + t * value, 0, value * sizeof(bf16));
    for (long j = 0; j < held; j += 16) {
      pack_right_transposed(keys_columns, held, width / 2, j, keys, width, width, held);
      pack_right_transposed(values_columns, held, value / 2, j, values, value, value, held);
    }
    for (long p = 0; p < held / 2; ++p)
      pack_right(keys_rows, width, held / 2, p, keys + 2 * p * width, keys + (2 * p + 1) * width);
    std::memset(grad_keys, 0, held * width * sizeof(float));
    std::memset(grad_values, 0, held * value * sizeof(float));
    const int64_t* own = documents ? documents + b * seq : nullptr;
    for (long start = 0; start < seq; start += QUERIES) {
      const long count = std::min(QUERIES, seq - start), end = start + QUERIES;
      queries_of(s, in, b, h, start, count, queries);
      float along[QUERIES], log[QUERIES];
      for (long r = 0; r < QUERIES; ++r) {
        along[r] = log[r] = 0;
        if (r >= count) {
          std::memset(upstream + r * value, 0, value * sizeof(bf16));
          continue;
        }
        const long at = ((b * seq + start + r) * heads + h) * value;
        copy(upstream + r * value, grad + at, value);
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < value; j += 16) sum = _mm512_fmadd_ps(load(grad + at + j), load(out + at + j), sum);
        along[r] = _mm512_reduce_add_ps(sum);
        log[r] = logs[(b * heads + h) * seq + start + r] * LOG2_E;
      }
      for (long p = 0; p < QUERIES / 2; ++p) {
        pack_right(queries_right, width, QUERIES / 2, p, queries + 2 * p * width, queries + (2 * p + 1) * width);
        pack_right(upstream_right, value, QUERIES / 2, p, upstream + 2 * p * value, upstream + (2 * p + 1) * value);
      }
      multiply(QUERIES, end, width / 2, rows_of(queries, width), keys_columns, width / 2, scores, held, false);
      multiply(QUERIES, end, value / 2, rows_of(upstream, value), values_columns, value / 2, grad_p, held, false);
      const __m512 by = _mm512_set1_ps(scale), by2 = _mm512_set1_ps(scale * LOG2_E);
      for (long r = 0; r < QUERIES; r += 2)
        for (long j = 0; j < end; j += 16) {
          __m256i p16[2], s16[2];
          for (long i = 0; i < 2; ++i) {
            const long t = start + r + i;
            const __mmask16 mask = t >= seq ? 0 : (own == nullptr && j + 16 <= t + 1) ? 0xffff : seen(own, t, j);
            const __m512 logarithm = _mm512_fmsub_ps(_mm512_loadu_ps(scores + (r + i) * held + j), by2, _mm512_set1_ps(log[r + i]));
            const __m512 p = _mm512_maskz_mov_ps(mask, exp2(logarithm));
            const __m512 ds = _mm512_sub_ps(_mm512_loadu_ps(grad_p + (r + i) * held + j), _mm512_set1_ps(along[r + i]));
            p16[i] = narrow(p);
            s16[i] = narrow(_mm512_mul_ps(_mm512_mul_ps(p, by), ds));
            _mm256_storeu_si256((__m256i*)(grad_s + (r + i) * held + j), s16[i]);
          }
          put_left(p_left, PAIRS, r / 2, j, paired(p16[0], p16[1]));
          put_left(s_left, PAIRS, r / 2, j, paired(s16[0], s16[1]));
        }
      multiply(end, value, QUERIES / 2, panels_of(p_left, PAIRS), upstream_right, QUERIES / 2, grad_values, value, true);
      multiply(end, width, QUERIES / 2, panels_of(s_left, PAIRS), queries_right, QUERIES / 2, grad_keys, width, true);
      multiply(QUERIES, width, end / 2, rows_of(grad_s, held), keys_rows, held / 2, grad_queries, width, false);
      for (long r = 0; r < count; ++r) {
        bf16* to = grad_q + ((b * seq + start + r) * heads + h) * width;
        const float *from = grad_queries + r * width, *c = in.cos + (start + r) * rope, *n = in.sin + (start + r) * rope;
        for (long j = 0; j < nope; j += 16) store(to + j, _mm512_loadu_ps(from + j));
        for (long j = 0; j < rope; j += 16) store(to + nope + j, turned(_mm512_loadu_ps(from + nope + j), c + j, n + j, true));
      }
    }
    for (long t = 0; t < seq; ++t) {
      bf16* to = grad_kv + ((b * seq + t) * heads + h) * (nope + value);
      const float* from = grad_keys + t * width;
      for (long j = 0; j < nope; j += 16) store(to + j, _mm512_loadu_ps(from + j));
      for (long j = 0; j < value; j += 16) store(to + nope + j, _mm512_loadu_ps(grad_values + t * value + j));
      std::memcpy(grad_rope_by_head + ((b * heads + h) * seq + t) * rope, from + nope, rope * sizeof(float));
    }
  }
#pragma omp parallel for schedule(static)
  for (long row = 0; row < batch * seq; ++row) {
    const long b = row / seq, t = row % seq;
    for (long j = 0; j < rope; j += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (long h = 0; h < heads; ++h)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(grad_rope_by_head + ((b * heads + h) * seq + t) * rope + j));
      store(grad_k_rope + row * rope + j, turned(sum, in.cos + t * rope + j, in.sin + t * rope + j, true));
    }
  }
}
