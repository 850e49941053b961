// Attention under row intervals (FlashMask): online softmax forward, scores made again backward, panels of keys that no
// query of a block may see are skipped, and the mask is applied in those blocks alone that a border crosses.
// Equations: Dao et al. 2022 (arXiv:2205.14135). One thread owns one key head of one row, so sums have one order.
#include <limits>
#include <vector>

#include "gemm.h"

namespace {

constexpr int64_t QUERIES = TILES ? 64 : 48, KEYS = 64;  // small, because documents are short and a block is skipped whole
constexpr float LOG2E = 1.44269504f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Shape {
  int64_t batch, queries, keys, heads, groups, width, start;
  float scale, scale2;  // of scores, and the same for powers of two
  int64_t shared() const { return heads / groups; }
};

struct Intervals {  // of one panel of keys: extremes over its columns
  int from_least, from_most, until_least, until_most, hidden_least, hidden_most;
};

Intervals extremes(const int32_t* columns, int64_t count) {
  constexpr int far = std::numeric_limits<int>::max();
  Intervals e{far, 0, far, 0, far, 0};
  for (int64_t n = 0; n < count; ++n) {
    const int32_t* c = columns + 4 * n;
    e.from_least = std::min(e.from_least, c[0]), e.from_most = std::max(e.from_most, c[0]);
    e.until_least = std::min(e.until_least, c[3]), e.until_most = std::max(e.until_most, c[3]);
    if (c[1] < c[2]) e.hidden_least = std::min(e.hidden_least, c[1]), e.hidden_most = std::max(e.hidden_most, c[2]);
  }
  return e;
}

bool sees(const Intervals& e, int64_t first, int64_t end) { return e.until_most > first && e.from_least < end; }
bool sees_all(const Intervals& e, int64_t first, int64_t end) {
  const bool hides = e.hidden_least < end && e.hidden_most > first;
  return e.from_most <= first && e.until_least >= end && !hides;
}

// What the queries of one block see of one block of keys: first and count of either, and whether a mask is needed.
struct Block {
  int64_t query, queries, key, keys;
  const int32_t* columns;  // [keys, 4], null where all is visible
};

class Mask {
 public:
  Mask(const int32_t* intervals, const Shape& s) : intervals_(intervals), shape_(s) {
    if (intervals_ == nullptr) return;
    for (int64_t k = 0; k < s.keys; k += PANEL)
      panels_.push_back(extremes(intervals_ + 4 * k, std::min<int64_t>(PANEL, s.keys - k)));
  }
  bool next(Block& b) const {  // on to the next keys, whole panels, that a query of the block sees; false: no more
    int64_t key = b.key + b.keys, end;
    if (intervals_ == nullptr) {
      b.key = key, b.keys = std::min(KEYS, shape_.keys - key);
      return b.keys > 0;
    }
    const int64_t first = shape_.start + b.query, last = first + b.queries;
    while (key < shape_.keys && !sees(panels_[key / PANEL], first, last)) key += PANEL;
    bool full = true;
    for (end = key; end < shape_.keys && end < key + KEYS && sees(panels_[end / PANEL], first, last); end += PANEL)
      full &= sees_all(panels_[end / PANEL], first, last);
    b.key = key, b.keys = std::min(end, shape_.keys) - key;
    b.columns = full ? nullptr : intervals_ + 4 * key;
    return b.keys > 0;
  }

 private:
  const int32_t* intervals_;
  const Shape& shape_;
  std::vector<Intervals> panels_;
};

struct Columns {  // intervals of LANES columns, turned so that lanes are columns
  vint from, hidden_from, hidden_until, until;
};

Columns* turn(const int32_t* columns, int64_t count) {
  Columns* out = scratch<Columns>(0, (count + LANES - 1) / LANES);
  for (int64_t n = 0; n < count; n += LANES) {
    Columns& c = out[n / LANES];
    for (int i = 0; i < LANES; ++i) {
      const bool real = n + i < count;
      const int32_t* p = columns + 4 * (n + i);
      c.from[i] = real ? p[0] : std::numeric_limits<int>::max();
      c.hidden_from[i] = real ? p[1] : 0, c.hidden_until[i] = real ? p[2] : 0, c.until[i] = real ? p[3] : 0;
    }
  }
  return out;
}

// Scores of a block to -inf where hidden, in place.
void hide(float* scores, const Block& b, int64_t start) {
  const Columns* columns = turn(b.columns, b.keys);
  for (int64_t m = 0; m < b.queries; ++m) {
    const vint row = splat(int32_t(start + b.query + m));
    for (int64_t n = 0; n < b.keys; n += LANES) {
      const Columns& c = columns[n / LANES];
      const vint seen = (c.from <= row) & (row < c.until) & ~((c.hidden_from <= row) & (row < c.hidden_until));
      float* p = scores + m * KEYS + n;
      store(p, seen ? load(p) : splat(NEVER));
    }
  }
}

// Columns past the last key to `value`, up to a whole number of vectors.
void fill_rest(float* scores, const Block& b, float value) {
  const int64_t whole = (b.keys + LANES - 1) / LANES * LANES;
  for (int64_t m = 0; m < b.queries && b.keys < whole; ++m)
    std::fill(scores + m * KEYS + b.keys, scores + m * KEYS + whole, value);
}

// One row of scores [count] to weights 2^(scale s - peak) in T; their sum.
template <class T>
float weigh(const float* scores, int64_t count, float scale, float peak, T* weights) {
  vfloat sum{};
  for (int64_t n = 0; n < count; n += LANES) {
    const vfloat w = exponential2(load(scores + n) * scale - peak);
    sum += w;
    store(weights + n, w);
  }
  return total(sum);
}

float row_peak(const float* scores, int64_t count) {
  vfloat top = splat(NEVER);
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES) top = larger(load(scores + n), top);
  float peak = largest(top);
  for (; n < count; ++n) peak = std::max(peak, scores[n]);
  return peak;
}

template <class T>
struct Packed {  // keys and values of one head as right sides
  Unit<T>*key_columns, *value_columns, *key_rows, *value_rows;
  int64_t column_stride, row_stride;
  const Unit<T>* columns(const Unit<T>* p, int64_t key) const { return p + key / PANEL * column_stride; }
  const Unit<T>* rows(const Unit<T>* p, int64_t key) const { return p + key / depth_of<T> * PANEL; }
};

template <class T>
Unit<T>* columns_of(const T* p, const Shape& s, int slot) {
  Unit<T>* out = scratch<Unit<T>>(slot, packed_size<T>(s.width, s.keys));
  pack_columns(p, s.groups * s.width, s.width, s.keys, out);
  return out;
}
template <class T>
Unit<T>* packed_rows_of(const T* p, const Shape& s, int slot) {
  Unit<T>* out = scratch<Unit<T>>(slot, packed_size<T>(s.keys, s.width));
  pack_rows(p, s.groups * s.width, s.keys, s.width, out);
  return out;
}
template <class T>
Packed<T> pack(const T* key, const T* value, const Shape& s, bool backward) {
  Packed<T> p{};
  p.column_stride = units_of<T>(s.width) * PANEL, p.row_stride = units_of<T>(s.keys) * PANEL;
  p.key_columns = columns_of(key, s, 1);
  if (backward)
    p.value_columns = columns_of(value, s, 2), p.key_rows = packed_rows_of(key, s, 3);
  else
    p.value_rows = packed_rows_of(value, s, 2);
  return p;
}

template <class T>
void scores_of(const T* query, const Packed<T>& p, const Block& b, const Shape& s, float* scores) {
  multiply<T, float>(b.queries, b.keys, s.width, rows_of(query, s.heads * s.width), p.columns(p.key_columns, b.key),
                     p.column_stride, scores, KEYS, false);
  if (b.columns != nullptr) hide(scores, b, s.start);
  fill_rest(scores, b, NEVER);
}

template <class T>
void softmax_block(const Block& b, const Shape& s, const float* scores, float* peaks, float* sums, float* sum_out,
                   T* weights) {
  for (int64_t m = 0; m < b.queries; ++m) {
    const float* row = scores + m * KEYS;
    const float peak = std::max(peaks[m], row_peak(row, b.keys) * s.scale2);
    if (peak == NEVER) {  // nothing visible here, or nothing but NaN, which must not pass for that
      if (std::any_of(row, row + b.keys, [](float x) { return x != x; })) sums[m] = NAN;
      std::memset(static_cast<void*>(weights + m * KEYS), 0, KEYS * sizeof(T));
      continue;
    }
    if (peak > peaks[m] && sums[m] > 0) {
      const float shrink = std::exp2(peaks[m] - peak);
      sums[m] *= shrink;
      for (int64_t c = 0; c < s.width; c += LANES)
        store(sum_out + m * s.width + c, load(sum_out + m * s.width + c, s.width - c) * shrink, s.width - c);
    }
    peaks[m] = peak;
    sums[m] += weigh(row, b.keys, s.scale2, peak, weights + m * KEYS);
  }
}

template <class T>
void forward_head(const T* query, const Packed<T>& p, const Mask& mask, const Shape& s, T* out, float* lse) {
  float* scores = scratch<float>(4, QUERIES * KEYS);
  T* weights = scratch<T>(5, QUERIES * KEYS);
  float* sum_out = scratch<float>(6, QUERIES * s.width);
  const int64_t leading = s.heads * s.width;
  for (int64_t q = 0; q < s.queries; q += QUERIES) {
    float peaks[QUERIES], sums[QUERIES] = {};
    std::fill_n(peaks, QUERIES, NEVER);
    Block b{q, std::min(QUERIES, s.queries - q), 0, 0, nullptr};
    std::memset(sum_out, 0, b.queries * s.width * sizeof(float));
    while (mask.next(b)) {
      scores_of(query + q * leading, p, b, s, scores);
      softmax_block(b, s, scores, peaks, sums, sum_out, weights);
      multiply<T, float>(b.queries, s.width, b.keys, rows_of(weights, KEYS), p.rows(p.value_rows, b.key),
                         p.row_stride, sum_out, s.width, true);
    }
    for (int64_t m = 0; m < b.queries; ++m) {
      const float inverse = sums[m] > 0 ? 1.0f / sums[m] : 0.0f * sums[m];
      lse[(q + m) * s.heads] = sums[m] == 0 ? -NEVER : peaks[m] + std::log2(sums[m]);
      for (int64_t c = 0; c < s.width; c += LANES)
        store(out + (q + m) * leading + c, load(sum_out + m * s.width + c, s.width - c) * inverse, s.width - c);
    }
  }
}

// Units of two neighbouring rows (bf16), or of one (fp32), as pack_left makes them.
inline void zip(vfloat first, vfloat, float* out) { store(out, first); }
inline void zip(vfloat first, vfloat second, Unit<bf16>* out) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
#else
  bf16 rows[2][LANES];
  store(rows[0], first), store(rows[1], second);
  zip_rows(rows[0], rows[1], LANES, out);
#endif
}

// Where units of column n begin in a block of weights: turned rows of KEYS, or for tiles panels of a right side.
template <class T>
int64_t column_of(const Block& b, int64_t n) {
  return takes_tiles<T>() ? n / PANEL * units_of<T>(b.queries) * PANEL + n % PANEL : n;
}

// Weights 2^(scale2 s - lse), turned; changes of the scores scale * weights * (dP - delta), as rows and turned. Columns
// up to a whole number of vectors hold numbers, those past b.keys zeros.
template <class T>
void change_block(const Block& b, const Shape& s, const float* scores, const float* grads, const float* lse,
                  const float* delta, Unit<T>* weights, T* changes, Unit<T>* turned) {
  constexpr int depth = depth_of<T>;
  const int64_t leading = takes_tiles<T>() ? PANEL : KEYS;
  for (int64_t m = 0; m < b.queries; m += depth)
    for (int64_t n = 0; n < b.keys; n += LANES) {
      vfloat w[2] = {}, c[2] = {};
      for (int i = 0; i < depth && m + i < b.queries; ++i) {
        const int64_t at = (m + i) * KEYS + n;
        w[i] = exponential2(load(scores + at) * s.scale2 - lse[(b.query + m + i) * s.heads]);
        c[i] = w[i] * (load(grads + at) - delta[m + i]) * s.scale;
        store(changes + at, c[i]);
      }
      zip(w[0], w[1], weights + m / depth * leading + column_of<T>(b, n));
      zip(c[0], c[1], turned + m / depth * leading + column_of<T>(b, n));
    }
}

template <class T>
struct Gradients {
  const T *upstream, *out;
  const float* lse;
  T* query;
  float *key, *value;  // [keys, width] sums over the heads that share this key head; by tiles [width, keys]
};

template <class T>
void row_deltas(const Gradients<T>& g, const Block& b, const Shape& s, float* delta) {
  for (int64_t m = 0; m < b.queries; ++m) {
    vfloat sum{};
    const int64_t at = (b.query + m) * s.heads * s.width;
    for (int64_t c = 0; c < s.width; c += LANES)
      sum += load(g.upstream + at + c, s.width - c) * load(g.out + at + c, s.width - c);
    delta[m] = total(sum);
  }
}

// Sides of the products that make gradients of keys and values: one [queries, width] right side, or for tiles, whose
// left sides are row-major, the same transposed as a left side.
template <class T>
void pack_side(const T* source, int64_t leading, const Block& b, const Shape& s, Unit<T>* packed) {
  if (takes_tiles<T>())
    pack_left(source, leading, b.queries, s.width, packed);
  else
    pack_rows(source, leading, b.queries, s.width, packed);
}

// sums (+)= weights^T side, [keys, width]; by tiles transposed, side^T weights, because the weights lie as a right side.
template <class T>
void add_to_keys(const Unit<T>* weights, const Unit<T>* side, const Block& b, const Shape& s, float* sums) {
  const int64_t units = units_of<T>(b.queries);
  if (takes_tiles<T>())
    multiply<T, float>(s.width, b.keys, b.queries, {side, units, 1}, weights, units * PANEL, sums + b.key, s.keys,
                       true);
  else
    multiply<T, float>(b.keys, s.width, b.queries, {weights, 1, KEYS}, side, units * PANEL, sums + b.key * s.width,
                       s.width, true);
}

template <class T>
void backward_head(const T* query, const Packed<T>& p, const Mask& mask, const Shape& s, const Gradients<T>& g) {
  float *scores = scratch<float>(5, QUERIES * KEYS), *grads = scratch<float>(6, QUERIES * KEYS);
  Unit<T>*weights = scratch<Unit<T>>(7, QUERIES * KEYS), *turned = scratch<Unit<T>>(12, QUERIES * KEYS);
  T* changes = scratch<T>(8, QUERIES * KEYS);
  float* grad_query = scratch<float>(9, QUERIES * s.width);
  const size_t packed = packed_size<T>(QUERIES, s.width);
  Unit<T>*query_rows = scratch<Unit<T>>(10, packed), *upstream_rows = scratch<Unit<T>>(11, packed);
  const int64_t leading = s.heads * s.width;
  float delta[QUERIES];
  for (int64_t q = 0; q < s.queries; q += QUERIES) {
    Block b{q, std::min(QUERIES, s.queries - q), 0, 0, nullptr};
    const T *own = query + q * leading, *upstream = g.upstream + q * leading;
    row_deltas(g, b, s, delta);
    pack_side(own, leading, b, s, query_rows);
    pack_side(upstream, leading, b, s, upstream_rows);
    std::memset(grad_query, 0, b.queries * s.width * sizeof(float));
    while (mask.next(b)) {
      scores_of(own, p, b, s, scores);
      multiply<T, float>(b.queries, b.keys, s.width, rows_of(upstream, leading), p.columns(p.value_columns, b.key),
                         p.column_stride, grads, KEYS, false);
      fill_rest(grads, b, 0.0f);
      change_block(b, s, scores, grads, g.lse, delta, weights, changes, turned);
      multiply<T, float>(b.queries, s.width, b.keys, rows_of(changes, KEYS), p.rows(p.key_rows, b.key),
                         p.row_stride, grad_query, s.width, true);
      add_to_keys<T>(weights, upstream_rows, b, s, g.value);
      add_to_keys<T>(turned, query_rows, b, s, g.key);
    }
    for (int64_t m = 0; m < b.queries; ++m)
      for (int64_t c = 0; c < s.width; c += LANES)
        store(g.query + (q + m) * leading + c, load(grad_query + m * s.width + c, s.width - c), s.width - c);
  }
}

// Sums of add_to_keys to one head's gradients.
template <class T>
void narrow_keys(const float* sums, const Shape& s, T* out) {
  float square[LANES * LANES];
  for (int64_t k = 0; k < s.keys; k += LANES)
    for (int64_t c = 0; c < s.width; c += LANES) {
      const int64_t keys = std::min<int64_t>(LANES, s.keys - k), left = s.width - c;
      const float* from = sums + k * s.width + c;
      if (takes_tiles<T>())
        transpose_part(sums + c * s.keys + k, s.keys, std::min<int64_t>(LANES, left), keys, square, LANES);
      for (int64_t i = 0; i < keys; ++i)
        store(out + (k + i) * s.groups * s.width + c,
              takes_tiles<T>() ? load(square + i * LANES) : load(from + i * s.width, left), left);
    }
}

template <class T>
void forward(const T* query, const T* key, const T* value, const int32_t* intervals, T* out, float* lse, Shape s,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < s.batch * s.groups; ++item) {
    const TileScope tiles;
    const int64_t row = item / s.groups, group = item % s.groups;
    const int64_t at = row * s.keys * s.groups * s.width + group * s.width;
    const Mask mask(intervals == nullptr ? nullptr : intervals + row * s.keys * 4, s);
    const Packed<T> packed = pack(key + at, value + at, s, false);
    for (int64_t h = group * s.shared(); h < (group + 1) * s.shared(); ++h) {
      const int64_t first = row * s.queries * s.heads + h;
      forward_head(query + first * s.width, packed, mask, s, out + first * s.width, lse + first);
    }
  }
}

template <class T>
void backward(const T* query, const T* key, const T* value, const int32_t* intervals, const T* out, const float* lse,
              const T* upstream, T* grad_query, T* grad_key, T* grad_value, Shape s, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < s.batch * s.groups; ++item) {
    const TileScope tiles;
    const int64_t row = item / s.groups, group = item % s.groups;
    const int64_t at = row * s.keys * s.groups * s.width + group * s.width;
    const Mask mask(intervals == nullptr ? nullptr : intervals + row * s.keys * 4, s);
    const Packed<T> packed = pack(key + at, value + at, s, true);
    float* sums = scratch<float>(4, 2 * s.keys * s.width);
    std::memset(sums, 0, 2 * s.keys * s.width * sizeof(float));
    float *sum_key = sums, *sum_value = sums + s.keys * s.width;
    for (int64_t h = group * s.shared(); h < (group + 1) * s.shared(); ++h) {
      const int64_t first = row * s.queries * s.heads + h, cell = first * s.width;
      backward_head(query + cell, packed, mask, s,
                    {upstream + cell, out + cell, lse + first, grad_query + cell, sum_key, sum_value});
    }
    narrow_keys(sum_key, s, grad_key + at);
    narrow_keys(sum_value, s, grad_value + at);
  }
}

}  // namespace

extern "C" {

void ernie5_attention_forward(int narrow, const void* query, const void* key, const void* value,
                              const int32_t* intervals, void* out, float* lse, int64_t batch, int64_t queries,
                              int64_t keys, int64_t heads, int64_t groups, int64_t width, float scale, int threads) {
  const Shape s{batch, queries, keys, heads, groups, width, keys - queries, scale, scale * LOG2E};
  if (narrow)
    forward((const bf16*)query, (const bf16*)key, (const bf16*)value, intervals, (bf16*)out, lse, s, threads);
  else
    forward((const float*)query, (const float*)key, (const float*)value, intervals, (float*)out, lse, s, threads);
}

void ernie5_attention_backward(int narrow, const void* query, const void* key, const void* value,
                               const int32_t* intervals, const void* out, const float* lse, const void* upstream,
                               void* grad_query, void* grad_key, void* grad_value, int64_t batch, int64_t queries,
                               int64_t keys, int64_t heads, int64_t groups, int64_t width, float scale, int threads) {
  const Shape s{batch, queries, keys, heads, groups, width, keys - queries, scale, scale * LOG2E};
  if (narrow)
    backward((const bf16*)query, (const bf16*)key, (const bf16*)value, intervals, (const bf16*)out, lse,
             (const bf16*)upstream, (bf16*)grad_query, (bf16*)grad_key, (bf16*)grad_value, s, threads);
  else
    backward((const float*)query, (const float*)key, (const float*)value, intervals, (const float*)out, lse,
             (const float*)upstream, (float*)grad_query, (float*)grad_key, (float*)grad_value, s, threads);
}
}
