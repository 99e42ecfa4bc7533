// A linear map and its gradients in fp32: y = x W^T, dx = dy W, dW = dy^T x.
//
// Where the matrix library leaves much of the chip's peak unused (docs/benchmarks.md), `motley.model.native` takes these.
// bf16 has no such kernel: the library's products of it are as fast.
#include "products.h"

#if !defined(MOTLEY_BF16)

namespace {

constexpr long BLOCK = 64 / TILE * TILE;     // rows at a time: whole tiles
constexpr long STRETCH = 128;                // rows summed into the weight's gradient at a time
constexpr long PART = 4 * STRETCH;           // rows whose sum is made apart, so that there is work for many threads
constexpr long MOST = 1 << 22;               // numbers of all such sums
constexpr long SLICE = 1 << 16;              // numbers of the gradient that one thread sums at a time

}  // namespace

// x [rows, inputs], weight [outputs, inputs], y [rows, outputs].
KERNEL(linear_forward)(long rows, long inputs, long outputs, const float* x, const float* weight, float* y) {
  unit* packed = scratch<0, unit>(inputs * outputs);
#pragma omp parallel for schedule(static)
  for (long j = 0; j < outputs; j += 16)
    pack_right_transposed(packed, outputs, inputs, j, weight, inputs, inputs, outputs);
#pragma omp parallel for schedule(dynamic)
  for (long r = 0; r < rows; r += BLOCK)
    multiply(least(BLOCK, rows - r), outputs, inputs, rows_of(x + r * inputs, inputs), packed, inputs, y + r * outputs,
             outputs, false);
}

// grad_x may be null.
KERNEL(linear_backward)(long rows, long inputs, long outputs, const float* x, const float* weight, const float* grad,
                        float* grad_x, float* grad_weight) {
  if (grad_x) {
    unit* packed = scratch<0, unit>(inputs * outputs);
#pragma omp parallel for schedule(static)
    for (long p = 0; p < outputs; ++p)
      pack_right(packed, inputs, outputs, p, [&](long i) { return weight + i * inputs; }, outputs);
#pragma omp parallel for schedule(dynamic)
    for (long r = 0; r < rows; r += BLOCK)
      multiply(least(BLOCK, rows - r), inputs, outputs, rows_of(grad + r * outputs, outputs), packed, outputs,
               grad_x + r * inputs, inputs, false);
  }
  const long numbers = inputs * outputs;
  const long parts = most(1, least((rows + PART - 1) / PART, MOST / numbers));
  const long part_rows = up_to((rows + parts - 1) / parts, STRETCH);
  const long slice_rows = least(outputs, most(64, SLICE / inputs / 16 * 16));
  const long slices = (outputs + slice_rows - 1) / slice_rows;
  float* sums = scratch<1, float>(parts > 1 ? parts * numbers : 0);
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (long part = 0; part < parts; ++part)
    for (long slice = 0; slice < slices; ++slice) {
      const long first = part * part_rows, count = least(part_rows, rows - first), from = slice * slice_rows;
      const long m = least(slice_rows, outputs - from);
      float* to = (parts > 1 ? sums + part * numbers : grad_weight) + from * inputs;
      if (count <= 0)
        std::memset(to, 0, m * inputs * sizeof(float));
      else
        outer_product<STRETCH>(
            count, [&](long r) { return grad + (first + r) * outputs + from; }, m,
            [&](long r) { return x + (first + r) * inputs; }, inputs, to, false);
    }
  if (parts == 1) return;
#pragma omp parallel for schedule(static)
  for (long j = 0; j < numbers; j += 16) {
    vec sum = load(sums + j);
    for (long part = 1; part < parts; ++part) sum = sum + load(sums + part * numbers + j);
    store(grad_weight + j, sum);
  }
}

#endif
