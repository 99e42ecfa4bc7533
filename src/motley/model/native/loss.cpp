// Summed cross-entropy of a linear head and its gradient. Logits of a few positions live in a core's cache and nowhere else:
//
//     logits = h W^T      loss += log sum exp(logits) - logit of the target
//     slopes = (softmax(logits) - 1 at the target) slope         kept in bf16 for a group of positions at a time
//              with hints: - (1 - weight) at the target - weight expected
//     dh = slopes W       dW += slopes^T h, slice by slice of the vocabulary
#include "products.h"

#include <cmath>

constexpr long POSITIONS = 32;  // whose logits are held by one thread
constexpr long SLICE = 128;     // tokens of the vocabulary whose gradient is summed at once
constexpr long STRETCH = 256;   // positions summed into it at a time

// What the targets are blended with: for each position a share `floor` of a distribution over the whole vocabulary, and
// sparse rows, `orders` of them, entries `begins` to `ends` of a table. All null: nothing.
struct Hints {
  long orders;
  float weight;
  const float* vocabulary;
  const int32_t* tokens;
  const float *shares, *floor;
  const int64_t *begins, *ends;
  const float* factors;
};

// logits[token] += by * share for the entries of one sparse row, or, with `by` null, the sum of logits[token] * share.
static float along(float* logits, const int32_t* tokens, const float* shares, long count, const float* by) {
  __m512 sum = _mm512_setzero_ps();
  for (long i = 0; i < count; i += 16) {
    const __mmask16 here = count - i < 16 ? (1u << (count - i)) - 1 : 0xffff;
    const __m512i at = _mm512_maskz_loadu_epi32(here, tokens + i);
    const __m512 share = _mm512_maskz_loadu_ps(here, shares + i);
    const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, at, logits, 4);
    if (by)  // tokens of a row are different ones
      _mm512_mask_i32scatter_ps(logits, here, at, _mm512_fmadd_ps(share, _mm512_set1_ps(*by), found), 4);
    else
      sum = _mm512_fmadd_ps(share, found, sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// One row of logits becomes slopes, if they are wanted (the logits are lost). Losses: learned, seen.
static void into_slopes(float* logits, long vocab, long position, long target, const Hints& hints, float slope,
                        bf16* slopes, float* learned, float* seen) {
  __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), even = _mm512_setzero_ps();
  for (long j = 0; j < vocab; j += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(logits + j));
  const float largest = _mm512_reduce_max_ps(top), at_target = logits[target] - largest;
  const long row = position * hints.orders;
  float hinted = 0;  // the mean logit that is expected, above the largest
  if (hints.vocabulary) {
    for (long j = 0; j < vocab; j += 16)
      even = _mm512_fmadd_ps(_mm512_loadu_ps(hints.vocabulary + j), _mm512_loadu_ps(logits + j), even);
    hinted = hints.floor[position] * _mm512_reduce_add_ps(even) - largest;
    for (long o = row; o < row + hints.orders; ++o)
      hinted += hints.factors[o] * along(logits, hints.tokens + hints.begins[o], hints.shares + hints.begins[o],
                                         hints.ends[o] - hints.begins[o], nullptr);
  }
  const __m512 by = _mm512_set1_ps(LOG2_E), less = _mm512_set1_ps(largest * LOG2_E);
  for (long j = 0; j < vocab; j += 16) {
    const __m512 e = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(logits + j), by, less));
    _mm512_storeu_ps(logits + j, e);
    sum = _mm512_add_ps(sum, e);
  }
  const float total = _mm512_reduce_add_ps(sum), weight = hints.vocabulary ? hints.weight : 0.0f;
  *seen = std::log(total) - at_target;
  *learned = std::log(total) - (1 - weight) * at_target - weight * hinted;
  if (!slopes) return;
  logits[target] -= total * (1 - weight);
  const __m512 scale = _mm512_set1_ps(slope / total);
  if (!hints.vocabulary) {
    for (long j = 0; j < vocab; j += 16) store(slopes + j, _mm512_mul_ps(_mm512_loadu_ps(logits + j), scale));
    return;
  }
  for (long o = row; o < row + hints.orders; ++o) {
    const float share = -total * weight * hints.factors[o];
    along(logits, hints.tokens + hints.begins[o], hints.shares + hints.begins[o], hints.ends[o] - hints.begins[o], &share);
  }
  const __m512 floor = _mm512_set1_ps(-total * weight * hints.floor[position]);
  for (long j = 0; j < vocab; j += 16) {
    const __m512 left = _mm512_fmadd_ps(floor, _mm512_loadu_ps(hints.vocabulary + j), _mm512_loadu_ps(logits + j));
    store(slopes + j, _mm512_mul_ps(left, scale));
  }
}

// group: positions whose slopes are kept at once. learned, seen: fp32 [positions]. grad_hidden and grad_head may be null,
// both.
extern "C" void loss_forward(long positions, long size, long vocab, long group, const bf16* hidden, const float* head,
                             const int64_t* targets, long orders, float weight, const float* vocabulary,
                             const int32_t* tokens, const float* shares, const float* floor, const int64_t* begins,
                             const int64_t* ends, const float* factors, float slope, float* learned, float* seen,
                             bf16* grad_hidden, float* grad_head) {
  const Hints hints{orders, weight, vocabulary, tokens, shares, floor, begins, ends, factors};
  pair* columns = scratch<0, pair>(vocab * size / 2);  // W^T
  pair* rows = scratch<1, pair>(grad_head ? vocab * size / 2 : 0);
  bf16* slopes = scratch<2, bf16>(grad_head ? group * vocab : 0);
#pragma omp parallel for schedule(static)
  for (long j = 0; j < vocab; j += 16) {
    pack_right_transposed(columns, vocab, size / 2, j, head, size, size, vocab);
    if (grad_head)
      for (long p = j / 2; p < j / 2 + 8; ++p)
        pack_right(rows, size, vocab / 2, p, head + 2 * p * size, head + (2 * p + 1) * size);
  }
  for (long first = 0; first < positions; first += group) {
    const long last = std::min(positions, first + group);
#pragma omp parallel for schedule(dynamic)
    for (long start = first; start < last; start += POSITIONS) {
      const long count = std::min(POSITIONS, last - start), room = up_to(count, TILE);
      bf16* members = scratch<3, bf16>(POSITIONS * size);
      float* logits = scratch<4, float>(POSITIONS * (vocab + 16));
      float* sums = scratch<5, float>(POSITIONS * size);
      bf16* spare = scratch<6, bf16>(POSITIONS * vocab);
      std::memcpy(members, hidden + start * size, count * size * sizeof(bf16));
      std::memset(members + count * size, 0, (room - count) * size * sizeof(bf16));
      multiply(room, vocab, size / 2, rows_of(members, size), columns, size / 2, logits, vocab + 16, false);
      bf16* here = grad_head ? (room == count ? slopes + (start - first) * vocab : spare) : nullptr;
      for (long r = 0; r < count; ++r)
        into_slopes(logits + r * (vocab + 16), vocab, start + r, targets[start + r], hints, slope,
                    here ? here + r * vocab : nullptr, learned + start + r, seen + start + r);
      if (!grad_head) continue;
      if (here == spare) {
        std::memset(spare + count * vocab, 0, (room - count) * vocab * sizeof(bf16));
        std::memcpy(slopes + (start - first) * vocab, spare, count * vocab * sizeof(bf16));
      }
      multiply(room, size, vocab / 2, rows_of(here, vocab), rows, vocab / 2, sums, size, false);
      for (long r = 0; r < count; ++r)
        for (long j = 0; j < size; j += 16) store(grad_hidden + (start + r) * size + j, _mm512_loadu_ps(sums + r * size + j));
    }
    if (!grad_head) continue;
#pragma omp parallel for schedule(dynamic)
    for (long from = 0; from < vocab; from += SLICE)
      outer_product<STRETCH>(
          last - first, [&](long r) { return slopes + r * vocab + from; }, std::min(SLICE, vocab - from),
          [&](long r) { return hidden + (first + r) * size; }, size, grad_head + from * size, first > 0);
  }
}
