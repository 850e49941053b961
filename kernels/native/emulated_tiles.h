// Intel's matrix tiles (AMX) in software, for tests on processors without them: the shapes, the order of sums and the
// flushing of denormals of TDPBF16PS, the zeroing of LDTILECFG, and an abort wherever the processor would fault.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS, LDTILECFG, TILELOADD.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

constexpr int TILES_HELD = 8, TILE_ROWS = 16, TILE_BYTES = 64, TILE_CELLS = 16;

struct alignas(64) TileShapes {  // what LDTILECFG reads
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");

class EmulatedTiles {
 public:
  void configure(const TileShapes& shapes) {
    require(shapes.palette == 1 && shapes.start == 0, "palette 1, start row 0");
    for (int i = 0; i < 16; ++i) {
      const int rows = shapes.rows[i], bytes = shapes.bytes[i];
      require(i < TILES_HELD || (rows == 0 && bytes == 0), "eight tiles");
      require(rows <= TILE_ROWS && bytes <= TILE_BYTES && (rows == 0) == (bytes == 0), "at most 16 rows of 64 bytes");
      if (i < TILES_HELD) tiles_[i] = Tile{rows, bytes, {}};
    }
    configured_ = true;
  }
  void release() {
    configured_ = false;
    for (Tile& tile : tiles_) tile.rows = tile.bytes = 0, std::memset(tile.cells, 0xff, sizeof tile.cells);  // NaN
  }
  void zero(int i) {
    Tile& tile = used(i);
    std::memset(tile.cells, 0, sizeof tile.cells);
  }
  void load(int i, const char* from, int64_t stride) {
    Tile& tile = used(i);
    std::memset(tile.cells, 0, sizeof tile.cells);
    for (int m = 0; m < tile.rows; ++m) std::memcpy(tile.cells[m], from + m * stride, tile.bytes);
  }
  void store(int i, char* to, int64_t stride) {
    const Tile& tile = used(i);
    for (int m = 0; m < tile.rows; ++m) std::memcpy(to + m * stride, tile.cells[m], tile.bytes);
  }
  // Pairs of bf16: sums of first and of second members along the rows of b, those two added, then the cell.
  void dot(int c, int a, int b) {
    Tile& sums = used(c);
    const Tile &left = used(a), &right = used(b);
    require(c != a && c != b && a != b, "three different tiles");
    require(left.rows == sums.rows && right.bytes == sums.bytes && left.bytes == 4 * right.rows, "shapes that fit");
    const int columns = sums.bytes / 4;
    for (int m = 0; m < sums.rows; ++m) {
      float even[TILE_CELLS] = {}, odd[TILE_CELLS] = {};
      for (int k = 0; k < right.rows; ++k)
        for (int n = 0; n < columns; ++n) {
          even[n] = fused(low(left.cells[m][k]), low(right.cells[k][n]), even[n]);
          odd[n] = fused(high(left.cells[m][k]), high(right.cells[k][n]), odd[n]);
        }
      for (int n = 0; n < columns; ++n) {
        const float sum = flushed(even[n] + odd[n]) + flushed(as_float(sums.cells[m][n]));
        const float cell = flushed(sum);
        std::memcpy(&sums.cells[m][n], &cell, sizeof cell);
      }
    }
  }

 private:
  struct Tile {
    int rows, bytes;
    uint32_t cells[TILE_ROWS][TILE_CELLS];
  };
  static float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static constexpr float LEAST = 0x1p-126f;  // normal
  static float flushed(float x) { return std::fabs(x) < LEAST ? std::copysign(0.0f, x) : x; }
  // x * y + sum, rounded once. It is flushed where 24 bits of any exponent would stay below LEAST, not where a denormal
  // rounded up to LEAST: one limit in fp64, which holds a sum that small exactly (16 bits of a product, 24 of a sum).
  static float fused(float x, float y, float sum) {
    const double exact = double(x) * y + sum;
    return std::fabs(exact) < LEAST * (1 - 0x1p-25) ? std::copysign(0.0f, float(exact)) : std::fma(x, y, sum);
  }
  static float low(uint32_t pair) { return flushed(as_float(pair << 16)); }
  static float high(uint32_t pair) { return flushed(as_float(pair & 0xffff0000u)); }
  static void require(bool held, const char* rule) {
    if (held) return;
    std::fprintf(stderr, "emulated matrix tiles: the processor would fault; rule: %s\n", rule);
    std::abort();
  }
  Tile& used(int i) {
    require(configured_ && i < TILES_HELD && tiles_[i].rows > 0, "only tiles that are configured");
    return tiles_[i];
  }

  bool configured_ = false;
  Tile tiles_[TILES_HELD] = {};
};
