// Products of bf16 by matrix tiles: a block of sums is two tiles high and two wide, or one high and four wide where no
// more than sixteen rows are left, so that four products are always under way. A step is sixteen units deep.
#include "tiles.h"

#include <cerrno>
#include <vector>

#include "gemm.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

bool tiles_run = false;

#if defined(ERNIE5_TILES)
namespace {

constexpr int64_t SIDE = 16;  // rows, columns and units of a tile
typedef Unit<bf16> Pair;

// Tiles 0 to 3 hold sums, 4 (and 5 in a high block) left rows, the others right columns. A configuration is known by
// its number of rows, 1 to 32, because a thread keeps its last one: loading another costs more than a short product.
constexpr int64_t NONE = 0, OUTSIDE = -1;  // outside of every TileScope nothing is kept
thread_local int64_t configured = OUTSIDE;

void configure(int64_t rows) {
  if (rows == configured) return;
  const bool high = rows > SIDE;
  TileShapes shapes;
  for (int i = 0; i < TILES_HELD; ++i) {
    const bool right = i > (high ? 5 : 4), second = high && (i == 2 || i == 3 || i == 5);
    shapes.bytes[i] = TILE_BYTES;
    shapes.rows[i] = right ? SIDE : second ? rows - SIDE : std::min(SIDE, rows);
  }
  tile_configure(shapes);
  if (configured != OUTSIDE) configured = rows;
}

template <int HIGH, int BROAD>
inline void begin(const float* sums, int64_t leading, bool add) {
  const int64_t bytes = leading * sizeof(float);
  if (add) {
    tile_load<0>(sums, bytes), tile_load<1>(sums + SIDE, bytes);
    if constexpr (HIGH == 2) sums += SIDE * leading - 2 * SIDE;
    if constexpr (HIGH * BROAD == 4) tile_load<2>(sums + 2 * SIDE, bytes), tile_load<3>(sums + 3 * SIDE, bytes);
  } else {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (HIGH * BROAD == 4) tile_zero<2>(), tile_zero<3>();
  }
}

template <int HIGH, int BROAD>
inline void finish(float* sums, int64_t leading) {
  const int64_t bytes = leading * sizeof(float);
  tile_store<0>(sums, bytes), tile_store<1>(sums + SIDE, bytes);
  if constexpr (HIGH == 2) sums += SIDE * leading - 2 * SIDE;
  if constexpr (HIGH * BROAD == 4) tile_store<2>(sums + 2 * SIDE, bytes), tile_store<3>(sums + 3 * SIDE, bytes);
}

// One step: left rows at `a`, `row` units apart; right columns at `b` and, of the next panel, at `next`.
template <int HIGH, int BROAD>
inline void advance(const Pair* a, int64_t row, const Pair* b, const Pair* next) {
  constexpr int64_t bytes = PANEL * sizeof(Pair);
  tile_load<4>(a, row * sizeof(Pair));
  tile_load<6>(b, bytes);
  tile_dot<0, 4, 6>();
  tile_load<7>(b + SIDE, bytes);
  tile_dot<1, 4, 7>();
  if constexpr (HIGH == 2) {
    tile_load<5>(a + SIDE * row, row * sizeof(Pair));
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  } else if constexpr (BROAD == 4) {
    tile_load<5>(next, bytes);
    tile_dot<2, 4, 5>();
    tile_load<6>(next + SIDE, bytes);
    tile_dot<3, 4, 6>();
  }
}

// The last units of `rows` rows, fewer than a step, with zeros behind them.
void pad(const Pair* source, int64_t leading, int64_t units, int64_t rows, Pair* out) {
  for (int64_t m = 0; m < rows; ++m) {
    std::memcpy(out + m * SIDE, source + m * leading, units * sizeof(Pair));
    std::memset(out + m * SIDE + units, 0, (SIDE - units) * sizeof(Pair));
  }
}

template <class O>
struct Product {
  int64_t columns, units;
  Left<bf16> left;
  const Pair *left_rest, *packed;  // left_rest [rows, SIDE]: what `pad` made of the units beyond whole steps
  int64_t stride;
  O* out;
  int64_t leading;
  bool add;
};

template <int HIGH, int BROAD, class O>
void block(const Product<O>& p, int64_t row, int64_t rows, int64_t column, const Pair* right_rest) {
  constexpr int64_t WIDTH = BROAD * SIDE;
  alignas(64) float buffer[HIGH * SIDE * WIDTH];
  const int64_t columns = std::min(WIDTH, p.columns - column), whole = p.units / SIDE * SIDE;
  O* out = p.out + row * p.leading + column;
  float* sums = buffer;
  int64_t leading = WIDTH;
  if constexpr (std::is_same<O, float>::value)
    if (columns == WIDTH) sums = out, leading = p.leading;
  if (p.add && sums == buffer)
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < WIDTH; n += LANES)
        store(buffer + m * WIDTH + n, load(out + m * p.leading + n, std::max<int64_t>(0, columns - n)));
  begin<HIGH, BROAD>(sums, leading, p.add);
  const int64_t apart = p.left.row, stride = p.stride;
  const Pair *a = p.left.data + row * apart, *b = p.packed + column / PANEL * stride;
  for (int64_t k = 0; k < whole; k += SIDE, a += SIDE, b += SIDE * PANEL)
    advance<HIGH, BROAD>(a, apart, b, b + stride);
  if (whole < p.units) advance<HIGH, BROAD>(p.left_rest + row * SIDE, SIDE, right_rest, right_rest + SIDE * PANEL);
  finish<HIGH, BROAD>(sums, leading);
  if (sums != buffer) return;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; n += LANES)
      store(out + m * p.leading + n, load(buffer + m * WIDTH + n), columns - n);
}

// All columns of `rows` rows that share a configuration, `tall` at a time.
template <int HIGH, int BROAD, class O>
void band(const Product<O>& p, int64_t row, int64_t rows) {
  const int64_t whole = p.units / SIDE * SIDE, tall = std::min(rows, HIGH * SIDE);
  alignas(64) Pair right_rest[BROAD / 2 * SIDE * PANEL];
  configure(tall);
  for (int64_t column = 0; column < p.columns; column += BROAD * SIDE) {
    const int64_t panels = std::min<int64_t>(BROAD / 2, panels_of(p.columns - column));
    if (whole < p.units) {
      std::memset(right_rest, 0, sizeof right_rest);
      for (int64_t i = 0; i < panels; ++i)
        std::memcpy(right_rest + i * SIDE * PANEL, p.packed + (column / PANEL + i) * p.stride + whole * PANEL,
                    (p.units - whole) * PANEL * sizeof(Pair));
    }
    for (int64_t m = 0; m < rows; m += tall)
      if (panels == BROAD / 2)
        block<HIGH, BROAD>(p, row + m, tall, column, right_rest);
      else
        block<HIGH, 2>(p, row + m, tall, column, right_rest);
  }
}

}  // namespace

template <class O>
void multiply_tiles(int64_t rows, int64_t columns, int64_t units, Left<bf16> left, const Unit<bf16>* packed,
                    int64_t stride, O* out, int64_t leading, bool add) {
  const int64_t rest = units % SIDE;
  Pair* left_rest = nullptr;
  if (rest > 0) {
    left_rest = scratch<Pair>(20, rows * SIDE);
    pad(left.data + units - rest, left.row, rest, rows, left_rest);
  }
  const Product<O> p{columns, units, left, left_rest, packed, stride, out, leading, add};
  const int64_t whole = rows / (2 * SIDE) * (2 * SIDE);
  if (whole > 0) band<2, 2>(p, 0, whole);
  if (rows - whole > SIDE)
    band<2, 2>(p, whole, rows - whole);
  else if (rows > whole)
    band<1, 4>(p, whole, rows - whole);
}

template void multiply_tiles<bf16>(int64_t, int64_t, int64_t, Left<bf16>, const Pair*, int64_t, bf16*, int64_t, bool);
template void multiply_tiles<float>(int64_t, int64_t, int64_t, Left<bf16>, const Pair*, int64_t, float*, int64_t, bool);

namespace {

bf16 narrow(int64_t whole) {  // small enough to be exact
  const float x = float(whole);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {uint16_t(bits >> 16)};
}

// Whether one product of small integers, with every kind of block and rest, comes out exactly.
bool exact(int64_t rows, int64_t columns, int64_t summed) {
  std::vector<bf16> left(rows * summed), right(summed * columns);
  for (size_t i = 0; i < left.size(); ++i) left[i] = narrow(int64_t(i * 7 % 31) - 15);
  for (size_t i = 0; i < right.size(); ++i) right[i] = narrow(int64_t(i * 5 % 29) - 14);
  std::vector<Pair> packed(packed_size<bf16>(summed, columns));
  std::vector<float> out(rows * columns);
  pack_rows(right.data(), columns, summed, columns, packed.data());
  multiply_tiles<float>(rows, columns, units_of<bf16>(summed), rows_of(left.data(), summed), packed.data(),
                        units_of<bf16>(summed) * PANEL, out.data(), columns, false);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < summed; ++k)
        sum += (int64_t((m * summed + k) * 7 % 31) - 15) * (int64_t((k * columns + n) * 5 % 29) - 14);
      if (out[m * columns + n] != float(sum)) return false;
    }
  return true;
}

bool sums_right() {
  const TileScope tiles;
  return exact(49, 33, 70) && exact(5, 100, 38);
}

constexpr int64_t WRONG = 4096, CRASHED = 8192;  // beyond every error number

// Tries the tiles in a child, so that a processor which refuses an instruction ends that one. 0, or what went wrong.
int64_t trial() {
#if defined(ERNIE5_EMULATED_TILES)
  return sums_right() ? 0 : WRONG;
#else
  constexpr unsigned SECONDS = 60;
  const pid_t child = fork();
  if (child < 0) return errno;
  if (child == 0) {
    alarm(SECONDS);
    _exit(sums_right() ? 0 : 1);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return errno;
  if (!WIFEXITED(status)) return CRASHED;
  return WEXITSTATUS(status) == 0 ? 0 : WRONG;
#endif
}

}  // namespace

void TileScope::begin() { configured = NONE; }
void TileScope::end() {
  if (configured > NONE) tile_release();
  configured = OUTSIDE;
}

// Asks Linux, for the whole process, for the 8 KiB of tile state that a thread has (arch/x86/include/uapi/asm/prctl.h).
static int64_t permission() {
#if defined(ERNIE5_EMULATED_TILES)
  return 0;
#else
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? 0 : errno;
#endif
}
#endif

// Whether products of bf16 take matrix tiles from now on: 1 yes, 0 no (not wanted, or not compiled); negative, why not:
// the error number with which the operating system refused, WRONG sums, or CRASHED. Call it before the first product.
extern "C" int64_t ernie5_start_tiles(int wanted) {
  tiles_run = false;
#if defined(ERNIE5_TILES)
  if (!wanted) return 0;
  if (const int64_t refused = permission()) return -refused;
  if (const int64_t failed = trial()) return -failed;
  tiles_run = true;
#endif
  return tiles_run;
}
