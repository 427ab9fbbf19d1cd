// A processor's tiles for bfloat16 (Intel AMX): what products and attention share of them.
//
// A tile is 16 rows of 64 bytes. `_tile_dpbf16ps` adds to sums [16, 16] what 32 numbers of each of 16 rows and of each of 16
// columns give; the columns lie as [16 pairs of numbers, 16 columns, 2]. Every row's sums are formed in the same order,
// whatever the others are.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 32;  // rows or columns, and what is summed over, of a tile
constexpr int64_t TILE = SIDE * DEPTH, SUMS = SIDE * SIDE;

}  // namespace

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// The kernel lends tiles to a process that asks for them.
inline bool has_tiles_here() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_lent = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  return is_lent;
}

// Compilers (g++ 12) do not know all that tile instructions read: what is written before this is there for them.
template <typename T>
inline void is_in_memory(const T& what) {
  asm volatile("" : : "m"(what) : "memory");
}

struct alignas(64) Shapes {  // as the processor reads them
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// From here on this thread has tiles 0 to 5 of so many rows, and 6 and 7, for columns, whole. Until `_tile_release`.
inline void configure(int64_t rows) {
  Shapes shapes;
  for (int tile = 0; tile < 8; tile++) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile < 6 ? rows : SIDE;
  }
  is_in_memory(shapes);
  _tile_loadconfig(&shapes);
}

}  // namespace

#else
#define TILES 0
#endif
