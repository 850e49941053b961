// The tile of every product: ROWS * WIDE sums stay in registers while one panel streams by.
#include "gemm.h"

inline vfloat multiply_add(vfloat sum, const float& a, vfloat b) { return sum + a * b; }
inline vfloat multiply_add(vfloat sum, uint32_t a, vfloat b) {
#if defined(__AVX512BF16__)
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
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

template <class T, class O, int ROWS>
inline __attribute__((always_inline)) void tile(int64_t units, Left<T> left, const Unit<T>* panel, O* out,
                                                int64_t leading, int64_t columns, bool add) {
  vfloat sums[ROWS][WIDE];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v)
      sums[m][v] = add ? load(out + m * leading + v * LANES, std::max<int64_t>(0, columns - v * LANES)) : vfloat{};
  const Unit<T>* a = left.data;
  for (int64_t k = 0; k < units; ++k, a += left.step, panel += PANEL) {
    vfloat b[WIDE];
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) b[v] = load_units(panel + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < WIDE; ++v) sums[m][v] = multiply_add(sums[m][v], a[m * left.row], b[v]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v)
      if (columns > v * LANES) store(out + m * leading + v * LANES, sums[m][v], columns - v * LANES);
}

template <class T, class O, int ROWS>
void tile_rows(int64_t units, Left<T> left, const Unit<T>* panel, O* out, int64_t leading,
                                         int64_t columns, bool add) {
  if (columns >= PANEL)
    tile<T, O, ROWS>(units, left, panel, out, leading, PANEL, add);
  else
    tile<T, O, ROWS>(units, left, panel, out, leading, columns, add);
}

#define INSTANTIATE(T, O)                                                                              \
  template void tile_rows<T, O, TALL>(int64_t, Left<T>, const Unit<T>*, O*, int64_t, int64_t, bool);   \
  template void tile_rows<T, O, 4>(int64_t, Left<T>, const Unit<T>*, O*, int64_t, int64_t, bool);      \
  template void tile_rows<T, O, 2>(int64_t, Left<T>, const Unit<T>*, O*, int64_t, int64_t, bool);      \
  template void tile_rows<T, O, 1>(int64_t, Left<T>, const Unit<T>*, O*, int64_t, int64_t, bool);

INSTANTIATE(float, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(bf16, float)
