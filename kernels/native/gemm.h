// Products of small matrices, fp32 or bf16 with fp32 sums, whose right side lies packed in panels of PANEL columns, or,
// for a few rows, as it is.
//
// A unit is what one lane multiplies at a time: a float, or two bf16 neighbours along the summed dimension. The left
// side is read in place through two strides, so a row-major matrix needs no copy; a transposed one is packed first.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "tiles.h"
#include "vector.h"

constexpr int WIDE = 2;                  // vectors per panel
constexpr int PANEL = WIDE * LANES;      // columns per panel
// Most rows of a tile: TALL * WIDE sums, the panel and what else the compiler wants fill the registers (32, 32, 16).
#if defined(__AVX512F__)
constexpr int TALL = 12;
#elif defined(__aarch64__)
constexpr int TALL = 10;
#else
constexpr int TALL = 6;
#endif
constexpr int64_t DEEP = 256;            // summed elements per pass: a panel of them stays in the first cache

template <class T>
struct UnitOf;
template <>
struct UnitOf<float> {
  typedef float type;
  static constexpr int depth = 1;
};
template <>
struct UnitOf<bf16> {
  typedef uint32_t type __attribute__((aligned(2), may_alias));
  static constexpr int depth = 2;
};
template <class T>
using Unit = typename UnitOf<T>::type;
template <class T>
constexpr int depth_of = UnitOf<T>::depth;
template <class T>
inline int64_t units_of(int64_t count) {
  return (count + depth_of<T> - 1) / depth_of<T>;
}
inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }
template <class T>
inline size_t packed_size(int64_t summed, int64_t columns) {
  return units_of<T>(summed) * panels_of(columns) * PANEL;
}

// Left side: unit k of row m lies at data[m * row + k * step].
template <class T>
struct Left {
  const Unit<T>* data;
  int64_t row, step;
};
template <class T>
inline Left<T> rows_of(const T* data, int64_t leading) {  // row-major with an even leading dimension for bf16
  return {reinterpret_cast<const Unit<T>*>(data), leading / depth_of<T>, 1};
}

// out[rows, columns] (+)= left * panel for at most PANEL columns; compiled once, in gemm.cpp.
template <class T, class O>
void strip(int64_t rows, int64_t summed, Left<T> left, const Unit<T>* panel, O* out, int64_t leading, int64_t columns,
           bool add);
// The same; meanwhile as many bytes as the panel has are asked for at `next`, one after the other.
template <class T>
void strip_asking(int64_t rows, int64_t summed, Left<T> left, const Unit<T>* panel, T* out, int64_t leading,
                  int64_t columns, const void* next);
// out[rows, columns] = left * packed past the caches (with AVX-512 bf16), whole rows one after the other. `out` and its
// rows begin with whole lines, columns fill whole panels, the units of a row of the left side lie `step` apart.
template <class T>
void strips_outward(int64_t rows, int64_t columns, int64_t summed, const Unit<T>* left, int64_t step,
                    const Unit<T>* packed, T* out);
// out[rows, PANEL] = left * PANEL columns of a row-major right side, read where they lie; asks as strip_asking does.
template <class T, class O>
void strip_in_place(int64_t rows, int64_t summed, Left<T> left, const T* right, int64_t right_leading, O* out,
                    int64_t leading, const void* next);

// Whether products of T take the matrix tiles: their left side must then be row-major (step 1).
template <class T>
inline bool takes_tiles() {
  if constexpr (TILES && std::is_same<T, bf16>::value) return tiles_run;
  return false;
}

// multiply() by matrix tiles; compiled once, in tiles.cpp.
template <class O>
void multiply_tiles(int64_t rows, int64_t columns, int64_t units, Left<bf16> left, const Unit<bf16>* packed,
                    int64_t stride, O* out, int64_t leading, bool add);

// out[rows, columns] (+)= left[rows, summed] * packed[summed, columns]; `stride`: units between two panels.
template <class T, class O>
void multiply(int64_t rows, int64_t columns, int64_t summed, Left<T> left, const Unit<T>* packed, int64_t stride,
              O* out, int64_t leading, bool add) {
  if constexpr (TILES && std::is_same<T, bf16>::value)
    if (tiles_run)
      return multiply_tiles<O>(rows, columns, units_of<T>(summed), left, packed, stride, out, leading, add);
  for (int64_t j = 0; j < columns; j += PANEL)
    strip<T, O>(rows, summed, left, packed + j / PANEL * stride, out + j, leading, columns - j, add);
}

// Units of two neighbouring rows (bf16) or of one (fp32), `count` columns.
inline void zip_rows(const float* first, const float*, int64_t count, float* out) {
  std::memcpy(out, first, count * sizeof(float));
}
inline void zip_rows(const bf16* first, const bf16* second, int64_t count, Unit<bf16>* out) {
  auto low = reinterpret_cast<const uint16_t*>(first), high = reinterpret_cast<const uint16_t*>(second);
  if (second == nullptr) {
    for (int64_t n = 0; n < count; ++n) out[n] = low[n];
    return;
  }
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES) {
    vhalf a, b;
    std::memcpy(&a, low + n, sizeof a);
    std::memcpy(&b, high + n, sizeof b);
    vuint pair = __builtin_convertvector(a, vuint) | (__builtin_convertvector(b, vuint) << 16);
    std::memcpy(out + n, &pair, sizeof pair);
  }
  for (; n < count; ++n) out[n] = low[n] | uint32_t(high[n]) << 16;
}

constexpr int64_t AHEAD_ROWS = 16;  // asked for before they are wanted: the weights of many experts come from memory

// Right side from a row-major [summed, columns] matrix.
template <class T>
void pack_rows(const T* source, int64_t leading, int64_t summed, int64_t columns, Unit<T>* packed) {
  const int64_t units = units_of<T>(summed);
  for (int64_t u = 0; u < units; ++u) {
    const T* first = source + u * depth_of<T> * leading;
    const T* second = u * depth_of<T> + 1 < summed ? first + leading : nullptr;
    for (int64_t j = 0; j < columns; j += PANEL) {
      Unit<T>* out = packed + (j / PANEL * units + u) * PANEL;
      const int64_t count = std::min<int64_t>(PANEL, columns - j);
      ask_for(first + AHEAD_ROWS * leading + j);
      ask_for(first + (AHEAD_ROWS + 1) * leading + j);
      zip_rows(first + j, second == nullptr ? nullptr : second + j, count, out);
      for (int64_t n = count; n < PANEL; ++n) out[n] = 0;
    }
  }
}

// out[rows, columns] = left[rows, summed] * right, row-major [summed, columns], for these few rows alone: nothing is
// packed but the last columns, which fill no panel. Meanwhile a matrix as large at `next` is asked for.
template <class T, class O>
void multiply_once(int64_t rows, int64_t columns, int64_t summed, Left<T> left, const T* right, const T* next, O* out,
                   int slot) {
  const int64_t whole = takes_tiles<T>() ? 0 : columns / PANEL * PANEL, rest = columns - whole;
  for (int64_t j = 0; j < whole; j += PANEL)
    strip_in_place<T, O>(rows, summed, left, right + j, columns, out + j, columns, next + j * summed);
  if (rest == 0) return;
  Unit<T>* packed = scratch<Unit<T>>(slot, packed_size<T>(summed, rest));
  pack_rows(right + whole, columns, summed, rest, packed);
  multiply<T, O>(rows, rest, summed, left, packed, units_of<T>(summed) * PANEL, out + whole, columns, false);
}

// multiply() where `out` is much more than the sides: past the caches. The left side is turned (row 1).
template <class T>
void multiply_outward(int64_t rows, int64_t columns, int64_t summed, Left<T> left, const Unit<T>* packed, T* out) {
  const bool whole_lines = (uintptr_t(out) | columns * sizeof(T)) % LINE == 0 && columns % PANEL == 0;
  if (takes_tiles<T>() || !whole_lines)
    return multiply<T, T>(rows, columns, summed, left, packed, units_of<T>(summed) * PANEL, out, columns, false);
  strips_outward<T>(rows, columns, summed, left.data, left.step, packed, out);
#if defined(__x86_64__)
  _mm_sfence();  // what went past the caches is there before anything that this thread writes next
#endif
}

// As bytes: a template's argument forgets that units of bf16 may lie anywhere in memory of bf16.
template <class U>
inline void copy_unit(const U* source, U* out) {
  std::memcpy(out, source, sizeof(U));
}

// LANES rows of as many units, transposed; sixteen in four rounds of exchanges between rows.
template <class U>
inline void transpose_square(const U* source, int64_t leading, U* out, int64_t out_leading) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(source + i * leading);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * out_leading, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_leading, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
#else
  for (int n = 0; n < LANES; ++n)
    for (int k = 0; k < LANES; ++k) copy_unit(source + n * leading + k, out + k * out_leading + n);
#endif
}

// The transpose of [rows, columns] cells, at most LANES each way.
template <class U>
inline void transpose_part(const U* source, int64_t leading, int64_t rows, int64_t columns, U* out,
                           int64_t out_leading) {
  if (rows == LANES && columns == LANES) return transpose_square(source, leading, out, out_leading);
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t m = 0; m < rows; ++m) copy_unit(source + m * leading + n, out + n * out_leading + m);
}

// pack_left as tiles want it: row-major, [rows, units].
template <class T>
Left<T> pack_left_turned(const T* source, int64_t leading, int64_t summed, int64_t rows, Unit<T>* packed) {
  const int64_t units = units_of<T>(summed);
  for (int64_t u = 0; u < units; u += LANES)
    for (int64_t m = 0; m < rows; m += LANES) {
      const int64_t deep = std::min<int64_t>(LANES, units - u), tall = std::min<int64_t>(LANES, rows - m);
      Unit<T> square[LANES * LANES];
      for (int64_t k = 0; k < deep; ++k) {
        const int64_t at = (u + k) * depth_of<T>;
        const T* first = source + at * leading + m;
        zip_rows(first, at + 1 < summed ? first + leading : nullptr, tall, square + k * LANES);
      }
      transpose_part(square, LANES, deep, tall, packed + m * units + u, units);
    }
  return {packed, units, 1};
}

// Left side from the transpose of a row-major [summed, rows] matrix.
template <class T>
Left<T> pack_left(const T* source, int64_t leading, int64_t summed, int64_t rows, Unit<T>* packed) {
  if (takes_tiles<T>()) return pack_left_turned(source, leading, summed, rows, packed);
  for (int64_t u = 0; u < units_of<T>(summed); ++u) {
    const T* first = source + u * depth_of<T> * leading;
    zip_rows(first, u * depth_of<T> + 1 < summed ? first + leading : nullptr, rows, packed + u * rows);
  }
  return {packed, 1, rows};
}

// One unit of row n starting at element k; past the end it holds zero.
inline float unit_at(const float* row, int64_t k, int64_t) { return row[k]; }
inline uint32_t unit_at(const bf16* row, int64_t k, int64_t summed) {
  return row[k].bits | (k + 1 < summed ? uint32_t(row[k + 1].bits) << 16 : 0);
}

// Right side from the transpose of a row-major [columns, summed] matrix.
template <class T>
void pack_columns(const T* source, int64_t leading, int64_t summed, int64_t columns, Unit<T>* packed) {
  const int64_t units = units_of<T>(summed), whole = summed / depth_of<T> / LANES * LANES;
  const bool even = leading % depth_of<T> == 0;
  for (int64_t j = 0; j < columns; j += LANES) {
    Unit<T>* out = packed + (j / PANEL * units) * PANEL + j % PANEL;
    int64_t u = 0;
    if (even && columns - j >= LANES)
      for (; u < whole; u += LANES) {
        const T* square = source + j * leading + u * depth_of<T>;
        for (int64_t n = 0; n < LANES; ++n) ask_for(square + (AHEAD_ROWS + n) * leading);
        transpose_square(reinterpret_cast<const Unit<T>*>(square), leading / depth_of<T>, out + u * PANEL, PANEL);
      }
    for (; u < units; ++u)
      for (int64_t n = 0; n < LANES; ++n)
        out[u * PANEL + n] =
            j + n < columns ? unit_at(source + (j + n) * leading, u * depth_of<T>, summed) : Unit<T>(0);
  }
  for (int64_t j = (columns + LANES - 1) / LANES * LANES; j < panels_of(columns) * PANEL; j += LANES)
    for (int64_t u = 0; u < units; ++u)
      for (int64_t n = 0; n < LANES; ++n) packed[(j / PANEL * units + u) * PANEL + j % PANEL + n] = 0;
}

// Right side packed by all threads of a parallel region together; none goes on before it is whole. From the transpose of
// a row-major [columns, summed] matrix where `transposed`, else from a row-major [summed, columns] one.
template <class T>
void pack_together(const T* source, int64_t summed, int64_t columns, bool transposed, Unit<T>* packed) {
#pragma omp for schedule(static)
  for (int64_t p = 0; p < panels_of(columns); ++p) {
    const int64_t j = p * PANEL, count = std::min<int64_t>(PANEL, columns - j);
    Unit<T>* out = packed + p * units_of<T>(summed) * PANEL;
    if (transposed)
      pack_columns(source + j * summed, summed, summed, count, out);
    else
      pack_rows(source + j, columns, summed, count, out);
  }
}

// Left side from a row-major matrix whatever its width: in place where units fit, else a copy padded to whole units.
template <class T>
Left<T> left_rows(const T* source, int64_t leading, int64_t summed, int64_t rows, int slot) {
  if (summed % depth_of<T> == 0 && leading % depth_of<T> == 0) return rows_of(source, leading);
  const int64_t units = units_of<T>(summed);
  Unit<T>* copy = scratch<Unit<T>>(slot, rows * units);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t u = 0; u < units; ++u) copy[m * units + u] = unit_at(source + m * leading, u * depth_of<T>, summed);
  return {copy, units, 1};
}
