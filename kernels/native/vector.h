// Vectors of one register's width, bf16 and exp, in GCC's portable vector types; intrinsics only for bf16 products.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

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
inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

// exp with Cephes' polynomial (relative error 2e-7): 2^n by the exponent's bits, the rest by degree six. NaN stays.
inline vfloat exponential(vfloat x) {
  const vfloat magic = splat(12582912.0f);
  const vfloat low = splat(-87.33654f), high = splat(88.37626f);
  vfloat y = x < low ? low : x;
  y = y > high ? high : y;
  vfloat shifted = y * 1.44269504f + magic;
  vfloat n = shifted - magic;
  vfloat r = y - n * 0.693359375f - n * -2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vfloat power = (vfloat)(((vint)shifted + 127) << 23);
  return x < low ? vfloat{} : p * power;
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
