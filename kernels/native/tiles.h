// Matrix tiles (Intel AMX): eight registers of 16 rows by 64 bytes, and products of bf16 pairs with fp32 sums. Real
// instructions where the compiler's target has them, software (emulated_tiles.h) under -DERNIE5_EMULATED_TILES.
#pragma once
#include "emulated_tiles.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AVX512F__) && \
    ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(ERNIE5_EMULATED_TILES))
#define ERNIE5_TILES
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

extern bool tiles_run;  // whether products of bf16 take the tiles; set once, when the library is loaded

// While one lives its thread keeps the configuration of the tiles from product to product. At its end they are released:
// switching to another thread need not save 8 KiB, and what oneDNN configures in between is never taken for ours.
struct TileScope {
  TileScope() {
    if constexpr (TILES) begin();
  }
  ~TileScope() {
    if constexpr (TILES) end();
  }
  static void begin();
  static void end();
};

#if defined(ERNIE5_TILES) && defined(ERNIE5_EMULATED_TILES)
inline EmulatedTiles& tiles_of_thread() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}
inline void tile_configure(const TileShapes& shapes) { tiles_of_thread().configure(shapes); }
inline void tile_release() { tiles_of_thread().release(); }
template <int I>
inline void tile_zero() {
  tiles_of_thread().zero(I);
}
template <int I>
inline void tile_load(const void* from, int64_t stride) {
  tiles_of_thread().load(I, static_cast<const char*>(from), stride);
}
template <int I>
inline void tile_store(void* to, int64_t stride) {
  tiles_of_thread().store(I, static_cast<char*>(to), stride);
}
template <int C, int A, int B>
inline void tile_dot() {
  tiles_of_thread().dot(C, A, B);
}
#elif defined(ERNIE5_TILES)
// GCC 12's intrinsics do not tell the compiler that loads read memory, and take no template parameter for a register.
inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void tile_release() { asm volatile("tilerelease"); }
template <int I>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int I>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(I) : "memory");
}
template <int I>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(I) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif
