// Routed experts: dispatch, gated MLP and combination, block by block of rows in a core's cache. A dense gated MLP is one
// expert for all tokens with weight 1: no weights and no slots are given (nullptr), rows are tokens.
//
//     slots    token * k + choice                       rows    slots sorted by expert (sort.cpp)
//     forward  X = x[token of row]   G U = X Wgu^T   R = silu(G) U weight   out = R Wd^T     y[token] = sum of its rows' out
//     backward D = dy[token of row] Wd    dG, dU and the weights' gradients from D, G, U     dX = [dG dU] Wgu
//              dWgu = [dG dU]^T X         dWd = dy^T R                                       dx[token] = sum of its rows' dX
//
// G and U are kept between the two. What is summed, and in which order, does not depend on who computes.
#include "products.h"

namespace {

constexpr long BLOCK = 64 / TILE * TILE;  // rows of one expert at a time: whole tiles
constexpr long SLICE = 1 << 16;           // numbers of a weight's gradient at a time
constexpr long STRETCH = 128;             // rows of tokens summed into it at a time

struct Block {
  long expert, first, count;
};

INLINE long token_of(const int32_t* slot_of_row, long row, long k) { return slot_of_row ? slot_of_row[row] / k : row; }

// Rows of one slice of a gradient [m, n]: what fits in a cache, but not so few that packing outweighs multiplying.
long rows_of_slice(long m, long n) { return least(m, most(64, SLICE / n / 16 * 16)); }

struct Blocks {
  const Block* at;
  long count;
};

Blocks blocks_of(long experts, const int32_t* starts) {
  Block* blocks = scratch<20, Block>(experts + starts[experts] / BLOCK + 1);
  long count = 0;
  for (long e = 0; e < experts; ++e)
    for (long r = starts[e]; r < starts[e + 1]; r += BLOCK) blocks[count++] = {e, r, least(BLOCK, starts[e + 1] - r)};
  return {blocks, count};
}

// The rows of tokens that a block works on: copied side by side, or where they are if they lie so.
const number* gather(const number* x, long size, long k, const int32_t* slot_of_row, const Block& block, number* to) {
  if (slot_of_row == nullptr) return x + block.first * size;
  const long count = block.count;
  for (long r = 0; r < count; ++r) {
    fetch(x + token_of(slot_of_row, block.first + least(r + AHEAD, count - 1), k) * size, size);
    copy(to + r * size, x + token_of(slot_of_row, block.first + r, k) * size, size);
  }
  return to;
}

// y[token] = sum of its k rows.
void combine(long tokens, long k, long size, const number* rows, const int32_t* row_of_slot, number* y) {
#pragma omp parallel for schedule(static)
  for (long t = 0; t < tokens; ++t)
    for (long j = 0; j < size; j += 16) {
      vec sum = splat(0);
      for (long c = 0; c < k; ++c) sum = sum + load(rows + row_of_slot[t * k + c] * size + j);
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
void pack_weights(long experts, const int32_t* starts, long m, long n, const Row& row, bool transposed, unit* packed) {
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (long e = 0; e < experts; ++e)
    for (long j = 0; j < m; j += 16) {
      if (starts[e] == starts[e + 1]) continue;
      unit* to = packed + e * m * n / DEPTH;
      if (transposed)
        pack_right_transposed(to, m, n / DEPTH, j, row(e, j) - j * n, n, n, m);
      else
        for (long p = j / DEPTH; p < (j + 16) / DEPTH; ++p)
          pack_right(to, n, m / DEPTH, p, [&](long i) { return row(e, i); }, m);
    }
}

void pack_weights(long experts, const int32_t* starts, const Weights& w, bool transposed, unit* first, unit* second) {
  pack_weights(experts, starts, 2 * w.inner, w.hidden, [&](long e, long i) { return w.gate_up_row(e, i); }, transposed, first);
  pack_weights(experts, starts, w.hidden, w.inner, [&](long e, long i) { return w.down_row(e, i); }, transposed, second);
}

}  // namespace

// gate_up: [rows, 2 inner], kept for the backward pass.
KERNEL(experts_forward)(long tokens, long k, long experts, long hidden, long inner, const number* x,
                        const float* weight_of_slot, const float* gate_proj, const float* up_proj, const float* down_proj,
                        const int32_t* starts, const int32_t* slot_of_row, const int32_t* row_of_slot, number* gate_up,
                        number* y) {
  unit* first = scratch<0, unit>(experts * 2 * inner * hidden / DEPTH);
  unit* second = scratch<1, unit>(experts * inner * hidden / DEPTH);
  number* out = slot_of_row ? scratch<2, number>(tokens * k * hidden) : y;
  pack_weights(experts, starts, {inner, hidden, gate_proj, up_proj, down_proj, 2 * inner * hidden}, true, first, second);
  const Blocks blocks = blocks_of(experts, starts);
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < blocks.count; ++i) {
    const Block& block = blocks.at[i];
    number* room = scratch<3, number>(BLOCK * hidden);
    float* sums = scratch<4, float>(BLOCK * most(2 * inner, hidden));
    number* weighed = scratch<5, number>(BLOCK * inner);
    const number* rows = gather(x, hidden, k, slot_of_row, block, room);
    multiply(block.count, 2 * inner, hidden / DEPTH, rows_of(rows, hidden), first + block.expert * 2 * inner * hidden / DEPTH,
             hidden / DEPTH, sums, 2 * inner, false);
    for (long r = 0; r < block.count; ++r) {
      const vec weight = splat(weight_of_slot ? weight_of_slot[slot_of_row[block.first + r]] : 1.0f);
      number* kept = gate_up + (block.first + r) * 2 * inner;
      for (long j = 0; j < inner; j += 16) {
        const vec gate = load(sums + r * 2 * inner + j), up = load(sums + r * 2 * inner + inner + j);
        store(kept + j, gate);
        store(kept + inner + j, up);
        store(weighed + r * inner + j, gate * sigmoid(gate) * up * weight);
      }
    }
    multiply(block.count, hidden, inner / DEPTH, rows_of(weighed, inner), second + block.expert * inner * hidden / DEPTH,
             inner / DEPTH, sums, hidden, false);
    for (long r = 0; r < block.count; ++r)
      for (long j = 0; j < hidden; j += 16) store(out + (block.first + r) * hidden + j, load(sums + r * hidden + j));
  }
  if (slot_of_row) combine(tokens, k, hidden, out, row_of_slot, y);
}

KERNEL(experts_backward)(long tokens, long k, long experts, long hidden, long inner, const number* x,
                         const float* weight_of_slot, const float* gate_proj, const float* up_proj, const float* down_proj,
                         const int32_t* starts, const int32_t* slot_of_row, const int32_t* row_of_slot,
                         const number* gate_up, const number* grad_y, number* grad_x, float* grad_weight_of_slot,
                         float* grad_gate_up_proj, float* grad_down_proj) {
  const long rows = tokens * k;
  unit* first = scratch<0, unit>(experts * 2 * inner * hidden / DEPTH);
  unit* second = scratch<1, unit>(experts * inner * hidden / DEPTH);
  number* grad_rows = slot_of_row ? scratch<2, number>(rows * hidden) : grad_x;
  number* grad_gate_up = scratch<6, number>(rows * 2 * inner);
  number* weighed = scratch<7, number>(rows * inner);
  pack_weights(experts, starts, {inner, hidden, gate_proj, up_proj, down_proj, 2 * inner * hidden}, false, first, second);
  const Blocks blocks = blocks_of(experts, starts);
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < blocks.count; ++i) {
    const Block& block = blocks.at[i];
    number* room = scratch<3, number>(BLOCK * hidden);
    float* sums = scratch<4, float>(BLOCK * most(inner, hidden));
    number* slopes = grad_gate_up + block.first * 2 * inner;
    const number* upstream = gather(grad_y, hidden, k, slot_of_row, block, room);
    multiply(block.count, inner, hidden / DEPTH, rows_of(upstream, hidden), second + block.expert * inner * hidden / DEPTH,
             hidden / DEPTH, sums, inner, false);
    for (long r = 0; r < block.count; ++r) {
      const long row = block.first + r;
      const number* kept = gate_up + row * 2 * inner;
      const vec weight = splat(weight_of_slot ? weight_of_slot[slot_of_row[row]] : 1.0f), one = splat(1.0f);
      vec of_weight = splat(0);
      for (long j = 0; j < inner; j += 16) {
        const vec gate = load(kept + j), up = load(kept + inner + j);
        const vec s = sigmoid(gate), silu = gate * s, result = silu * up;
        const vec plain = load(sums + r * inner + j), grad = plain * weight;
        of_weight = fma(plain, result, of_weight);
        const vec bend = s * (one + (gate - silu));  // silu's derivative
        store(slopes + r * 2 * inner + j, grad * up * bend);
        store(slopes + r * 2 * inner + inner + j, grad * silu);
        store(weighed + row * inner + j, result * weight);
      }
      if (weight_of_slot) grad_weight_of_slot[slot_of_row[row]] = sum_of(of_weight);
    }
    multiply(block.count, hidden, 2 * inner / DEPTH, rows_of(slopes, 2 * inner),
             first + block.expert * 2 * inner * hidden / DEPTH, 2 * inner / DEPTH, sums, hidden, false);
    for (long r = 0; r < block.count; ++r)
      for (long j = 0; j < hidden; j += 16) store(grad_rows + (block.first + r) * hidden + j, load(sums + r * hidden + j));
  }
  if (slot_of_row) combine(tokens, k, hidden, grad_rows, row_of_slot, grad_x);
  const long part = rows_of_slice(2 * inner, hidden), down_part = rows_of_slice(hidden, inner);
  const long slices = (2 * inner + part - 1) / part, down_slices = (hidden + down_part - 1) / down_part;
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (long e = 0; e < experts; ++e)
    for (long slice = 0; slice < slices + down_slices; ++slice) {
      const bool down = slice >= slices;
      const long from = down ? (slice - slices) * down_part : slice * part;
      const long m = down ? least(down_part, hidden - from) : least(part, 2 * inner - from);
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
