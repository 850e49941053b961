// Routing: one product for all scores, the preferred experts of each token and their weights, with no more than a block
// of scores in memory. A token's weights depend on the scores that it chose alone, so backward touches those and no more:
// dX[n] = sum of dl[n, k] W[c[n, k]], dW[e] = sum of dl[n, k] x[n] over the slots that chose e.
#include "gemm.h"

namespace {

constexpr int64_t ROWS = 8 * TALL;    // tokens whose scores exist at a time, per thread
constexpr int64_t PART = 256;         // slots per partial sum of a weight's gradient
constexpr int64_t STRIP = 8 * LANES;  // columns whose sums stay in registers
constexpr int64_t AHEAD = 6;          // rows asked for before they are wanted: they lie anywhere
constexpr float SMALLEST_SUM = 1e-12f;

struct Sizes {
  int64_t tokens, width, experts, top_k;
  int64_t padded() const { return panels_of(experts) * PANEL; }
};

// Places of the k greatest of `left`, greatest first, equal ones in order; `left` is a row of whole vectors, NaN where
// nothing may be chosen, and loses what is chosen.
void choose(float* left, int64_t padded, int64_t k, int64_t* out) {
  for (int64_t i = 0; i < k; ++i) {
    vfloat top = splat(-INFINITY);
    for (int64_t n = 0; n < padded; n += LANES) top = larger(load(left + n), top);
    const float peak = largest(top);
    int64_t place = 0;
    int lane;
    while ((lane = first_equal(load(left + place), peak)) < 0) place += LANES;
    place += lane;
    left[place] = NAN;
    out[i] = place;
  }
}

inline vfloat nan_as_infinite(vfloat x) { return x == x ? x : splat(INFINITY); }

// Logits of one token, whole vectors with -inf behind the last expert, become scores.
void score(float* row, int64_t padded, bool sigmoids) {
  if (sigmoids) {
    for (int64_t n = 0; n < padded; n += LANES) store(row + n, sigmoid(load(row + n)));
    return;
  }
  vfloat top = splat(-INFINITY), sum{};
  for (int64_t n = 0; n < padded; n += LANES) top = larger(load(row + n), top);
  const float peak = largest(top);
  for (int64_t n = 0; n < padded; n += LANES) {
    const vfloat power = exponential(load(row + n) - peak);
    sum += power;
    store(row + n, power);
  }
  const float inverse = 1.0f / total(sum);
  for (int64_t n = 0; n < padded; n += LANES) store(row + n, load(row + n) * inverse);
}

struct Rule {
  const float* bias;
  const uint8_t* active;  // null: all
  float scale;
  bool sigmoids, given;   // given: the choices are made already
};

void decide(float* row, const Rule& rule, const Sizes& s, int64_t* choices, float* scores, float* weights) {
  std::fill(row + s.experts, row + s.padded(), -INFINITY);
  for (int64_t e = 0; rule.active != nullptr && e < s.experts; ++e)
    if (!rule.active[e]) row[e] = -INFINITY;
  score(row, s.padded(), rule.sigmoids);
  if (!rule.given) {
    float* left = scratch<float>(3, s.padded());
    for (int64_t e = 0; e < s.experts; e += LANES)
      store(left + e, nan_as_infinite(load(row + e) + load(rule.bias + e, s.experts - e)));
    for (int64_t e = 0; rule.active != nullptr && e < s.experts; ++e)
      if (!rule.active[e]) left[e] = -INFINITY;
    std::fill(left + s.experts, left + s.padded(), NAN);
    choose(left, s.padded(), s.top_k, choices);
  }
  float sum = 0;
  for (int64_t k = 0; k < s.top_k; ++k) sum += scores[k] = row[choices[k]];
  const float factor = rule.scale / std::max(sum, SMALLEST_SUM);
  for (int64_t k = 0; k < s.top_k; ++k) weights[k] = scores[k] * factor;
}

template <class T>
void forward(const T* x, const T* weight, const Rule& rule, int64_t* choices, float* scores, float* weights, Sizes s,
             int threads) {
  Unit<T>* packed = scratch<Unit<T>>(0, packed_size<T>(s.width, s.experts));
  const int64_t stride = units_of<T>(s.width) * PANEL;
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
    pack_together(weight, s.width, s.experts, true, packed);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < s.tokens; first += ROWS) {
      const int64_t count = std::min(ROWS, s.tokens - first);
      float* rows = scratch<float>(2, ROWS * s.padded());
      const Left<T> left = left_rows(x + first * s.width, s.width, s.width, count, 1);
      multiply<T, float>(count, s.experts, s.width, left, packed, stride, rows, s.padded(), false);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t at = (first + m) * s.top_k;
        decide(rows + m * s.padded(), rule, s, choices + at, scores + at, weights + at);
      }
    }
  }
}

// Gradient by a token's chosen logits. With S the sum of its scores: ds_k = scale (dw_k / S - sum_j dw_j s_j / S^2), the
// second part only where S is not held at its least; then through sigmoid or softmax, whose other experts get nothing:
// weights of a softmax are those of a softmax over the chosen ones.
void logit_gradient(const float* scores, const float* upstream, float scale, bool sigmoids, int64_t top_k, float* out) {
  float sum = 0, product = 0, shared = 0;
  for (int64_t k = 0; k < top_k; ++k) sum += scores[k], product += upstream[k] * scores[k];
  const float bounded = std::max(sum, SMALLEST_SUM);
  const float shift = sum > SMALLEST_SUM ? product / (bounded * bounded) : 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    out[k] = scale * (upstream[k] / bounded - shift);
    shared += out[k] * scores[k];
  }
  for (int64_t k = 0; k < top_k; ++k) out[k] = scores[k] * (sigmoids ? out[k] * (1.0f - scores[k]) : out[k] - shared);
}

// sum over slots of an expert of dl[slot] x[token of the slot], columns [first, first + STRIP).
template <class T>
void sum_slots(const T* x, const float* change, const int64_t* slots, int64_t count, const Sizes& s, int64_t first,
               T* out) {
  constexpr int VECTORS = STRIP / LANES;
  const int64_t columns = std::min(STRIP, s.width - first);
  vfloat sums[VECTORS] = {};
  for (int64_t i = 0; i < count; i += PART) {
    vfloat part[VECTORS] = {};
    for (int64_t j = i; j < std::min(count, i + PART); ++j) {
      const T* row = x + slots[j] / s.top_k * s.width + first;
      if (j + AHEAD < count)
        for (int64_t n = 0; n < columns; n += 64 / sizeof(T))
          __builtin_prefetch(x + slots[j + AHEAD] / s.top_k * s.width + first + n);
      const float factor = change[slots[j]];
      if (columns == STRIP) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) part[v] += factor * load(row + v * LANES);
      } else {
        for (int v = 0; v * LANES < columns; ++v) part[v] += factor * load(row + v * LANES, columns - v * LANES);
      }
    }
    for (int v = 0; v < VECTORS; ++v) sums[v] += part[v];
  }
  for (int v = 0; v * LANES < columns; ++v) store(out + first + v * LANES, sums[v], columns - v * LANES);
}

template <class T>
void backward(const T* x, const T* weight, const int64_t* choices, const float* scores, const float* upstream,
              float scale, bool sigmoids, T* grad_x, T* grad_weight, Sizes s, int threads) {
  const int64_t taken = s.tokens * s.top_k, strips = (s.width + STRIP - 1) / STRIP;
  float* change = scratch<float>(0, taken);
  int64_t *slots = scratch<int64_t>(1, taken), *ends = scratch<int64_t>(2, s.experts + 1);
  std::fill_n(ends, s.experts + 1, 0);
  for (int64_t i = 0; i < taken; ++i) ++ends[choices[i] + 1];
  for (int64_t e = 0; e < s.experts; ++e) ends[e + 1] += ends[e];
  for (int64_t i = 0; i < taken; ++i) slots[ends[choices[i]]++] = i;  // ends[e] is now the end of expert e's slots
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < s.tokens; ++n) {
      float* own = change + n * s.top_k;
      logit_gradient(scores + n * s.top_k, upstream + n * s.top_k, scale, sigmoids, s.top_k, own);
      for (int64_t d = 0; d < s.width; d += LANES) {
        vfloat sum{};
        for (int64_t k = 0; k < s.top_k; ++k)
          sum += own[k] * load(weight + choices[n * s.top_k + k] * s.width + d, s.width - d);
        store(grad_x + n * s.width + d, sum, s.width - d);
      }
    }
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t e = 0; e < s.experts; ++e)
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t start = e == 0 ? 0 : ends[e - 1];
        sum_slots(x, change, slots + start, ends[e] - start, s, strip * STRIP, grad_weight + e * s.width);
      }
  }
}

}  // namespace

extern "C" {

// Choices of each row of values, greatest first, equal ones in order; NaN counts as infinite.
void ernie5_choose(const float* values, int64_t* out, int64_t rows, int64_t columns, int64_t k, int threads) {
  const int64_t padded = (columns + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    float* left = scratch<float>(3, padded);
    for (int64_t n = 0; n < columns; n += LANES)
      store(left + n, nan_as_infinite(load(values + r * columns + n, columns - n)));
    std::fill(left + columns, left + padded, NAN);
    choose(left, padded, k, out + r * k);
  }
}

void ernie5_route(int narrow, const void* x, const void* weight, const float* bias, const uint8_t* active,
                  int64_t* choices, float* scores, float* weights, int64_t tokens, int64_t width, int64_t experts,
                  int64_t top_k, float scale, int sigmoids, int given, int threads) {
  const Sizes s{tokens, width, experts, top_k};
  const Rule rule{bias, active, scale, sigmoids != 0, given != 0};
  if (narrow)
    forward((const bf16*)x, (const bf16*)weight, rule, choices, scores, weights, s, threads);
  else
    forward((const float*)x, (const float*)weight, rule, choices, scores, weights, s, threads);
}

void ernie5_route_backward(int narrow, const void* x, const void* weight, const int64_t* choices, const float* scores,
                           const float* upstream, void* grad_x, void* grad_weight, int64_t tokens, int64_t width,
                           int64_t experts, int64_t top_k, float scale, int sigmoids, int threads) {
  const Sizes s{tokens, width, experts, top_k};
  if (narrow)
    backward((const bf16*)x, (const bf16*)weight, choices, scores, upstream, scale, sigmoids != 0, (bf16*)grad_x,
             (bf16*)grad_weight, s, threads);
  else
    backward((const float*)x, (const float*)weight, choices, scores, upstream, scale, sigmoids != 0, (float*)grad_x,
             (float*)grad_weight, s, threads);
}
}
