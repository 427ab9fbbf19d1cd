// Intel AMX for bfloat16, as matrix products and attention use it.
//
// A tile register has 16 rows of 64 bytes. `_tile_dpbf16ps` multiplies 16 rows of 32 numbers by 16 columns of 32 numbers and adds
// the products to sums [16, 16]. Columns are stored as [16 pairs of numbers, 16 columns, 2]. The order in which a row's sums are
// formed does not depend on the other rows.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 32;  // rows (or columns) of a tile, and the numbers in each
constexpr int64_t TILE = SIDE * DEPTH, SUMS = SIDE * SIDE;

}  // namespace

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define AMX 1

#include <immintrin.h>

namespace {

// g++ 12 does not know all the memory that tile instructions read, so this makes it write everything before them.
template <typename T>
inline void flush_to_memory(const T& data) {
  asm volatile("" : : "m"(data) : "memory");
}

struct alignas(64) TileConfig {  // in the CPU's layout
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Give this thread its tiles until `_tile_release`: 0 to 5 with `rows` rows; 6 and 7, for columns, with all 16.
inline void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? rows : SIDE;
  }
  flush_to_memory(config);
  _tile_loadconfig(&config);
}

}  // namespace

#else
#define AMX 0
#endif
