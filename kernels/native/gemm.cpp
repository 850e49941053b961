// The tile of every product: up to TALL * WIDE sums stay in registers while one panel of the right side streams by.
#include "gemm.h"

#include <array>
#include <utility>

namespace {

inline vfloat multiply_add(vfloat sum, const float& a, vfloat b) { return sum + a * b; }
inline vfloat multiply_add(vfloat sum, uint32_t a, vfloat b) {
#if defined(__AVX512BF16__)
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (vfloat)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)vdupq_n_u32(a));
#else
  vuint pair = a + vuint{}, other = (vuint)b;
  sum += (vfloat)(pair << 16) * (vfloat)(other << 16);
  return sum + (vfloat)(pair & 0xffff0000u) * (vfloat)(other & 0xffff0000u);
#endif
}
inline vfloat load_units(const float* p) { return load(p); }
inline vfloat load_units(const Unit<bf16>* p) {
  vfloat x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// What is asked for while a panel is read: as many bytes as it has, one after the other.
template <bool ASKS>
struct Ahead {
  const char* next;
  inline void advance() {
    if constexpr (ASKS) {
      for (int64_t byte = 0; byte < PANEL_BYTES; byte += LINE) ask_for(next + byte);
      next += PANEL_BYTES;
    }
  }
  static constexpr int64_t PANEL_BYTES = PANEL * sizeof(float);  // of one unit of every column
};

// How a tile reads its right side. A packed panel: a unit of every column, then the next unit of every column.
template <class T, bool ASKS>
struct PackedPanel {
  const Unit<T>* at;
  Ahead<ASKS> ahead;
  static int64_t units(int64_t summed) { return units_of<T>(summed); }  // zeros fill the last one
  static bool rest(int64_t) { return false; }
  inline void next(vfloat (&b)[WIDE]) {
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) b[v] = load_units(at + v * LANES);
    at += PANEL, ahead.advance();
  }
  inline void last(vfloat (&)[WIDE]) {}
  static inline void sort(vfloat (&)[WIDE]) {}
};

// PANEL columns of a row-major matrix, neighbouring rows zipped in registers. That is quickest 128 bits at a time,
// which leaves the columns of a panel mixed until `sort`.
template <class T, bool ASKS>
struct PanelInPlace {
  const T* at;
  int64_t leading;
  Ahead<ASKS> ahead;
  static int64_t units(int64_t summed) { return summed / depth_of<T>; }
  static bool rest(int64_t summed) { return summed % depth_of<T> != 0; }
  inline void next(vfloat (&b)[WIDE]) {
    read(at, at + leading, b);
    at += depth_of<T> * leading, ahead.advance();
  }
  inline void last(vfloat (&b)[WIDE]) {  // one row is left of a unit of two
    const T zeros[PANEL] = {};
    read(at, zeros, b);
  }
  static inline void read(const float* row, const float*, vfloat (&b)[WIDE]) {
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) b[v] = load(row + v * LANES);
  }
#if defined(__AVX512BF16__)
  static inline void read(const bf16* first, const bf16* second, vfloat (&b)[WIDE]) {
    const __m512i low = _mm512_loadu_si512(first), high = _mm512_loadu_si512(second);
    b[0] = (vfloat)_mm512_unpacklo_epi16(low, high), b[1] = (vfloat)_mm512_unpackhi_epi16(low, high);
  }
  static inline void sort(vfloat (&x)[WIDE]) {
    if constexpr (depth_of<T> == 1) return;
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512 low = (__m512)x[0], high = (__m512)x[1];
    x[0] = (vfloat)_mm512_permutex2var_ps(low, first, high), x[1] = (vfloat)_mm512_permutex2var_ps(low, second, high);
  }
#else
  static inline void read(const bf16* first, const bf16* second, vfloat (&b)[WIDE]) {
    Unit<bf16> units[PANEL];
    zip_rows(first, second, PANEL, units);
    for (int v = 0; v < WIDE; ++v) b[v] = load_units(units + v * LANES);
  }
  static inline void sort(vfloat (&)[WIDE]) {}
#endif
};

// A row of a panel. Past the caches where it is read again only after more than they hold: it need not drive out what
// they have, and a line that is written whole need not be read first.
template <class O>
inline void store_panel(O* out, const vfloat (&x)[WIDE]) {
#pragma GCC unroll 4
  for (int v = 0; v < WIDE; ++v) store(out + v * LANES, x[v]);
}
#if defined(__AVX512BF16__)
inline void stream_panel(float* out, const vfloat (&x)[WIDE]) {
  for (int v = 0; v < WIDE; ++v) _mm512_stream_ps(out + v * LANES, (__m512)x[v]);
}
inline void stream_panel(bf16* out, const vfloat (&x)[WIDE]) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
}
#else
template <class O>
inline void stream_panel(O* out, const vfloat (&x)[WIDE]) {
  store_panel(out, x);
}
#endif

// sums += left * side.
template <class T, int ROWS, class Side>
inline __attribute__((always_inline)) void add_products(int64_t summed, Left<T> left, Side side,
                                                        vfloat (&sums)[ROWS][WIDE]) {
  vfloat b[WIDE];
  constexpr int GROUPS = (ROWS + 2) / 3;  // an address for three rows: one for each would not find registers
  const Unit<T>* a[GROUPS];
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) a[g] = left.data + 3 * g * left.row;
  auto advance = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < WIDE; ++v) sums[m][v] = multiply_add(sums[m][v], a[m / 3][m % 3 * left.row], b[v]);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      const Unit<T>* next = a[g] + left.step;
      asm("" : "+r"(next));  // else the compiler sees that they are one address and many distances
      a[g] = next;
    }
  };
  for (int64_t k = Side::units(summed); k > 0; --k) side.next(b), advance();
  if (Side::rest(summed)) side.last(b), advance();
}

template <class T, class O, int ROWS, class Side>
void tile(int64_t summed, Left<T> left, Side side, O* out, int64_t leading, bool add) {
  vfloat sums[ROWS][WIDE];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) sums[m][v] = add ? load(out + m * leading + v * LANES) : vfloat{};
  add_products<T, ROWS>(summed, left, side, sums);
  asm("" : "+r"(out), "+r"(leading));  // else addresses of all rows are made before and kept in vector registers
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    Side::sort(sums[m]);
    store_panel(out + m * leading, sums[m]);
  }
}

// ROWS whole rows of a product, past the caches. Few summed elements make a tile of little work: what a call of its own
// for each would cost is as much again.
template <class T, int ROWS>
void rows_outward(int64_t summed, const Unit<T>* left, int64_t step, const Unit<T>* packed, T* out, int64_t columns) {
  const int64_t stride = units_of<T>(summed) * PANEL;
  for (int64_t j = 0; j < columns; j += PANEL, packed += stride) {
    vfloat sums[ROWS][WIDE] = {};
    const Unit<T>*a = left, *b = packed;
    for (int64_t k = units_of<T>(summed); k > 0; --k, a += step, b += PANEL) {
      vfloat right[WIDE];
#pragma GCC unroll 4
      for (int v = 0; v < WIDE; ++v) right[v] = load_units(b + v * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) sums[m][v] = multiply_add(sums[m][v], a[m], right[v]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) stream_panel(out + m * columns + j, sums[m]);
  }
}

// All rows of a panel, in tiles whose heights differ by one at most: a low one has too few sums under way. The first
// tile asks.
template <class T, class O, class Asking, class Side, size_t... LESS>
inline void tiles_of(int64_t rows, int64_t summed, Left<T> left, Asking asking, Side side, O* out, int64_t leading,
                     bool add, std::index_sequence<LESS...>) {
  static constexpr std::array first = {&tile<T, O, int(LESS) + 1, Asking>...};
  static constexpr std::array other = {&tile<T, O, int(LESS) + 1, Side>...};
  for (int64_t m = 0, count = (rows + TALL - 1) / TALL; count > 0; --count) {
    const int64_t height = (rows - m + count - 1) / count;
    const Left<T> own{left.data + m * left.row, left.row, left.step};
    if (m == 0)
      first[height - 1](summed, own, asking, out, leading, add);
    else
      other[height - 1](summed, own, side, out + m * leading, leading, add);
    m += height;
  }
}
constexpr auto HEIGHTS = std::make_index_sequence<TALL>();

template <class T, size_t... LESS>
constexpr auto kernels_outward(std::index_sequence<LESS...>) {
  return std::array{&rows_outward<T, int(LESS) + 1>...};
}

// A panel that `columns` do not fill: its sums lie in a block of their own meanwhile.
template <class O, class Whole>
inline void within(int64_t rows, O* out, int64_t leading, int64_t columns, bool add, Whole whole) {
  if (columns >= PANEL) return whole(out, leading);
  O* block = scratch<O>(21, rows * PANEL);
  std::memset(static_cast<void*>(block), 0, rows * PANEL * sizeof(O));
  for (int64_t m = 0; add && m < rows; ++m) std::memcpy(block + m * PANEL, out + m * leading, columns * sizeof(O));
  whole(block, PANEL);
  for (int64_t m = 0; m < rows; ++m) std::memcpy(out + m * leading, block + m * PANEL, columns * sizeof(O));
}

}  // namespace

template <class T, class O>
void strip(int64_t rows, int64_t summed, Left<T> left, const Unit<T>* panel, O* out, int64_t leading, int64_t columns,
           bool add) {
  const PackedPanel<T, false> side{panel, {}};
  within(rows, out, leading, columns, add, [&](O* to, int64_t apart) {
    tiles_of<T, O>(rows, summed, left, side, side, to, apart, add, HEIGHTS);
  });
}
template <class T>
void strip_asking(int64_t rows, int64_t summed, Left<T> left, const Unit<T>* panel, T* out, int64_t leading,
                  int64_t columns, const void* next) {
  const PackedPanel<T, true> asking{panel, {static_cast<const char*>(next)}};
  const PackedPanel<T, false> side{panel, {}};
  within(rows, out, leading, columns, false, [&](T* to, int64_t apart) {
    tiles_of<T, T>(rows, summed, left, asking, side, to, apart, false, HEIGHTS);
  });
}
template <class T>
void strips_outward(int64_t rows, int64_t columns, int64_t summed, const Unit<T>* left, int64_t step,
                    const Unit<T>* packed, T* out) {
  static constexpr auto kernels = kernels_outward<T>(HEIGHTS);
  for (int64_t m = 0; m < rows; m += TALL)
    kernels[std::min<int64_t>(TALL, rows - m) - 1](summed, left + m, step, packed, out + m * columns, columns);
}
template <class T, class O>
void strip_in_place(int64_t rows, int64_t summed, Left<T> left, const T* right, int64_t right_leading, O* out,
                    int64_t leading, const void* next) {
  const PanelInPlace<T, true> asking{right, right_leading, {static_cast<const char*>(next)}};
  const PanelInPlace<T, false> side{right, right_leading, {}};
  tiles_of<T, O>(rows, summed, left, asking, side, out, leading, false, HEIGHTS);
}

#define INSTANTIATE(T, O)                                                                                           \
  template void strip<T, O>(int64_t, int64_t, Left<T>, const Unit<T>*, O*, int64_t, int64_t, bool);                  \
  template void strip_in_place<T, O>(int64_t, int64_t, Left<T>, const T*, int64_t, O*, int64_t, const void*);

INSTANTIATE(float, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(bf16, float)
#define INSTANTIATE_SAME(T)                                                                                       \
  template void strip_asking<T>(int64_t, int64_t, Left<T>, const Unit<T>*, T*, int64_t, int64_t, const void*);    \
  template void strips_outward<T>(int64_t, int64_t, int64_t, const Unit<T>*, int64_t, const Unit<T>*, T*);

INSTANTIATE_SAME(float)
INSTANTIATE_SAME(bf16)
