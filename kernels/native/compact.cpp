// AdamW with less state: moments as 8-bit codes with a scale per block, bf16 weights rounded at random. The format stands
// in adamw_compact/reference.py. What is random is a hash of a seed and of the element's place, so that neither threads
// nor a new start change a bit.
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 256, CHUNK = 64 * BLOCK;
constexpr int FIRST_SHIFT = 20, SECOND_SHIFT = 19;  // mantissa bits left out: a sign and 3 bits stay, or 4
constexpr uint32_t ONE = 0x3f800000;
typedef uint8_t vbyte __attribute__((vector_size(LANES)));

struct Adam {
  float rate, blend1, beta2, blend2, epsilon, root, scale;  // AdamWStep.factors, and what gradients are multiplied by
};

// C. Wellons' "lowbias32" hash.
inline vuint mixed(vuint x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
inline vuint places(uint32_t first) {
  vuint steps;
  for (int i = 0; i < LANES; ++i) steps[i] = i;
  return steps + first;
}

template <class V>
inline void copy_lanes(void* to, const void* from, int64_t left, int64_t bytes) {  // a whole vector without a call
  if (left >= LANES)
    std::memcpy(to, from, sizeof(V));
  else
    std::memcpy(to, from, left * bytes);
}

inline vuint widened(const vbyte& bytes) {
#if defined(__AVX512F__)
  return (vuint)_mm512_cvtepu8_epi32((__m128i)bytes);  // GCC 12 would convert lane by lane
#else
  return __builtin_convertvector(bytes, vuint);
#endif
}
inline vbyte narrowed(vuint x) {
#if defined(__AVX512F__)
  return (vbyte)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, vbyte);
#endif
}

inline vfloat decode(const uint8_t* codes, int64_t left, float scale, int shift, bool has_sign) {
  vbyte bytes{};
  copy_lanes<vbyte>(&bytes, codes, left, 1);
  const vuint code = widened(bytes);
  const vuint size = has_sign ? code & 0x7fu : code;
  const vfloat value = ((vfloat)((size << shift) + ONE) - 1.0f) * scale;
  return has_sign ? (vfloat)((vuint)value | ((code & 0x80u) << 24)) : value;
}

// The first bits of the float 1 + |x| / scale, rounded up or down at random by the bits that are left out.
inline vuint encode(vfloat x, float inverse, int shift, uint32_t largest, vuint random) {
  const vfloat size = (vfloat)((vuint)x & 0x7fffffffu) * inverse + 1.0f;
  const vuint code = ((vuint)size - ONE + (random & ((1u << shift) - 1))) >> shift;
  return code < largest ? code : largest + vuint{};
}
inline void store_codes(uint8_t* codes, vuint code, int64_t left) {
  const vbyte bytes = narrowed(code);
  copy_lanes<vbyte>(codes, &bytes, left, 1);
}

inline void store_random(float* p, vfloat x, vuint, int64_t left) { store(p, x, left); }
inline void store_random(bf16* p, vfloat x, vuint random, int64_t left) {
  const vuint high = ((vuint)x + (random & 0xffffu)) >> 16;
  const vuint bits = x == x ? high : vuint{} + 0x7fc0u;  // a NaN of all ones would overflow to zero
#if defined(__AVX512F__)
  const vhalf y = (vhalf)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  const vhalf y = __builtin_convertvector(bits, vhalf);
#endif
  copy_lanes<vhalf>(p, &y, left, sizeof(bf16));
}

struct Moment {  // fp32 values, or codes with scales per block
  float* values;
  uint8_t* codes;
  float* scales;
};

struct Seeds {
  uint32_t weights, moments;
};

struct Block {
  float first[BLOCK], second[BLOCK];  // moments; of the second one its root where it is kept as codes
};

inline vfloat root_of(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// The largest of sizes that are compared as integers, whose order is the same and where NaN is above all.
inline float top_of(const vuint& sizes) {
  uint32_t top = 0;
  for (int i = 0; i < LANES; ++i) top = std::max(top, sizes[i]);
  float value;
  std::memcpy(&value, &top, sizeof value);
  return value;
}

void encode_block(const Block& b, int64_t at, int64_t count, const Moment& first, const Moment& second, uint32_t seed,
                  vuint peak_first, vuint peak_second) {
  constexpr float first_range = 61439.0f, second_range = 63487.0f;  // what the largest codes decode to
  const float tops[2] = {top_of(peak_first), top_of(peak_second)};
  const float inverses[2] = {tops[0] > 0 ? first_range / tops[0] : 0.0f, tops[1] > 0 ? second_range / tops[1] : 0.0f};
  first.scales[at / BLOCK] = tops[0] / first_range, second.scales[at / BLOCK] = tops[1] / second_range;
  for (int64_t n = 0; n < count; n += LANES) {
    const vuint random = mixed(places(seed + uint32_t(at + n)));
    const vfloat m = load(b.first + n), s = load(b.second + n);
    const vuint sign = ((vuint)m >> 24) & 0x80u;
    const vuint code = encode(s, inverses[1], SECOND_SHIFT, 255, random);
    const vuint least = s > 0.0f ? vuint{} + 1u : vuint{};  // a root that fell to zero would divide by epsilon alone
    store_codes(first.codes + at + n, encode(m, inverses[0], FIRST_SHIFT, 127, random >> 12) | sign, count - n);
    store_codes(second.codes + at + n, code > least ? code : least, count - n);
  }
}

template <class P, class G>
void update_block(const Adam& a, float keep, P* parameter, const G* gradient, const Moment& first, const Moment& second,
                  bf16* copy, int64_t at, int64_t count, Seeds seeds) {
  const bool coded = first.codes != nullptr;
  const float first_scale = coded ? first.scales[at / BLOCK] : 0, second_scale = coded ? second.scales[at / BLOCK] : 0;
  Block b;
  vuint peak_first{}, peak_second{};
  for (int64_t n = 0; n < count; n += LANES) {
    const int64_t left = count - n, i = at + n;
    const vfloat g = load(gradient + i, left) * a.scale;
    vfloat m, v;
    if (coded) {
      m = decode(first.codes + i, left, first_scale, FIRST_SHIFT, true);
      v = decode(second.codes + i, left, second_scale, SECOND_SHIFT, false);
      v *= v;
    } else {
      m = load(first.values + i, left), v = load(second.values + i, left);
    }
    m += (g - m) * a.blend1;
    v = v * a.beta2 + g * g * a.blend2;
    const vfloat spread = root_of(v);
    const vfloat p = load(parameter + i, left) * keep - a.rate * m / (spread * a.root + a.epsilon);
    store_random(parameter + i, p, mixed(places(seeds.weights + uint32_t(i))), left);
    if (copy != nullptr) store(copy + i, p, left);
    if (!coded) {
      store(first.values + i, m, left), store(second.values + i, v, left);
      continue;
    }
    store(b.first + n, m), store(b.second + n, spread);
    const vuint size_first = (vuint)m & 0x7fffffffu, size_second = (vuint)spread & 0x7fffffffu;
    peak_first = size_first > peak_first ? size_first : peak_first;
    peak_second = size_second > peak_second ? size_second : peak_second;
  }
  if (coded) encode_block(b, at, count, first, second, seeds.moments, peak_first, peak_second);
}

}  // namespace

extern "C" {

// One tensor. Moments: values [count], or codes [count] and scales [blocks]; what is not used is null.
void ernie5_adamw_compact(int64_t count, int narrow_parameter, int narrow_gradient, void* parameter,
                          const void* gradient, float* first, float* second, uint8_t* first_codes,
                          uint8_t* second_codes, float* first_scales, float* second_scales, void* copy, float keep,
                          float rate, float blend1, float beta2, float blend2, float epsilon, float root, float scale,
                          uint32_t seed_weights, uint32_t seed_moments, int threads) {
  const Adam a{rate, blend1, beta2, blend2, epsilon, root, scale};
  const Moment m{first, first_codes, first_scales}, v{second, second_codes, second_scales};
  const Seeds seeds{seed_weights, seed_moments};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < count; chunk += CHUNK)
    for (int64_t at = chunk; at < std::min(count, chunk + CHUNK); at += BLOCK) {
      const int64_t size = std::min(BLOCK, count - at);
      bf16* own = (bf16*)copy;
      if (narrow_parameter && narrow_gradient)
        update_block(a, keep, (bf16*)parameter, (const bf16*)gradient, m, v, own, at, size, seeds);
      else if (narrow_parameter)
        update_block(a, keep, (bf16*)parameter, (const float*)gradient, m, v, own, at, size, seeds);
      else if (narrow_gradient)
        update_block(a, keep, (float*)parameter, (const bf16*)gradient, m, v, own, at, size, seeds);
      else
        update_block(a, keep, (float*)parameter, (const float*)gradient, m, v, own, at, size, seeds);
    }
}
}
