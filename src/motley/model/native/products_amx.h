// Products of bf16 by the tiles of AMX: two tiles of 16 rows of A, two of 16 columns of B, four of sums.
//
//     tile    16 rows of 64 bytes: A [16, 16 pairs], B [16 pairs, 16 columns], C [16, 16] in fp32
//
// What does not fill a tile (rows beyond a multiple of 16, pairs beyond one of 16) is computed in registers. Whoever calls
// has asked the system for the tiles once (`torch.cpu._init_amx`).
#pragma once

namespace {

// The configuration of this thread's tiles, from here to the end of the scope: others of the process use them as well.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// `rows` x `columns` tiles of sums (1 or 2 each) from whole tiles of units.
template <int rows, int columns>
INLINE void multiply_tiles(long units, const unit* a, long row, const unit* b, long wide, float* c, long width, bool add) {
  const long c_bytes = width * sizeof(float), a_bytes = row * sizeof(unit), b_bytes = wide * sizeof(unit);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (columns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (rows > 1) _tile_loadd(2, c + 16 * width, c_bytes);
    if constexpr (rows > 1 && columns > 1) _tile_loadd(3, c + 16 * width + 16, c_bytes);
  }
  for (long p = 0; p < units; p += 16, a += 16, b += 16 * wide) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns > 1) {
      _tile_loadd(7, b + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, a + 16 * row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (columns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (rows > 1) _tile_stored(2, c + 16 * width, c_bytes);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, c + 16 * width + 16, c_bytes);
}

inline void multiply_panel_by_tiles(long m, long wide, long units, Left a, const unit* b, float* c, long width, bool add) {
  const long by_tiles = units / 16 * 16, rows = by_tiles ? m / 16 * 16 : 0;
  for (long i = 0; i < rows; i += 32)
    for (long j = 0; j < wide; j += 32) {
      const unit *left = a.at + i * a.row, *right = b + j;
      float* to = c + i * width + j;
      const bool two = rows - i > 16, broad = wide - j > 16;
      if (two && broad) multiply_tiles<2, 2>(by_tiles, left, a.row, right, wide, to, width, add);
      if (two && !broad) multiply_tiles<2, 1>(by_tiles, left, a.row, right, wide, to, width, add);
      if (!two && broad) multiply_tiles<1, 2>(by_tiles, left, a.row, right, wide, to, width, add);
      if (!two && !broad) multiply_tiles<1, 1>(by_tiles, left, a.row, right, wide, to, width, add);
    }
  if (rows && by_tiles < units) {
    const Left rest{a.at + by_tiles, a.row, a.step, a.tile};
    multiply_panel(rows, wide, units - by_tiles, rest, b + by_tiles * wide, c, width, true);
  }
  if (rows < m) {
    const Left rest{a.at + rows * a.row, a.row, a.step, a.tile};
    multiply_panel(m - rows, wide, units, rest, b, c + rows * width, width, add);
  }
}

}  // namespace
