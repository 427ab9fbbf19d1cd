// Matrix products in bfloat16 by AMX.
//
// A decode step reads every weight once for a few rows, so memory bandwidth limits it. Weights are stored as tiles in the order
// in which they are read. Up to some dozens of rows, the computation adds little to the time of reading them.
//
// Sizes: R rows, N outputs, K inputs.

#include "amx.h"

#if AMX

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace {

constexpr int64_t AHEAD = 8;  // tiles by which to prefetch ahead

inline void prefetch(const uint16_t* tile) {
  for (int64_t i = 0; i < TILE; i += 32) _mm_prefetch((const char*)(tile + i), _MM_HINT_T0);
}

// The products of one or two blocks of rows (x, y) and one or two columns of tiles (w, v).
template <bool has_y, bool has_v, bool is_first>
inline void sum(const uint16_t* x, const uint16_t* y, const uint16_t* w, const uint16_t* v, int64_t K, float* sums) {
  _tile_zero(0);
  if (has_v) _tile_zero(1);
  if (has_y) _tile_zero(2);
  if (has_y && has_v) _tile_zero(3);
  for (int64_t k = 0; k < K; k += DEPTH, w += TILE, v += TILE) {
    _tile_loadd(4, x + k, 2 * K);
    _tile_loadd(6, w, 64);
    if (is_first) prefetch(w + AHEAD * TILE);
    _tile_dpbf16ps(0, 4, 6);
    if (has_v) {
      _tile_loadd(7, v, 64);
      if (is_first) prefetch(v + AHEAD * TILE);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (has_y) {
      _tile_loadd(5, y + k, 2 * K);
      _tile_dpbf16ps(2, 5, 6);
      if (has_v) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (has_v) _tile_stored(1, sums + SUMS, 64);
  if (has_y) _tile_stored(2, sums + 2 * SUMS, 64);
  if (has_y && has_v) _tile_stored(3, sums + 3 * SUMS, 64);
}

struct Product {
  const uint16_t *x, *tiles;
  const float* bias;
  uint16_t* out;
  int64_t R, N, K;
  int64_t blocks, rows;  // the last block is moved back to be full: some rows are computed twice, with equal results

  void run() const {
#pragma omp parallel
    {
      configure_tiles(rows);
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < N; n += 2 * SIDE) {
        if (n + SIDE < N)
          columns<true>(n);
        else
          columns<false>(n);
      }
      _tile_release();
    }
  }

  template <bool has_v>
  void columns(int64_t n) const {
    for (int64_t block = 0; block < blocks; block += 2) {
      if (block + 1 == blocks)
        block ? multiply<false, has_v, false>(n, block) : multiply<false, has_v, true>(n, block);
      else
        block ? multiply<true, has_v, false>(n, block) : multiply<true, has_v, true>(n, block);
    }
  }

  template <bool has_y, bool has_v, bool is_first>
  void multiply(int64_t n, int64_t block) const {
    alignas(64) float sums[4 * SUMS];
    const int64_t first = begin(block), second = begin(block + 1);
    const uint16_t *w = tiles + n * K, *v = w + SIDE * K;
    sum<has_y, has_v, is_first>(x + first * K, x + second * K, w, v, K, sums);
    store(sums, first, n);
    if (has_v) store(sums + SUMS, first, n + SIDE);
    if (has_y) store(sums + 2 * SUMS, second, n);
    if (has_y && has_v) store(sums + 3 * SUMS, second, n + SIDE);
  }

  int64_t begin(int64_t block) const { return std::min(block * rows, R - rows); }

  void store(const float* sums, int64_t first, int64_t n) const {
    for (int64_t r = 0; r < rows; r++) {
      __m512 y = _mm512_load_ps(sums + r * SIDE);
      if (bias) y = _mm512_add_ps(y, _mm512_loadu_ps(bias + n));
      const __m256bh rounded = _mm512_cvtneps_pbh(y);
      std::memcpy(out + (first + r) * N + n, &rounded, sizeof rounded);
    }
  }
};

}  // namespace

// Ask Linux to let this process use tiles; false if it refuses. Everything else that uses AMX needs this first.
extern "C" bool request_amx() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

extern "C" void matmul_amx(const uint16_t* x, const uint16_t* tiles, const float* bias, uint16_t* out, int64_t R, int64_t N,
                           int64_t K) {
  const int64_t blocks = (R + SIDE - 1) / SIDE;
  if (R) Product{x, tiles, bias, out, R, N, K, blocks, (R + blocks - 1) / blocks}.run();
}

#endif
