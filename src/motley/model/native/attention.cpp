// Causal attention of MLA in its expanded form, from what the projections give to what the output projection takes:
// rotation, heads, mask and softmax in one pass. One (row, head) after another, 64 queries at a time:
//
//     forward    S = Q K^T    P = exp(S scale - max)    O = P V / sum P         kept: log of the sums
//     backward   P again      dP = dO V^T               dS = P (dP - dO . O) scale
//                dV += P^T dO     dQ = dS K     dK += dS^T Q
//
// Keys and values of a head stay in a core's cache; probabilities never leave it.
#include "products.h"

namespace {

constexpr long QUERIES = 64, UNITS = QUERIES / DEPTH + APART;

struct Shape {
  long batch, seq, heads, nope, rope, value, latent_width;
  float scale;
  long qk() const { return nope + rope; }
  long held() const { return up_to(seq, QUERIES); }  // keys, filled up with zeros
  long apart() const { return held() + 16; }         // scores of one query from those of the next: not a power of two
};

// Turns by angle (or back): pairs lie side by side, (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).
// cos and sin are fp32, each twice, sin with the sign that its place takes.
INLINE vec turned(vec x, const float* cos, const float* sin, bool back) {
  const vec other = each([&](int i) {
#if defined(__AVX512F__)
    return _mm512_permute_ps(x.part[i], 0xb1);
#elif defined(__AVX2__)
    return _mm256_permute_ps(x.part[i], 0xb1);
#else
    return vrev64q_f32(x.part[i]);
#endif
  });
  const vec twist = other * load(sin), own = x * load(cos);
  return back ? own - twist : own + twist;
}

INLINE float widened(float x) { return x; }
INLINE float widened(bf16 x) {
  const unit bits = (unit)x << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// fp32 [seq, rope] each from [seq, rope / 2].
void spread_angles(const Shape& s, const number* cos, const number* sin, float* cosines, float* sines) {
  for (long i = 0; i < s.seq * s.rope; ++i) {
    cosines[i] = widened(cos[i / 2]);
    sines[i] = i % 2 ? widened(sin[i / 2]) : -widened(sin[i / 2]);
  }
}

// One head's key or query: its own part, then the turned one.
INLINE void assemble(const Shape& s, const number* own, const number* turning, const float* cos, const float* sin, number* to) {
  copy(to, own, s.nope);
  for (long j = 0; j < s.rope; j += 16) store(to + s.nope + j, turned(load(turning + j), cos + j, sin + j, false));
}

struct Inputs {
  const number *q, *kv, *k_rope;
  const float *cos, *sin;
  const int64_t* documents;  // [batch, seq] or nullptr
};

Inputs inputs_of(const Shape& s, const number* q, const number* kv, const number* k_rope, const number* cos,
                 const number* sin, const int64_t* documents) {
  float* cosines = scratch<0, float>(2 * s.seq * s.rope);
  float* sines = cosines + s.seq * s.rope;
  spread_angles(s, cos, sin, cosines, sines);
  return {q, kv, k_rope, cosines, sines, documents};
}

void keys_of(const Shape& s, const Inputs& in, long b, long h, number* keys) {
  for (long t = 0; t < s.seq; ++t)
    assemble(s, in.kv + ((b * s.seq + t) * s.heads + h) * (s.nope + s.value), in.k_rope + (b * s.seq + t) * s.latent_width,
             in.cos + t * s.rope, in.sin + t * s.rope, keys + t * s.qk());
  std::memset(keys + s.seq * s.qk(), 0, (s.held() - s.seq) * s.qk() * sizeof(number));
}

void queries_of(const Shape& s, const Inputs& in, long b, long h, long start, long count, number* queries) {
  for (long r = 0; r < count; ++r) {
    const number* q = in.q + ((b * s.seq + start + r) * s.heads + h) * s.qk();
    assemble(s, q, q + s.nope, in.cos + (start + r) * s.rope, in.sin + (start + r) * s.rope, queries + r * s.qk());
  }
  std::memset(queries + count * s.qk(), 0, (QUERIES - count) * s.qk() * sizeof(number));
}

// The documents of one row, filled up to whole sixteens: both halves of their numbers; nullptr where there are none.
struct Documents {
  const int32_t *low, *high;
  explicit operator bool() const { return low != nullptr; }
};
Documents documents_of(const Shape& s, const Inputs& in, long b) {
  if (in.documents == nullptr) return {nullptr, nullptr};
  int32_t *low = scratch<18, int32_t>(2 * s.held()), *high = low + s.held();
  for (long t = 0; t < s.held(); ++t) {
    const int64_t number_of = in.documents[b * s.seq + least(t, s.seq - 1)];
    low[t] = (int32_t)number_of, high[t] = (int32_t)(number_of >> 32);
  }
  return {low, high};
}

// Which of keys j … j + 15 query t sees.
INLINE mask seen(const Documents& documents, long t, long j) {
  const mask before = first_lanes(t - j + 1);
  if (!documents) return before;
  return both(before, both(equal(documents.low + j, documents.low[t]), equal(documents.high + j, documents.high[t])));
}

}  // namespace

KERNEL(attention_forward)(long batch, long seq, long heads, long nope, long rope, long value, long latent_width, float scale,
                          const number* q, const number* kv, const number* k_rope, const number* cos, const number* sin,
                          const int64_t* documents, number* out, float* logs) {
  const Shape s{batch, seq, heads, nope, rope, value, latent_width, scale};
  const long held = s.held(), apart = s.apart(), width = s.qk();
  const Inputs in = inputs_of(s, q, kv, k_rope, cos, sin, documents);
#pragma omp parallel for schedule(dynamic)
  for (long item = 0; item < batch * heads; ++item) {
    const long b = item / heads, h = item % heads;
    number* keys = scratch<1, number>(held * width);
    unit* keys_right = scratch<2, unit>(held * width / DEPTH);
    unit* values_right = scratch<3, unit>(held * value / DEPTH);
    number* queries = scratch<4, number>(QUERIES * width);
    float* scores = scratch<5, float>(QUERIES * apart);
    number* probabilities = DEPTH == 1 ? (number*)scores : scratch<6, number>(QUERIES * apart);
    float* mixed = scratch<7, float>(QUERIES * value);
    keys_of(s, in, b, h, keys);
    for (long j = 0; j < held; j += 16) pack_right_transposed(keys_right, held, width / DEPTH, j, keys, width, width, held);
    const number* values = kv + (b * seq * heads + h) * (nope + value) + nope;
    pack_right(values_right, value, held / DEPTH, [&](long t) { return values + t * heads * (nope + value); }, seq);
    for (long p = (seq + DEPTH - 1) / DEPTH; p < held / DEPTH; ++p)
      for (long j = 0; j < value; j += 16) store(in_panels(values_right, value, held / DEPTH, p, j), units16{});
    const Documents own = documents_of(s, in, b);
    for (long start = 0; start < seq; start += QUERIES) {
      const long count = least(QUERIES, seq - start), end = start + QUERIES;
      queries_of(s, in, b, h, start, count, queries);
      multiply(count, end, width / DEPTH, rows_of(queries, width), keys_right, width / DEPTH, scores, apart, false);
      float sums[QUERIES], largest[QUERIES];
      for (long r = 0; r < count; ++r) {
        float* row = scores + r * apart;
        number* to = probabilities + r * apart;
        const long t = start + r;
        const long plain = own ? 0 : (t + 1) / 16 * 16;  // keys that are all seen
        vec top = splat(-INFINITY), sum = splat(0);
        long j = 0;
        for (; j < plain; j += 16) top = larger(top, load(row + j));
        for (; j <= t; j += 16) top = larger(top, chosen(seen(own, t, j), load(row + j), splat(-INFINITY)));
        largest[r] = largest_of(top) * scale;
        const vec by = splat(scale * LOG2_E), less = splat(-largest[r] * LOG2_E);
        for (j = 0; j < plain; j += 16) {
          const vec e = exp2(fma(load(row + j), by, less));
          sum = sum + e;
          store(to + j, e);
        }
        for (; j <= t; j += 16) {
          const vec e = chosen(seen(own, t, j), exp2(fma(load(row + j), by, less)), splat(0));
          sum = sum + e;
          store(to + j, e);
        }
        if (j < end) std::memset(to + j, 0, (end - j) * sizeof(number));
        sums[r] = sum_of(sum);
      }
      multiply(count, value, end / DEPTH, rows_of(probabilities, apart), values_right, held / DEPTH, mixed, value, false);
      for (long r = 0; r < count; ++r) {
        const vec by = splat(1.0f / sums[r]);
        number* to = out + ((b * seq + start + r) * heads + h) * value;
        for (long j = 0; j < value; j += 16) store(to + j, load(mixed + r * value + j) * by);
        logs[(b * heads + h) * seq + start + r] = largest[r] + std::log(sums[r]);
      }
    }
  }
}

// grad_rope_by_head: fp32 [batch, heads, seq, rope], room.
KERNEL(attention_backward)(long batch, long seq, long heads, long nope, long rope, long value, long latent_width, float scale,
                           const number* q, const number* kv, const number* k_rope, const number* cos, const number* sin,
                           const int64_t* documents, const number* out, const float* logs, const number* grad,
                           number* grad_q, number* grad_kv, number* grad_k_rope, float* grad_rope_by_head) {
  const Shape s{batch, seq, heads, nope, rope, value, latent_width, scale};
  const long held = s.held(), apart = s.apart(), width = s.qk();
  const Inputs in = inputs_of(s, q, kv, k_rope, cos, sin, documents);
#pragma omp parallel for schedule(dynamic)
  for (long item = 0; item < batch * heads; ++item) {
    const long b = item / heads, h = item % heads;
    number* keys = scratch<1, number>(held * width);
    unit* keys_columns = scratch<2, unit>(held * width / DEPTH);  // K^T
    unit* keys_rows = scratch<3, unit>(held * width / DEPTH);     // K
    unit* values_columns = scratch<4, unit>(held * value / DEPTH);
    number* queries = scratch<6, number>(QUERIES * width);
    unit* queries_right = scratch<7, unit>(QUERIES / DEPTH * width);
    number* upstream = scratch<8, number>(QUERIES * value);
    unit* upstream_right = scratch<9, unit>(QUERIES / DEPTH * value);
    float* scores = scratch<10, float>(QUERIES * apart);  // fp32: then P
    float* grad_p = scratch<11, float>(QUERIES * apart);  // fp32: then dS
    number* grad_s = DEPTH == 1 ? (number*)grad_p : scratch<12, number>(QUERIES * apart);
    unit* p_left = scratch<13, unit>(DEPTH == 1 ? 0 : UNITS * held);
    unit* s_left = scratch<14, unit>(DEPTH == 1 ? 0 : UNITS * held);
    float* grad_queries = scratch<15, float>(QUERIES * width);
    float* grad_keys = scratch<16, float>(held * width);
    float* grad_values = scratch<17, float>(held * value);
    keys_of(s, in, b, h, keys);
    const number* values = kv + (b * seq * heads + h) * (nope + value) + nope;
    for (long j = 0; j < held; j += 16) {
      pack_right_transposed(keys_columns, held, width / DEPTH, j, keys, width, width, held);
      pack_right_transposed(values_columns, held, value / DEPTH, j, values, heads * (nope + value), value, seq);
    }
    pack_right(keys_rows, width, held / DEPTH, [&](long t) { return keys + t * width; }, held);
    std::memset(grad_keys, 0, held * width * sizeof(float));
    std::memset(grad_values, 0, held * value * sizeof(float));
    const Documents own = documents_of(s, in, b);
    for (long start = 0; start < seq; start += QUERIES) {
      const long count = least(QUERIES, seq - start), end = start + QUERIES;
      queries_of(s, in, b, h, start, count, queries);
      float along[QUERIES], log[QUERIES];
      for (long r = 0; r < QUERIES; ++r) {
        along[r] = log[r] = 0;
        if (r >= count) {
          std::memset(upstream + r * value, 0, value * sizeof(number));
          continue;
        }
        const long at = ((b * seq + start + r) * heads + h) * value;
        copy(upstream + r * value, grad + at, value);
        vec sum = splat(0);
        for (long j = 0; j < value; j += 16) sum = fma(load(grad + at + j), load(out + at + j), sum);
        along[r] = sum_of(sum);
        log[r] = logs[(b * heads + h) * seq + start + r] * LOG2_E;
      }
      pack_right(queries_right, width, QUERIES / DEPTH, [&](long r) { return queries + r * width; }, QUERIES);
      pack_right(upstream_right, value, QUERIES / DEPTH, [&](long r) { return upstream + r * value; }, QUERIES);
      multiply(QUERIES, end, width / DEPTH, rows_of(queries, width), keys_columns, width / DEPTH, scores, apart, false);
      multiply(QUERIES, end, value / DEPTH, rows_of(upstream, value), values_columns, value / DEPTH, grad_p, apart, false);
      const vec by = splat(scale), by2 = splat(scale * LOG2_E);
      const auto slopes = [&](long r, long j, vec* p, vec* ds) {
        const long t = start + r;
        *p = exp2(fma(load(scores + r * apart + j), by2, splat(-log[r])));
        if (own || j + 16 > t + 1) *p = chosen(seen(own, t, j), *p, splat(0));
        *ds = *p * by * (load(grad_p + r * apart + j) - splat(along[r]));
      };
      for (long r = 0; r < QUERIES; r += DEPTH)
        for (long j = 0; j < end; j += 16) {
          vec p[DEPTH], ds[DEPTH];
          for (long i = 0; i < DEPTH; ++i)
            if (start + r + i < seq)
              slopes(r + i, j, p + i, ds + i);
            else
              p[i] = ds[i] = splat(0);
          for (long i = 0; i < DEPTH; ++i) store(grad_s + (r + i) * apart + j, ds[i]);
          if (DEPTH == 1) {
            store(scores + r * apart + j, p[0]);
          } else {
            put_left(p_left, UNITS, r / 2, j, paired(bits(p[0]), bits(p[DEPTH - 1])));
            put_left(s_left, UNITS, r / 2, j, paired(bits(ds[0]), bits(ds[DEPTH - 1])));
          }
        }
      const Left p_turned = DEPTH == 1 ? columns_of(scores, apart) : panels_of(p_left, UNITS);
      const Left s_turned = DEPTH == 1 ? columns_of(grad_p, apart) : panels_of(s_left, UNITS);
      multiply(end, value, QUERIES / DEPTH, p_turned, upstream_right, QUERIES / DEPTH, grad_values, value, true);
      multiply(end, width, QUERIES / DEPTH, s_turned, queries_right, QUERIES / DEPTH, grad_keys, width, true);
      multiply(count, width, end / DEPTH, rows_of(grad_s, apart), keys_rows, held / DEPTH, grad_queries, width, false);
      for (long r = 0; r < count; ++r) {
        number* to = grad_q + ((b * seq + start + r) * heads + h) * width;
        const float *from = grad_queries + r * width, *c = in.cos + (start + r) * rope, *n = in.sin + (start + r) * rope;
        for (long j = 0; j < nope; j += 16) store(to + j, load(from + j));
        for (long j = 0; j < rope; j += 16) store(to + nope + j, turned(load(from + nope + j), c + j, n + j, true));
      }
    }
    for (long t = 0; t < seq; ++t) {
      number* to = grad_kv + ((b * seq + t) * heads + h) * (nope + value);
      const float* from = grad_keys + t * width;
      for (long j = 0; j < nope; j += 16) store(to + j, load(from + j));
      for (long j = 0; j < value; j += 16) store(to + nope + j, load(grad_values + t * value + j));
      std::memcpy(grad_rope_by_head + ((b * heads + h) * seq + t) * rope, from + nope, rope * sizeof(float));
    }
  }
#pragma omp parallel for schedule(static)
  for (long row = 0; row < batch * seq; ++row) {
    const long b = row / seq, t = row % seq;
    for (long j = 0; j < rope; j += 16) {
      vec sum = splat(0);
      for (long h = 0; h < heads; ++h) sum = sum + load(grad_rope_by_head + ((b * heads + h) * seq + t) * rope + j);
      store(grad_k_rope + row * rope + j, turned(sum, in.cos + t * rope + j, in.sin + t * rope + j, true));
    }
  }
}
