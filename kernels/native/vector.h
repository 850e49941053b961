// Vectors of one register's width, bf16 and exp, in GCC's portable vector types; with AVX-512 some steps by intrinsics.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else  // SSE, NEON; GCC keeps vectors that are wider than a register in memory
constexpr int LANES = 4;
#endif
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

constexpr int64_t LINE = 64, PAGE = 4096;  // bytes that memory hands out together; of a page, or of a part of one
inline void ask_for(const void* p) { __builtin_prefetch(p, 0, 2); }  // to the second cache: more may be under way there
// One line of each page of `count` elements from element `first` on, all at once: the processor looks up where pages lie
// side by side, while a reader or a writer that meets them one after the other waits for each. They need not exist.
template <class T>
inline void ask_for_pages(const T* elements, int64_t first, int64_t count) {
  const uintptr_t start = uintptr_t(elements) + first * sizeof(T), bytes = count * sizeof(T);
  for (uintptr_t n = 0; elements != nullptr && n < bytes; n += PAGE) ask_for(reinterpret_cast<const void*>(start + n));
}

inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x + vint{}; }

inline vfloat load(const float* p) {
  vfloat x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vfloat load(const bf16* p) {
  vhalf x;
  std::memcpy(&x, p, sizeof x);
  return (vfloat)(__builtin_convertvector(x, vuint) << 16);
}
inline void store(float* p, vfloat x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vfloat x) {  // to nearest even; a NaN stays one
#if defined(__AVX512BF16__)
  __m256bh y = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &y, sizeof y);
#else
  vuint u = (vuint)x;
  vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  rounded = (x == x) ? rounded : ((u >> 16) | 0x40);
  vhalf y = __builtin_convertvector(rounded, vhalf);
  std::memcpy(p, &y, sizeof y);
#endif
}
template <class T>
inline vfloat load(const T* p, int64_t count) {  // the first `count` of a vector, zero behind
  if (count >= LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <class T>
inline void store(T* p, vfloat x, int64_t count) {
  if (count >= LANES) return store(p, x);
  T part[LANES];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

inline float total(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
#endif
}
inline float largest(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < LANES; ++i) top = std::max(top, x[i]);
  return top;
#endif
}
inline int first_equal(vfloat x, float value) {  // the lane, or -1
#if defined(__AVX512F__)
  const __mmask16 equal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(value), _CMP_EQ_OQ);
  return equal ? __builtin_ctz(equal) : -1;
#else
  for (int i = 0; i < LANES; ++i)
    if (x[i] == value) return i;
  return -1;
#endif
}
inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

constexpr float C1 = 6.931469776e-1f, C2 = 2.402224209e-1f, C3 = 5.550733743e-2f, C4 = 9.671512645e-3f;
constexpr float C5 = 1.326472712e-3f;

// 2^(n + r) for whole n and |r| <= 1/2: a polynomial fitted to relative error 1e-7, then the exponent's bits. Where n
// stops at 127 the polynomial of what is left runs to infinity.
inline vfloat power_of_two(vfloat n, vfloat r) {
  vfloat p = r * C5 + C4;
  p = p * r + C3;
  p = p * r + C2;
  p = p * r + C1;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  n = n < splat(-126.0f) ? splat(-127.0f) : n;
  return p * (vfloat)(((__builtin_convertvector(n, vint)) + 127) << 23);
#endif
}
inline vfloat whole_power(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vfloat magic = splat(12582912.0f), n = (x + magic) - magic;
  return n > splat(127.0f) ? splat(127.0f) : n;  // the largest exponent; infinity less itself would be no number
#endif
}
inline vfloat at_least(vfloat low, vfloat x) {  // a NaN stays one
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)low, (__m512)x);
#else
  return x < low ? low : x;
#endif
}
// 2^x and e^x; -inf gives zero, what is too large infinity, NaN stays.
inline vfloat exponential2(vfloat x) {
  x = at_least(splat(-160.0f), x);
  const vfloat n = whole_power(x);
  return power_of_two(n, x - n);
}
inline vfloat exponential(vfloat x) {
  constexpr float log2e = 1.44269504f;
  x = at_least(splat(-110.0f), x);
  const vfloat n = whole_power(x * log2e);
  vfloat r;
#if defined(__AVX512F__)
  r = (vfloat)_mm512_fmsub_ps((__m512)x, (__m512)splat(log2e), (__m512)n);  // GCC would round the product, used twice
#else
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(x[i], log2e, -n[i]);
#endif
  return power_of_two(n, r);
}
inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exponential(-x)); }

// Memory of this thread, grown and kept; one slot per purpose.
template <class T>
inline T* scratch(int slot, size_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[24];
  Buffer& own = buffers[slot];
  size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
  if (own.bytes < bytes) {
    std::free(own.data);
    own.data = std::aligned_alloc(64, bytes);
    own.bytes = bytes;
  }
  return static_cast<T*>(own.data);
}
