// Products with one weight [N, K] row-major: y = x W^T, dx = dy W, dW = dy^T x. All threads pack the weight once
// together, then each takes blocks of rows (of dW: blocks of its columns), so that every sum has one order.
#include "gemm.h"

namespace {

constexpr int64_t ROWS = 8 * TALL;  // rows of one piece of work

template <class T>
void product(const T* x, const T* weight, T* out, int64_t rows, int64_t summed, int64_t columns, bool transposed,
             int threads) {
  Unit<T>* packed = scratch<Unit<T>>(0, packed_size<T>(summed, columns));
  const int64_t stride = units_of<T>(summed) * PANEL;
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
    pack_together(weight, summed, columns, transposed, packed);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += ROWS) {
      const int64_t count = std::min(ROWS, rows - first);
      const Left<T> left = left_rows(x + first * summed, summed, summed, count, 1);
      multiply<T, T>(count, columns, summed, left, packed, stride, out + first * columns, columns, false);
    }
  }
}

// out[rows, columns] = left^T right over `summed` rows of left [summed, rows] and right [summed, columns].
template <class T>
void outer(const T* left, const T* right, T* out, int64_t rows, int64_t columns, int64_t summed, int threads) {
  const int64_t panels = panels_of(columns), deep = 2 * DEEP;
  const int64_t share = std::max<int64_t>(1, (panels + threads - 1) / threads);  // no column: no work, no division by 0
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; p += share) {
    const TileScope tiles;
    const int64_t j = p * PANEL, own = std::min(share * PANEL, columns - j);
    Unit<T>*packed = scratch<Unit<T>>(0, packed_size<T>(deep, own)), *turned = scratch<Unit<T>>(1, deep * rows);
    float* sums = scratch<float>(2, rows * own);
    for (int64_t k = 0; k < summed; k += deep) {
      const int64_t count = std::min(deep, summed - k);
      pack_rows(right + k * columns + j, columns, count, own, packed);
      const Left<T> side = pack_left(left + k * rows, rows, count, rows, turned);
      const int64_t stride = units_of<T>(count) * PANEL;
      if (summed <= deep)
        multiply<T, T>(rows, own, count, side, packed, stride, out + j, columns, false);
      else
        multiply<T, float>(rows, own, count, side, packed, stride, sums, own, k > 0);
    }
    for (int64_t m = 0; m < rows && (summed > deep || summed == 0); ++m)
      for (int64_t n = 0; n < own; n += LANES)
        store(out + m * columns + j + n, summed == 0 ? vfloat{} : load(sums + m * own + n, own - n), own - n);
  }
}

}  // namespace

extern "C" {

void ernie5_product(int narrow, const void* x, const void* weight, void* out, int64_t rows, int64_t summed,
                    int64_t columns, int transposed, int threads) {
  if (narrow)
    product((const bf16*)x, (const bf16*)weight, (bf16*)out, rows, summed, columns, transposed, threads);
  else
    product((const float*)x, (const float*)weight, (float*)out, rows, summed, columns, transposed, threads);
}

void ernie5_outer(int narrow, const void* left, const void* right, void* out, int64_t rows, int64_t columns,
                  int64_t summed, int threads) {
  if (narrow)
    outer((const bf16*)left, (const bf16*)right, (bf16*)out, rows, columns, summed, threads);
  else
    outer((const float*)left, (const float*)right, (float*)out, rows, columns, summed, threads);
}
}
