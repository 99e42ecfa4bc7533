// Routed experts: dispatch, gated MLP and combination, block by block of rows in a core's cache. A dense gated MLP is one
// expert for all tokens with weight 1: no weights and no slots are given (nullptr), rows are tokens.
//
//     slots    token * k + choice                       rows    slots sorted by expert
//     forward  X = x[token of row]   G U = X Wgu^T   R = silu(G) U weight   out = R Wd^T     y[token] = sum of its rows' out
//     backward D = dy[token of row] Wd    dG, dU and the weights' gradients from D, G, U     dX = [dG dU] Wgu
//              dWgu = [dG dU]^T X         dWd = dy^T R                                       dx[token] = sum of its rows' dX
//
// G and U are kept in bf16 between the two. What is summed, and in which order, does not depend on who computes.
#include "products.h"

constexpr long BLOCK = 64;       // rows of one expert at a time
constexpr long SLICE = 1 << 16;  // numbers of a weight's gradient at a time
constexpr long STRETCH = 128;    // rows of tokens summed into it at a time
constexpr long AHEAD = 6;        // rows, which lie anywhere, are fetched before they are needed

struct Block {
  long expert, first, count;
};

static inline long token_of(const int32_t* slot_of_row, long row, long k) { return slot_of_row ? slot_of_row[row] / k : row; }

// Rows of one slice of a gradient [m, n]: what fits in a cache, but not so few that packing outweighs multiplying.
static long rows_of_slice(long m, long n) { return std::min(m, std::max<long>(64, SLICE / n / 16 * 16)); }

static std::vector<Block> blocks_of(long experts, const int32_t* starts) {
  std::vector<Block> blocks;
  for (long e = 0; e < experts; ++e)
    for (long r = starts[e]; r < starts[e + 1]; r += BLOCK) blocks.push_back({e, r, std::min<long>(BLOCK, starts[e + 1] - r)});
  return blocks;
}

// Sorts slots by expert: starts [experts + 1], slot_of_row and row_of_slot [slots].
extern "C" void experts_sort(long slots, long experts, const int64_t* chosen, int32_t* starts, int32_t* slot_of_row,
                             int32_t* row_of_slot) {
  std::vector<int32_t> next(experts + 1, 0);
  for (long s = 0; s < slots; ++s) ++next[chosen[s] + 1];
  for (long e = 0; e < experts; ++e) next[e + 1] += next[e];
  std::copy(next.begin(), next.end(), starts);
  for (long s = 0; s < slots; ++s) {
    row_of_slot[s] = next[chosen[s]]++;
    slot_of_row[row_of_slot[s]] = (int32_t)s;
  }
}

// The rows of tokens that a block works on, filled up with zeros.
static void gather(const bf16* x, long size, long k, const int32_t* slot_of_row, const Block& block, long room, bf16* to) {
  const long count = block.count;
  for (long r = 0; r < count; ++r) {
    fetch(x + token_of(slot_of_row, block.first + std::min(r + AHEAD, count - 1), k) * size, size);
    copy(to + r * size, x + token_of(slot_of_row, block.first + r, k) * size, size);
  }
  std::memset(to + count * size, 0, (room - count) * size * sizeof(bf16));
}

// y[token] = sum of its k rows.
static void combine(long tokens, long k, long size, const bf16* rows, const int32_t* row_of_slot, bf16* y) {
#pragma omp parallel for schedule(static)
  for (long t = 0; t < tokens; ++t)
    for (long j = 0; j < size; j += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (long c = 0; c < k; ++c) sum = _mm512_add_ps(sum, load(rows + row_of_slot[t * k + c] * size + j));
      store(y + t * size + j, sum);
    }
}

// The weights of all experts. The rows of gate and up follow each other, of one expert `stride` behind the other's.
struct Weights {
  long inner, hidden;
  const float *gate, *up, *down;
  long stride;
  const float* gate_up_row(long e, long i) const {
    return (i < inner ? gate + i * hidden : up + (i - inner) * hidden) + e * stride;
  }
  const float* down_row(long e, long i) const { return down + (e * hidden + i) * inner; }
};

// Weights [experts, m, n] as right operands: transposed (n is summed over) or as they are (m is). `row` says where. Those
// of experts without rows are left out.
template <class Row>
static void pack_weights(long experts, const int32_t* starts, long m, long n, Row row, bool transposed, pair* packed) {
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (long e = 0; e < experts; ++e)
    for (long j = 0; j < m; j += 16) {
      if (starts[e] == starts[e + 1]) continue;
      const float* from = row(e, j);
      pair* to = packed + e * m * n / 2;
      if (transposed)
        pack_right_transposed(to, m, n / 2, j, from - j * n, n, n, m);
      else
        for (long p = 0; p < 8; ++p) pack_right(to, n, m / 2, j / 2 + p, from + 2 * p * n, from + (2 * p + 1) * n);
    }
}

static void pack_weights(long experts, const int32_t* starts, const Weights& w, bool transposed, pair* first, pair* second) {
  pack_weights(experts, starts, 2 * w.inner, w.hidden, [&](long e, long i) { return w.gate_up_row(e, i); }, transposed, first);
  pack_weights(experts, starts, w.hidden, w.inner, [&](long e, long i) { return w.down_row(e, i); }, transposed, second);
}

// gate_up: bf16 [rows, 2 inner], kept for the backward pass.
extern "C" void experts_forward(long tokens, long k, long experts, long hidden, long inner, const bf16* x,
                                const float* weight_of_slot, const float* gate_proj, const float* up_proj,
                                const float* down_proj, const int32_t* starts, const int32_t* slot_of_row, const int32_t* row_of_slot,
                                bf16* gate_up, bf16* y) {
  pair* first = scratch<0, pair>(experts * inner * hidden);
  pair* second = scratch<1, pair>(experts * inner * hidden / 2);
  bf16* out = slot_of_row ? scratch<2, bf16>(tokens * k * hidden) : y;
  pack_weights(experts, starts, {inner, hidden, gate_proj, up_proj, down_proj, 2 * inner * hidden}, true, first, second);
  const std::vector<Block> blocks = blocks_of(experts, starts);
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    const long room = up_to(block.count, TILE);
    bf16* rows = scratch<3, bf16>(BLOCK * hidden);
    float* sums = scratch<4, float>(BLOCK * std::max(2 * inner, hidden));
    bf16* weighed = scratch<5, bf16>(BLOCK * inner);
    gather(x, hidden, k, slot_of_row, block, room, rows);
    multiply(room, 2 * inner, hidden / 2, rows_of(rows, hidden), first + block.expert * inner * hidden, hidden / 2, sums,
             2 * inner, false);
    for (long r = 0; r < room; ++r) {
      const bool real = r < block.count;
      const __m512 weight = _mm512_set1_ps(!real ? 0.0f : weight_of_slot ? weight_of_slot[slot_of_row[block.first + r]] : 1.0f);
      for (long j = 0; j < inner; j += 16) {
        const __m512 gate = _mm512_loadu_ps(sums + r * 2 * inner + j), up = _mm512_loadu_ps(sums + r * 2 * inner + inner + j);
        if (real) {
          store(gate_up + (block.first + r) * 2 * inner + j, gate);
          store(gate_up + (block.first + r) * 2 * inner + inner + j, up);
        }
        store(weighed + r * inner + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up), weight));
      }
    }
    multiply(room, hidden, inner / 2, rows_of(weighed, inner), second + block.expert * inner * hidden / 2, inner / 2, sums,
             hidden, false);
    for (long r = 0; r < block.count; ++r)
      for (long j = 0; j < hidden; j += 16) store(out + (block.first + r) * hidden + j, _mm512_loadu_ps(sums + r * hidden + j));
  }
  if (slot_of_row) combine(tokens, k, hidden, out, row_of_slot, y);
}

extern "C" void experts_backward(long tokens, long k, long experts, long hidden, long inner, const bf16* x,
                                 const float* weight_of_slot, const float* gate_proj, const float* up_proj,
                                 const float* down_proj, const int32_t* starts, const int32_t* slot_of_row, const int32_t* row_of_slot,
                                 const bf16* gate_up, const bf16* grad_y, bf16* grad_x, float* grad_weight_of_slot,
                                 float* grad_gate_up_proj, float* grad_down_proj) {
  const long rows = tokens * k;
  pair* first = scratch<0, pair>(experts * inner * hidden);
  pair* second = scratch<1, pair>(experts * inner * hidden / 2);
  bf16* grad_rows = slot_of_row ? scratch<2, bf16>(rows * hidden) : grad_x;
  bf16* grad_gate_up = scratch<6, bf16>(rows * 2 * inner);
  bf16* weighed = scratch<7, bf16>(rows * inner);
  pack_weights(experts, starts, {inner, hidden, gate_proj, up_proj, down_proj, 2 * inner * hidden}, false, first, second);
  const std::vector<Block> blocks = blocks_of(experts, starts);
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    const long room = up_to(block.count, TILE);
    bf16* upstream = scratch<3, bf16>(BLOCK * hidden);
    float* sums = scratch<4, float>(BLOCK * std::max(inner, hidden));
    bf16* slopes = scratch<5, bf16>(BLOCK * 2 * inner);
    gather(grad_y, hidden, k, slot_of_row, block, room, upstream);
    multiply(room, inner, hidden / 2, rows_of(upstream, hidden), second + block.expert * inner * hidden / 2, hidden / 2, sums,
             inner, false);
    std::memset(slopes + block.count * 2 * inner, 0, (room - block.count) * 2 * inner * sizeof(bf16));
    for (long r = 0; r < block.count; ++r) {
      const long row = block.first + r;
      const __m512 weight = _mm512_set1_ps(weight_of_slot ? weight_of_slot[slot_of_row[row]] : 1.0f), one = _mm512_set1_ps(1.0f);
      __m512 of_weight = _mm512_setzero_ps();
      for (long j = 0; j < inner; j += 16) {
        const __m512 gate = load(gate_up + row * 2 * inner + j), up = load(gate_up + row * 2 * inner + inner + j);
        const __m512 s = sigmoid(gate), silu = _mm512_mul_ps(gate, s), result = _mm512_mul_ps(silu, up);
        const __m512 plain = _mm512_loadu_ps(sums + r * inner + j), grad = _mm512_mul_ps(plain, weight);
        of_weight = _mm512_fmadd_ps(plain, result, of_weight);
        const __m512 bend = _mm512_mul_ps(s, _mm512_add_ps(one, _mm512_sub_ps(gate, silu)));  // silu's derivative
        store(slopes + r * 2 * inner + j, _mm512_mul_ps(_mm512_mul_ps(grad, up), bend));
        store(slopes + r * 2 * inner + inner + j, _mm512_mul_ps(grad, silu));
        store(weighed + row * inner + j, _mm512_mul_ps(result, weight));
      }
      if (weight_of_slot) grad_weight_of_slot[slot_of_row[row]] = _mm512_reduce_add_ps(of_weight);
    }
    std::memcpy(grad_gate_up + block.first * 2 * inner, slopes, block.count * 2 * inner * sizeof(bf16));
    multiply(room, hidden, inner, rows_of(slopes, 2 * inner), first + block.expert * inner * hidden, inner, sums, hidden, false);
    for (long r = 0; r < block.count; ++r)
      for (long j = 0; j < hidden; j += 16)
        store(grad_rows + (block.first + r) * hidden + j, _mm512_loadu_ps(sums + r * hidden + j));
  }
  if (slot_of_row) combine(tokens, k, hidden, grad_rows, row_of_slot, grad_x);
  const long part = rows_of_slice(2 * inner, hidden), down_part = rows_of_slice(hidden, inner);
  const long slices = (2 * inner + part - 1) / part, down_slices = (hidden + down_part - 1) / down_part;
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (long e = 0; e < experts; ++e)
    for (long slice = 0; slice < slices + down_slices; ++slice) {
      const bool down = slice >= slices;
      const long from = down ? (slice - slices) * down_part : slice * part;
      const long m = down ? std::min(down_part, hidden - from) : std::min(part, 2 * inner - from);
      const long n = down ? inner : hidden, start = starts[e], count = starts[e + 1] - start;
      float* grad = (down ? grad_down_proj + e * hidden * inner : grad_gate_up_proj + e * 2 * inner * hidden) + from * n;
      if (count == 0)
        std::memset(grad, 0, m * n * sizeof(float));
      else if (down)
        outer_product<STRETCH>(
            count, [&](long r) { return grad_y + token_of(slot_of_row, start + r, k) * hidden + from; }, m,
            [&](long r) { return weighed + (start + r) * inner; }, n, grad, false);
      else
        outer_product<STRETCH>(
            count, [&](long r) { return grad_gate_up + (start + r) * 2 * inner + from; }, m,
            [&](long r) { return x + token_of(slot_of_row, start + r, k) * hidden; }, n, grad, false);
    }
}
