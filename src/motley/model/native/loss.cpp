// Summed cross-entropy of a linear head and its gradient. Logits of a few positions live in a core's cache and nowhere else:
//
//     logits = h W^T      loss += log sum exp(logits) - logit of the target
//     slopes = (softmax(logits) - 1 at the target) slope         kept in bf16 for a group of positions at a time
//     dh = slopes W       dW += slopes^T h, slice by slice of the vocabulary
#include "products.h"

#include <cmath>

constexpr long POSITIONS = 32;  // whose logits are held by one thread
constexpr long SLICE = 128;     // tokens of the vocabulary whose gradient is summed at once
constexpr long STRETCH = 256;   // positions summed into it at a time

// One row of logits becomes slopes, if they are wanted (the logits are lost); returns the loss.
static float into_slopes(float* logits, long vocab, long target, float slope, bf16* slopes) {
  __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (long j = 0; j < vocab; j += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(logits + j));
  const float largest = _mm512_reduce_max_ps(top), at_target = logits[target] - largest;
  const __m512 by = _mm512_set1_ps(LOG2_E), less = _mm512_set1_ps(largest * LOG2_E);
  for (long j = 0; j < vocab; j += 16) {
    const __m512 e = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(logits + j), by, less));
    _mm512_storeu_ps(logits + j, e);
    sum = _mm512_add_ps(sum, e);
  }
  const float total = _mm512_reduce_add_ps(sum);
  if (slopes) {
    logits[target] -= total;
    const __m512 scale = _mm512_set1_ps(slope / total);
    for (long j = 0; j < vocab; j += 16) store(slopes + j, _mm512_mul_ps(_mm512_loadu_ps(logits + j), scale));
  }
  return std::log(total) - at_target;
}

// group: positions whose slopes are kept at once. losses: fp32 [positions]. grad_hidden and grad_head may be null, both.
extern "C" void loss_forward(long positions, long size, long vocab, long group, const bf16* hidden, const float* head,
                             const int64_t* targets, float slope, float* losses, bf16* grad_hidden, float* grad_head) {
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
        losses[start + r] = into_slopes(logits + r * (vocab + 16), vocab, targets[start + r], slope, here ? here + r * vocab : nullptr);
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
