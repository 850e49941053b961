// AdamW over many tensors, and the sum of squares of their gradients. Work is cut into chunks of one size, so that
// sums have one order whatever the number of threads.
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements: what a chunk of every tensor needs stays in the second cache

struct Piece {
  int64_t tensor, first, count;
};

std::vector<Piece> pieces_of(const int64_t* counts, int64_t tensors) {
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t n = 0; n < counts[t]; n += CHUNK) pieces.push_back({t, n, std::min(CHUNK, counts[t] - n)});
  return pieces;
}

struct Adam {
  float rate, blend1, beta2, blend2, epsilon, root, scale;  // AdamWStep.factors, and what gradients are multiplied by
};

// torch's order of operations: moments by interpolation, sqrt(v) / sqrt(correction) + epsilon.
template <class G>
void update(const Adam& a, float keep, float* parameter, const G* gradient, float* first, float* second, bf16* copy,
            int64_t count) {
  for (const float* wide : {parameter, first, second}) ask_for_pages(wide, count, CHUNK);  // the next chunk's, as a rule
  ask_for_pages(gradient, count, CHUNK), ask_for_pages(copy, count, CHUNK);
  for (int64_t n = 0; n < count; n += LANES) {
    const int64_t left = count - n;
    const vfloat g = load(gradient + n, left) * a.scale, old = load(first + n, left);
    const vfloat m = old + (g - old) * a.blend1;
    const vfloat v = load(second + n, left) * a.beta2 + g * g * a.blend2;
    vfloat spread;
#if defined(__AVX512F__)
    spread = (vfloat)_mm512_sqrt_ps((__m512)v);
#else
    for (int i = 0; i < LANES; ++i) spread[i] = std::sqrt(v[i]);
#endif
    const vfloat p = load(parameter + n, left) * keep - a.rate * m / (spread * a.root + a.epsilon);
    store(first + n, m, left), store(second + n, v, left), store(parameter + n, p, left);
    if (copy != nullptr) store(copy + n, p, left);
  }
}

template <class T>
float squares(const T* x, int64_t count) {
  vfloat sum{}, other{};
  int64_t n = 0;
  ask_for_pages(x, count, CHUNK);
  for (; n + 2 * LANES <= count; n += 2 * LANES) {
    const vfloat a = load(x + n), b = load(x + n + LANES);
    sum += a * a, other += b * b;
  }
  for (; n < count; n += LANES) {
    const vfloat a = load(x + n, count - n);
    sum += a * a;
  }
  return total(sum + other);
}

}  // namespace

extern "C" {

// Addresses, counts, what decay keeps and whether gradients are bf16: one per tensor; a copy's address may be null.
void ernie5_adamw(int64_t tensors, const int64_t* counts, const int* narrow, const float* keeps, float* const* parameters,
                  const void* const* gradients, float* const* firsts, float* const* seconds, void* const* copies,
                  float rate, float blend1, float beta2, float blend2, float epsilon, float root, float scale,
                  int threads) {
  const Adam a{rate, blend1, beta2, blend2, epsilon, root, scale};
  const std::vector<Piece> pieces = pieces_of(counts, tensors);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto [t, n, count] = pieces[i];
    bf16* copy = copies[t] == nullptr ? nullptr : (bf16*)copies[t] + n;
    if (narrow[t])
      update(a, keeps[t], parameters[t] + n, (const bf16*)gradients[t] + n, firsts[t] + n, seconds[t] + n, copy, count);
    else
      update(a, keeps[t], parameters[t] + n, (const float*)gradients[t] + n, firsts[t] + n, seconds[t] + n, copy, count);
  }
}

double ernie5_sum_squares(int64_t tensors, const int64_t* counts, const int* narrow, const void* const* values,
                          int threads) {
  const std::vector<Piece> pieces = pieces_of(counts, tensors);
  std::vector<double> sums(pieces.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto [t, n, count] = pieces[i];
    sums[i] = narrow[t] ? squares((const bf16*)values[t] + n, count) : squares((const float*)values[t] + n, count);
  }
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}
}
