// Cross-entropy of a linear head [V, D]: logits of a few rows at a time stay in the cache; gradients are made at once,
// up to the scalar that comes from above. Losses are kept per row and added in order of rows.
#include "gemm.h"

namespace {

constexpr int64_t ROWS = TILES ? 64 : 4 * TALL;  // rows whose logits exist at a time, per thread
constexpr int64_t BLOCK = 512;      // rows per addition to the weight's gradient

struct Sizes {
  int64_t rows, width, classes;
  int64_t padded() const { return (classes + 1) / 2 * 2; }  // so that units of a row are whole
};

// One row of logits -> its loss; with `change`, also softmax minus one-hot, in T.
template <class T>
float row_loss(float* logits, int64_t classes, int64_t target, T* change) {
  vfloat top = splat(-INFINITY), sum{};
  int64_t n = 0;
  for (; n + LANES <= classes; n += LANES) top = larger(load(logits + n), top);
  float peak = largest(top), rest = 0;
  for (; n < classes; ++n) peak = std::max(peak, logits[n]);
  const float picked = logits[target];
  const int64_t whole = classes / LANES * LANES;
  for (n = 0; n < whole; n += LANES) {
    const vfloat w = exponential(load(logits + n) - peak);
    sum += w;
    store(logits + n, w);
  }
  for (; n < classes; ++n) rest += logits[n] = std::exp(logits[n] - peak);
  const float mass = total(sum) + rest, inverse = 1.0f / mass;
  if (change != nullptr) {
    for (n = 0; n < classes; n += LANES)
      store(change + n, load(logits + n, classes - n) * inverse, classes - n);
    if (classes % 2) store(change + classes, vfloat{}, 1);
    store(change + target, splat(logits[target] * inverse - 1.0f), 1);
  }
  return std::log(mass) + peak - picked;
}

template <class T>
struct Task {
  const T *hidden, *weight;
  const int64_t* targets;
  T *grad_hidden, *grad_weight;
  float* losses;
};

template <class T>
void rows_part(const Task<T>& t, const Sizes& s, int64_t first, int64_t count, const Unit<T>* columns,
               const Unit<T>* rows, T* change) {
  float* logits = scratch<float>(4, ROWS * s.classes);
  const Left<T> left = left_rows(t.hidden + first * s.width, s.width, s.width, count, 5);
  multiply<T, float>(count, s.classes, s.width, left, columns, units_of<T>(s.width) * PANEL, logits, s.classes, false);
  for (int64_t m = 0; m < count; ++m)
    t.losses[first + m] = row_loss(logits + m * s.classes, s.classes, t.targets[first + m],
                                   change == nullptr ? nullptr : change + m * s.padded());
  if (t.grad_hidden != nullptr)
    multiply<T, T>(count, s.width, s.classes, rows_of(change, s.padded()), rows, units_of<T>(s.classes) * PANEL,
                   t.grad_hidden + first * s.width, s.width, false);
}

template <class T>
void run(const Task<T>& t, const Sizes& s, int threads) {
  const bool grads = t.grad_hidden != nullptr || t.grad_weight != nullptr;
  const int64_t column_stride = units_of<T>(s.width) * PANEL, row_stride = units_of<T>(s.classes) * PANEL;
  Unit<T>* columns = scratch<Unit<T>>(0, packed_size<T>(s.width, s.classes));
  Unit<T>* rows = grads ? scratch<Unit<T>>(1, packed_size<T>(s.classes, s.width)) : nullptr;
  T* change = grads ? scratch<T>(2, BLOCK * s.padded()) : nullptr;
  const bool only = s.rows <= BLOCK;
  float* sums = t.grad_weight != nullptr && !only ? scratch<float>(3, s.classes * s.width) : nullptr;
  const int64_t strip_rows = 8 * TALL;
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels_of(s.classes); ++p)
      pack_columns(t.weight + p * PANEL * s.width, s.width, s.width, std::min<int64_t>(PANEL, s.classes - p * PANEL),
                   columns + p * column_stride);
    if (t.grad_hidden != nullptr)
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels_of(s.width); ++p)
        pack_rows(t.weight + p * PANEL, s.width, s.classes, std::min<int64_t>(PANEL, s.width - p * PANEL),
                  rows + p * row_stride);
    for (int64_t block = 0; block < s.rows; block += BLOCK) {
      const int64_t count = std::min(BLOCK, s.rows - block);
#pragma omp for schedule(dynamic)
      for (int64_t m = 0; m < count; m += ROWS)
        rows_part(t, s, block + m, std::min(ROWS, count - m), columns, rows,
                  grads ? change + m * s.padded() : nullptr);
      if (t.grad_weight == nullptr) continue;
      Unit<T>* packed = scratch<Unit<T>>(6, packed_size<T>(BLOCK, s.width));
      pack_rows(t.hidden + block * s.width, s.width, count, s.width, packed);
      const int64_t stride = units_of<T>(count) * PANEL;
#pragma omp for schedule(static)
      for (int64_t v = 0; v < s.classes; v += strip_rows) {
        const int64_t height = std::min(strip_rows, s.classes - v);
        Unit<T>* turned = scratch<Unit<T>>(7, units_of<T>(BLOCK) * strip_rows);
        const Left<T> side = pack_left(change + v, s.padded(), count, height, turned);
        if (only)
          multiply<T, T>(height, s.width, count, side, packed, stride, t.grad_weight + v * s.width, s.width, false);
        else
          multiply<T, float>(height, s.width, count, side, packed, stride, sums + v * s.width, s.width, block > 0);
        if (!only && block + BLOCK >= s.rows)
          for (int64_t n = 0, all = height * s.width; n < all; n += LANES)
            store(t.grad_weight + v * s.width + n, load(sums + v * s.width + n, all - n), all - n);
      }
    }
  }
}

}  // namespace

extern "C" void ernie5_cross_entropy(int narrow, const void* hidden, const void* weight, const int64_t* targets,
                                     void* grad_hidden, void* grad_weight, float* losses, int64_t rows, int64_t width,
                                     int64_t classes, int threads) {
  const Sizes s{rows, width, classes};
  if (narrow)
    run<bf16>({(const bf16*)hidden, (const bf16*)weight, targets, (bf16*)grad_hidden, (bf16*)grad_weight, losses}, s,
              threads);
  else
    run<float>({(const float*)hidden, (const float*)weight, targets, (float*)grad_hidden, (float*)grad_weight, losses},
               s, threads);
}
