// All SwiGLU experts of a layer: rows grouped by expert, gate_up [E, 2F, D], down [E, D, F]. One thread owns one expert
// at a time, so its weights are packed once, its rows stay in the cache between the two products, and sums have one
// order whatever the number of threads. Backward keeps the first product's result alone and makes the rest again. With
// `sources` row r is x[sources[r]], and so is its upstream gradient: a block of rows is copied when its turn comes, and
// no tensor of all rows is made on the way in.
#include "gemm.h"
#include "swiglu.h"

namespace {

// Rows between the two products of the forward pass, and of the backward pass, where more is kept for each. An expert
// with no more of them uses its weights once: they are not packed as a whole.
constexpr int64_t ROWS = 16 * TALL, PART = 8 * TALL;
constexpr int64_t BLOCK = 512;      // rows per addition to a weight's gradient

struct Sizes {
  int64_t rows, width, hidden, experts;
};

// Rows [first, first + count) of x, or of the rows that `sources` names: in place, or copied together.
template <class T>
const T* rows_at(const T* x, const int64_t* sources, int64_t first, int64_t count, int64_t width, int slot) {
  if (sources == nullptr) return x + first * width;
  T* copy = scratch<T>(slot, BLOCK * width);
  for (int64_t m = 0; m < count; ++m) std::memcpy(copy + m * width, x + sources[first + m] * width, width * sizeof(T));
  return copy;
}

template <class T>
void ask_for_expert(const T* gate_up, const T* down, int64_t expert, int64_t cells) {
  ask_for_pages(gate_up, expert * 2 * cells, 2 * cells), ask_for_pages(down, expert * cells, cells);
}

int64_t first_of(const int64_t* ends, int64_t expert) { return expert == 0 ? 0 : ends[expert - 1]; }

// out[rows, columns] = left weight^T of one expert, weight [columns, summed], for these rows alone: a panel is packed,
// used while it lies in the first cache, and forgotten. Meanwhile the weight at `next`, the next expert's, is asked for.
template <class T>
void apply_once(int64_t rows, int64_t columns, int64_t summed, Left<T> left, const T* weight, const T* next,
                Unit<T>* packed, T* out) {
  const int64_t stride = units_of<T>(summed) * PANEL;
  const int64_t step = takes_tiles<T>() ? 2 * PANEL : PANEL;  // few rows by tiles: blocks of two panels
  for (int64_t j = 0; j < columns; j += step) {
    const int64_t own = std::min(step, columns - j);
    pack_columns(weight + j * summed, summed, summed, own, packed);
    if (takes_tiles<T>())
      multiply<T, T>(rows, own, summed, left, packed, stride, out + j, columns, false);
    else
      strip_asking<T>(rows, summed, left, packed, out + j, columns, own, next + j * summed);
  }
}

// Experts that a thread takes at a time, one after the other, so that it knows which comes next: all of them if it is
// alone. After the last of them `next_of` is the expert itself.
int64_t chunk_of(int64_t experts, int threads) {
  return threads == 1 ? std::max<int64_t>(1, experts) : std::clamp<int64_t>(experts / (16 * threads), 1, 16);
}
int64_t next_of(int64_t expert, int64_t chunk, int64_t experts) {
  return (expert + 1) % chunk == 0 || expert + 1 == experts ? expert : expert + 1;
}

template <class T>
void forward(const T* x, const int64_t* sources, const float* weights, const int64_t* ends, const T* gate_up,
             const T* down, T* middle, T* out, Sizes s, int threads) {
  const int64_t twice = 2 * s.hidden;
  const int64_t chunk = chunk_of(s.experts, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t e = 0; e < s.experts; ++e) {
    const TileScope tiles;
    const int64_t start = first_of(ends, e), end = ends[e];
    if (start == end) continue;
    Unit<T>* first = scratch<Unit<T>>(0, packed_size<T>(s.width, twice));
    Unit<T>* second = scratch<Unit<T>>(1, packed_size<T>(s.hidden, s.width));
    T* activated = scratch<T>(2, ROWS * s.hidden);
    const int64_t next = next_of(e, chunk, s.experts), cells = s.width * s.hidden;
    const T *up = gate_up + e * 2 * cells, *back = down + e * cells;
    const bool once = end - start <= ROWS;
    ask_for_expert(gate_up, down, next, cells);
    if (!once) {
      pack_columns(up, s.width, s.width, twice, first);
      pack_columns(back, s.hidden, s.hidden, s.width, second);
    }
    for (int64_t r = start; r < end; r += ROWS) {
      const int64_t count = std::min(ROWS, end - r);
      const T* rows = rows_at(x, sources, r, count, s.width, 9);
      const Left<T> left = left_rows(rows, s.width, s.width, count, 3);
      if (once)
        apply_once(count, twice, s.width, left, up, gate_up + next * 2 * cells, first, middle + r * twice);
      else
        multiply<T, T>(count, twice, s.width, left, first, units_of<T>(s.width) * PANEL, middle + r * twice, twice,
                       false);
      for (int64_t m = 0; m < count; ++m)
        swiglu_row(middle + (r + m) * twice, s.hidden, weights[r + m], activated + m * s.hidden);
      const Left<T> side = left_rows(activated, s.hidden, s.hidden, count, 3);
      if (once)
        apply_once(count, s.width, s.hidden, side, back, down + next * cells, second, out + r * s.width);
      else
        multiply<T, T>(count, s.width, s.hidden, side, second, units_of<T>(s.hidden) * PANEL, out + r * s.width,
                       s.width, false);
    }
  }
  const int64_t last = ends[s.experts - 1];
  std::memset(static_cast<void*>(out + last * s.width), 0, (s.rows - last) * s.width * sizeof(T));
}

// sum[rows, columns] (+)= left^T right, straight to `out` where one block is all there is.
template <class T>
void add_outer(const T* left, int64_t rows, const T* right, int64_t columns, int64_t summed, bool only, bool add,
               float* sum, T* out) {
  Unit<T>*packed = scratch<Unit<T>>(6, packed_size<T>(BLOCK, columns)), *turned = scratch<Unit<T>>(7, BLOCK * rows);
  pack_rows(right, columns, summed, columns, packed);
  const Left<T> side = pack_left(left, rows, summed, rows, turned);
  const int64_t stride = units_of<T>(summed) * PANEL;
  if (only)
    multiply_outward<T>(rows, columns, summed, side, packed, out);
  else
    multiply<T, float>(rows, columns, summed, side, packed, stride, sum, columns, add);
}

template <class T>
struct Backward {
  const T* x;
  const int64_t* sources;
  const float* weights;
  const int64_t* ends;
  const T *gate_up, *down, *middle, *upstream;
  T* grad_x;
  float* grad_weights;
  T *grad_gate_up, *grad_down;
};

template <class T>
void narrow_copy(const float* from, int64_t count, T* to) {
  for (int64_t n = 0; n < count; n += LANES) store(to + n, load(from + n, count - n), count - n);
}

template <class T>
void backward_expert(const Backward<T>& b, const Sizes& s, int64_t e, int64_t next) {
  const TileScope tiles;
  const int64_t start = first_of(b.ends, e), end = b.ends[e], twice = 2 * s.hidden, cells = s.width * s.hidden;
  T *grad_up = b.grad_gate_up + e * 2 * cells, *grad_down = b.grad_down + e * cells;
  if (start == end) {
    std::memset(static_cast<void*>(grad_up), 0, 2 * cells * sizeof(T));
    std::memset(static_cast<void*>(grad_down), 0, cells * sizeof(T));
    return;
  }
  const T *gate_up = b.gate_up + e * 2 * cells, *down = b.down + e * cells;
  const bool once = end - start <= PART;
  ask_for_expert(b.gate_up, b.down, next, cells);
  ask_for_expert(b.grad_gate_up, b.grad_down, e, cells);
  Unit<T>*up_rows = nullptr, *down_rows = nullptr;
  if (!once) {
    up_rows = scratch<Unit<T>>(0, packed_size<T>(twice, s.width));
    down_rows = scratch<Unit<T>>(1, packed_size<T>(s.width, s.hidden));
    pack_rows(gate_up, s.width, twice, s.width, up_rows);
    pack_rows(down, s.hidden, s.width, s.hidden, down_rows);
  }
  const bool only = end - start <= BLOCK;
  float* sums = only ? nullptr : scratch<float>(4, 3 * cells);
  T *change = scratch<T>(2, BLOCK * twice), *activated = scratch<T>(5, BLOCK * s.hidden);
  float* grad = scratch<float>(8, PART * s.hidden);
  for (int64_t r = start; r < end; r += BLOCK) {
    const int64_t count = std::min(BLOCK, end - r);
    const T* upstream = rows_at(b.upstream, b.sources, r, count, s.width, 9);
    for (int64_t m = 0; m < count; m += PART) {
      const int64_t part = std::min(PART, count - m), at = r + m;
      const Left<T> above = left_rows(upstream + m * s.width, s.width, s.width, part, 3);
      if (once)
        multiply_once<T, float>(part, s.hidden, s.width, above, down, b.down + next * cells, grad, 1);
      else
        multiply<T, float>(part, s.hidden, s.width, above, down_rows, units_of<T>(s.width) * PANEL, grad, s.hidden,
                           false);
      for (int64_t i = 0; i < part; ++i)
        b.grad_weights[at + i] = swiglu_row_backward(b.middle + (at + i) * twice, grad + i * s.hidden, s.hidden,
                                                     b.weights[at + i], change + (m + i) * twice,
                                                     activated + (m + i) * s.hidden);
      const Left<T> changed = rows_of(change + m * twice, twice);
      T* grad_x = b.grad_x + at * s.width;
      if (once)
        multiply_once<T, T>(part, s.width, twice, changed, gate_up, b.gate_up + next * 2 * cells, grad_x, 0);
      else
        multiply<T, T>(part, s.width, twice, changed, up_rows, units_of<T>(twice) * PANEL, grad_x, s.width, false);
    }
    const bool add = r > start;
    add_outer(upstream, s.width, activated, s.hidden, count, only, add, sums, grad_down);
    add_outer(change, twice, rows_at(b.x, b.sources, r, count, s.width, 9), s.width, count, only, add, sums + cells,
              grad_up);
  }
  if (!only) narrow_copy(sums, cells, grad_down), narrow_copy(sums + cells, 2 * cells, grad_up);
}

template <class T>
void backward(const Backward<T>& b, const Sizes& s, int threads) {
  const int64_t chunk = chunk_of(s.experts, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t e = 0; e < s.experts; ++e) backward_expert(b, s, e, next_of(e, chunk, s.experts));
  const int64_t last = b.ends[s.experts - 1];
  std::memset(static_cast<void*>(b.grad_x + last * s.width), 0, (s.rows - last) * s.width * sizeof(T));
  std::memset(b.grad_weights + last, 0, (s.rows - last) * sizeof(float));
}

}  // namespace

extern "C" {

void ernie5_experts_forward(int narrow, const void* x, const int64_t* sources, const float* weights,
                            const int64_t* ends, const void* gate_up, const void* down, void* middle, void* out,
                            int64_t rows, int64_t width, int64_t hidden, int64_t experts, int threads) {
  const Sizes s{rows, width, hidden, experts};
  if (narrow)
    forward((const bf16*)x, sources, weights, ends, (const bf16*)gate_up, (const bf16*)down, (bf16*)middle, (bf16*)out,
            s, threads);
  else
    forward((const float*)x, sources, weights, ends, (const float*)gate_up, (const float*)down, (float*)middle,
            (float*)out, s, threads);
}

void ernie5_experts_backward(int narrow, const void* x, const int64_t* sources, const float* weights,
                             const int64_t* ends, const void* gate_up, const void* down, const void* middle,
                             const void* upstream, void* grad_x, float* grad_weights, void* grad_gate_up,
                             void* grad_down, int64_t rows, int64_t width, int64_t hidden, int64_t experts,
                             int threads) {
  const Sizes s{rows, width, hidden, experts};
  if (narrow)
    backward<bf16>({(const bf16*)x, sources, weights, ends, (const bf16*)gate_up, (const bf16*)down,
                    (const bf16*)middle, (const bf16*)upstream, (bf16*)grad_x, grad_weights, (bf16*)grad_gate_up,
                    (bf16*)grad_down},
                   s, threads);
  else
    backward<float>({(const float*)x, sources, weights, ends, (const float*)gate_up, (const float*)down,
                     (const float*)middle, (const float*)upstream, (float*)grad_x, grad_weights, (float*)grad_gate_up,
                     (float*)grad_down},
                    s, threads);
}
}
