// Summed cross-entropy of a linear head and its gradient. Logits of a few positions live in a core's cache and nowhere else:
//
//     logits = h W^T      loss += log sum exp(logits) - logit of the target
//     slopes = (softmax(logits) - 1 at the target) slope         kept for a group of positions at a time
//              with hints: - (1 - weight) at the target - weight expected
//     dh = slopes W       dW += slopes^T h, slice by slice of the vocabulary
#include "products.h"

namespace {

constexpr long POSITIONS = 32 / TILE * TILE;  // whose logits are held by one thread: whole tiles
constexpr long SLICE = 128;                   // tokens of the vocabulary whose gradient is summed at once
constexpr long STRETCH = 256;                 // positions summed into it at a time

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

// The sum of logits[token] * share over the entries of one sparse row.
float expected(const float* logits, const int32_t* tokens, const float* shares, long count) {
  vec sum = splat(0);
  for (long i = 0; i < count; i += 16) {
    float found[16] = {}, share[16] = {};
    for (long l = 0; l < least(16, count - i); ++l) found[l] = logits[tokens[i + l]], share[l] = shares[i + l];
    sum = fma(load(share), load(found), sum);
  }
  return sum_of(sum);
}

// One row of logits becomes slopes, if they are wanted (the logits are lost). Losses: learned, seen.
void into_slopes(float* logits, long vocab, long position, long target, const Hints& hints, float slope, number* slopes,
                 float* learned, float* seen) {
  vec top = splat(-INFINITY), sum = splat(0);
  for (long j = 0; j < vocab; j += 16) top = larger(top, load(logits + j));
  const float largest = largest_of(top), at_target = logits[target] - largest;
  const long row = position * hints.orders;
  float hinted = 0;  // the mean logit that is expected, above the largest
  if (hints.vocabulary) {
    vec even = splat(0);
    for (long j = 0; j < vocab; j += 16) even = fma(load(hints.vocabulary + j), load(logits + j), even);
    hinted = hints.floor[position] * sum_of(even) - largest;
    for (long o = row; o < row + hints.orders; ++o)
      hinted += hints.factors[o] * expected(logits, hints.tokens + hints.begins[o], hints.shares + hints.begins[o],
                                            hints.ends[o] - hints.begins[o]);
  }
  const vec by = splat(LOG2_E), less = splat(-largest * LOG2_E);
  for (long j = 0; j < vocab; j += 16) {
    const vec e = exp2(fma(load(logits + j), by, less));
    store(logits + j, e);
    sum = sum + e;
  }
  const float total = sum_of(sum), weight = hints.vocabulary ? hints.weight : 0.0f;
  *seen = std::log(total) - at_target;
  *learned = std::log(total) - (1 - weight) * at_target - weight * hinted;
  if (!slopes) return;
  logits[target] -= total * (1 - weight);
  const vec scale = splat(slope / total);
  if (!hints.vocabulary) {
    for (long j = 0; j < vocab; j += 16) store(slopes + j, load(logits + j) * scale);
    return;
  }
  for (long o = row; o < row + hints.orders; ++o) {
    const float share = -total * weight * hints.factors[o];
    for (long i = hints.begins[o]; i < hints.ends[o]; ++i) logits[hints.tokens[i]] += share * hints.shares[i];
  }
  const vec floor = splat(-total * weight * hints.floor[position]);
  for (long j = 0; j < vocab; j += 16) store(slopes + j, fma(floor, load(hints.vocabulary + j), load(logits + j)) * scale);
}

}  // namespace

// group: positions whose slopes are kept at once. learned, seen: fp32 [positions]. grad_hidden and grad_head may be null,
// both.
KERNEL(loss_forward)(long positions, long size, long vocab, long group, const number* hidden, const float* head,
                     const int64_t* targets, long orders, float weight, const float* vocabulary, const int32_t* tokens,
                     const float* shares, const float* floor, const int64_t* begins, const int64_t* ends,
                     const float* factors, float slope, float* learned, float* seen, number* grad_hidden, float* grad_head) {
  const Hints hints{orders, weight, vocabulary, tokens, shares, floor, begins, ends, factors};
  unit* columns = scratch<0, unit>(vocab * size / DEPTH);  // W^T
  unit* rows = scratch<1, unit>(grad_head ? vocab * size / DEPTH : 0);
  number* slopes = scratch<2, number>(grad_head ? group * vocab : 0);
  const long room = up_to(least(group, positions), STRETCH) / DEPTH;
  unit* states = scratch<7, unit>(grad_head ? room * size : 0);  // of a group, as a right operand
#pragma omp parallel for schedule(static)
  for (long j = 0; j < vocab; j += 16) {
    pack_right_transposed(columns, vocab, size / DEPTH, j, head, size, size, vocab);
    if (grad_head)
      for (long p = j / DEPTH; p < (j + 16) / DEPTH; ++p)
        pack_right(rows, size, vocab / DEPTH, p, [&](long i) { return head + i * size; }, vocab);
  }
  for (long first = 0; first < positions; first += group) {
    const long last = least(positions, first + group);
#pragma omp parallel for schedule(dynamic)
    for (long start = first; start < last; start += POSITIONS) {
      const long count = least(POSITIONS, last - start);
      float* logits = scratch<4, float>(POSITIONS * (vocab + 16));
      float* sums = scratch<5, float>(POSITIONS * size);
      multiply(count, vocab, size / DEPTH, rows_of(hidden + start * size, size), columns, size / DEPTH, logits, vocab + 16,
               false);
      number* here = grad_head ? slopes + (start - first) * vocab : nullptr;
      for (long r = 0; r < count; ++r)
        into_slopes(logits + r * (vocab + 16), vocab, start + r, targets[start + r], hints, slope,
                    here ? here + r * vocab : nullptr, learned + start + r, seen + start + r);
      if (!grad_head) continue;
      multiply(count, size, vocab / DEPTH, rows_of(here, vocab), rows, vocab / DEPTH, sums, size, false);
      for (long r = 0; r < count; ++r)
        for (long j = 0; j < size; j += 16) store(grad_hidden + (start + r) * size + j, load(sums + r * size + j));
    }
    if (!grad_head) continue;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < (last - first + DEPTH - 1) / DEPTH; ++p)
      pack_right(states, size, room, p, [&](long r) { return hidden + (first + r) * size; }, last - first);
#pragma omp parallel for schedule(dynamic)
    for (long from = 0; from < vocab; from += SLICE)
      outer_product<STRETCH>(
          last - first, [&](long r) { return slopes + r * vocab + from; }, least(SLICE, vocab - from), states, room, size,
          grad_head + from * size, first > 0);
  }
}
