// Passes over rows: norms, SwiGLU, rotation, moving rows to experts and back. Sums over rows go through blocks of fixed
// size, so that results do not depend on the number of threads.
#include "swiglu.h"

namespace {

constexpr int64_t BLOCK = 256;  // rows per partial sum

template <class T>
void norm_forward(const T* x, const T* weight, float eps, T* out, float* inverse, int64_t rows, int64_t width,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * width;
    vfloat squares{};
    for (int64_t d = 0; d < width; d += LANES) {
      const vfloat v = load(row + d, width - d);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / width + eps);
    inverse[r] = scale;
    for (int64_t d = 0; d < width; d += LANES)
      store(out + r * width + d, load(row + d, width - d) * scale * load(weight + d, width - d), width - d);
  }
}

template <class T>
void norm_backward(const T* x, const T* weight, const float* inverse, const T* grad, T* grad_x, T* grad_weight,
                   int64_t rows, int64_t width, int threads) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK, padded = (width + LANES - 1) / LANES * LANES;
  float* partial = scratch<float>(0, (blocks + 1) * padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    float* sums = partial + b * padded;
    std::fill_n(sums, padded, 0.0f);
    for (int64_t r = b * BLOCK; r < std::min(rows, (b + 1) * BLOCK); ++r) {
      const T *row = x + r * width, *up = grad + r * width;
      vfloat dot{};
      for (int64_t d = 0; d < width; d += LANES) {
        const vfloat product = load(up + d, width - d) * (load(row + d, width - d) * inverse[r]);
        store(sums + d, load(sums + d) + product);
        dot += product * load(weight + d, width - d);
      }
      const float mean = total(dot) / width;
      for (int64_t d = 0; d < width; d += LANES) {
        const vfloat unit = load(row + d, width - d) * inverse[r];
        const vfloat g = load(up + d, width - d) * load(weight + d, width - d);
        store(grad_x + r * width + d, (g - unit * mean) * inverse[r], width - d);
      }
    }
  }
  for (int64_t d = 0; d < width; d += LANES) {
    vfloat sum{};
    for (int64_t b = 0; b < blocks; ++b) sum += load(partial + b * padded + d);
    store(grad_weight + d, sum, width - d);
  }
}

template <class T>
void rotate(const T* x, const float* rotation, T* out, int64_t tokens, int64_t heads, int64_t width, float turn,
            int threads) {
  vint other, even, odd;
  vfloat sign;
  for (int i = 0; i < LANES; ++i) other[i] = i ^ 1, even[i] = i & ~1, odd[i] = i | 1, sign[i] = i % 2 ? turn : -turn;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * width;
      for (int64_t c = 0; c < width; c += LANES) {
        const vfloat v = load(x + at + c, width - c), r = load(rotation + t * width + c, width - c);
        const vfloat cosine = __builtin_shuffle(r, even), sine = __builtin_shuffle(r, odd);
        store(out + at + c, v * cosine + __builtin_shuffle(v, other) * sine * sign, width - c);
      }
    }
}

// starts: where the places of each token begin, and the end of the last; null where each has as many.
template <class T>
void sum_places(const T* rows, const int64_t* places, const int64_t* starts, T* out, int64_t tokens, int64_t slots,
                int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t first = starts == nullptr ? n * (slots / tokens) : starts[n];
    const int64_t end = starts == nullptr ? first + slots / tokens : starts[n + 1];
    for (int64_t d = 0; d < width; d += LANES) {
      vfloat sum{};
      for (int64_t k = first; k < end; ++k) sum += load(rows + places[k] * width + d, width - d);
      store(out + n * width + d, sum, width - d);
    }
  }
}

template <class T>
void swiglu_forward(const T* gate_up, const float* weights, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    swiglu_row(gate_up + r * 2 * width, width, weights == nullptr ? 1.0f : weights[r], out + r * width);
}

template <class T>
void swiglu_backward(const T* gate_up, const float* weights, const T* grad, T* grad_gate_up, float* grad_weights,
                     int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = swiglu_row_backward(gate_up + r * 2 * width, grad + r * width, width,
                                          weights == nullptr ? 1.0f : weights[r], grad_gate_up + r * 2 * width,
                                          static_cast<T*>(nullptr));
    if (grad_weights != nullptr) grad_weights[r] = sum;
  }
}

}  // namespace

#define BY_TYPE(call)     \
  if (narrow) {           \
    typedef bf16 T;       \
    call;                 \
  } else {                \
    typedef float T;      \
    call;                 \
  }

extern "C" {

void ernie5_norm_forward(int narrow, const void* x, const void* weight, void* out, float* inverse, int64_t rows,
                         int64_t width, float eps, int threads) {
  BY_TYPE(norm_forward((const T*)x, (const T*)weight, eps, (T*)out, inverse, rows, width, threads))
}

void ernie5_norm_backward(int narrow, const void* x, const void* weight, const float* inverse, const void* grad,
                          void* grad_x, void* grad_weight, int64_t rows, int64_t width, int threads) {
  BY_TYPE(norm_backward((const T*)x, (const T*)weight, inverse, (const T*)grad, (T*)grad_x, (T*)grad_weight, rows,
                        width, threads))
}

void ernie5_rotate(int narrow, const void* x, const float* rotation, void* out, int64_t tokens, int64_t heads,
                   int64_t width, float turn, int threads) {
  BY_TYPE(rotate((const T*)x, rotation, (T*)out, tokens, heads, width, turn, threads))
}

void ernie5_sum_places(int narrow, const void* rows, const int64_t* places, const int64_t* starts, void* out,
                       int64_t tokens, int64_t slots, int64_t width, int threads) {
  BY_TYPE(sum_places((const T*)rows, places, starts, (T*)out, tokens, slots, width, threads))
}

void ernie5_swiglu_forward(int narrow, const void* gate_up, const float* weights, void* out, int64_t rows,
                           int64_t width, int threads) {
  BY_TYPE(swiglu_forward((const T*)gate_up, weights, (T*)out, rows, width, threads))
}

void ernie5_swiglu_backward(int narrow, const void* gate_up, const float* weights, const void* grad,
                            void* grad_gate_up, float* grad_weights, int64_t rows, int64_t width, int threads) {
  BY_TYPE(swiglu_backward((const T*)gate_up, weights, (const T*)grad, (T*)grad_gate_up, grad_weights, rows, width,
                          threads))
}

void ernie5_gather(const char* rows, const int64_t* sources, char* out, int64_t count, int64_t row_bytes,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * row_bytes, rows + sources[r] * row_bytes, row_bytes);
}
}
