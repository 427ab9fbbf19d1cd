// Products with weights in int8, for the draft: half the bytes of bfloat16, which are what a step of few rows waits for.
//
// A weight is the nearest multiple of its row's scale, an input the nearest multiple of its group's, so that a few huge inputs
// spoil only their own group. Both are integers from -127 to 127; weights are stored with 128 added, because the instruction
// multiplies unsigned by signed numbers, and the surplus, 128 times a group's sum, is known before it arises. Weights lie as
// [N / 16, K / 4, 16 outputs, 4 inputs]; both sizes are padded, N to LANES and K to GROUP. Sums of a group are exact, and
// groups are added in order, so a row's result does not depend on the rows next to it or on the CPU.
//
// Sizes: R rows, N outputs, K inputs.

#pragma once

#include "simd.h"

#ifdef __AVX512VNNI__
#define INT8 1

#include <immintrin.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t GROUP = 64, QUAD = 4, BLOCK = LANES * QUAD;
constexpr int64_t AHEAD = 1024;  // weights by which to prefetch ahead

// Add to 16 sums the products of 16 times 4 weights with 4 inputs.
inline Indices add_products(Indices sums, const uint8_t* weights, const int8_t* inputs) {
  int32_t quad;
  std::memcpy(&quad, inputs, sizeof quad);
  return (Indices)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(weights), _mm512_set1_epi32(quad));
}

// As in Python.
struct Int8Weight {
  const uint8_t* blocks;
  const float* scales;
  int64_t N, K;

  int64_t size() const { return N * K; }
};

// Rows of inputs as integers, with a scale and the surplus of each group.
struct Int8Rows {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> surplus;
  int64_t groups = 0;

  void reset(int64_t R, int64_t K) {
    groups = (K + GROUP - 1) / GROUP;
    values.resize(R * groups * GROUP);
    scales.resize(R * groups);
    surplus.resize(R * groups);
  }

  // A value that is not finite makes its row's products NaN.
  template <typename T>
  void set(int64_t r, const T* x, int64_t K) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t size = std::min(GROUP, K - g * GROUP);
      alignas(64) float part[GROUP] = {};
      float top = 0, spoiled = 0;
#pragma omp simd reduction(max : top) reduction(+ : spoiled)
      for (int64_t i = 0; i < size; i++) {
        part[i] = load(x[g * GROUP + i]);
        top = std::fabs(part[i]) > top ? std::fabs(part[i]) : top;
        spoiled += part[i] * 0.0f;  // NaN for what is not finite
      }
      const float inverse = top > 1e-30f && top < INFINITY ? 127 / top : 0;  // finite
      int8_t* to = values.data() + (r * groups + g) * GROUP;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < GROUP; i++) {
        const float scaled = std::nearbyint(part[i] * inverse);
        const int32_t value = int32_t(scaled == scaled ? scaled : 0.0f);
        to[i] = int8_t(value);
        sum += value;
      }
      scales[r * groups + g] = top / 127 + spoiled;
      surplus[r * groups + g] = -128 * sum;
    }
  }
};

// The products of M rows from `first` with one column of blocks.
template <int M, typename T>
inline void multiply_column(const Int8Rows& rows, const Int8Weight& w, int64_t first, int64_t n, T* out) {
  constexpr int CHAINS = M >= 4 ? 1 : 4 / M;  // of additions that do not wait for each other
  const int64_t groups = rows.groups;
  const uint8_t* blocks = w.blocks + n * groups * GROUP;
  Floats sums[M] = {};
  for (int64_t g = 0; g < groups; g++, blocks += LANES * GROUP) {
    const int8_t* x = rows.values.data() + (first * groups + g) * GROUP;
    Indices parts[M][CHAINS] = {};
    for (int64_t i = 0; i < GROUP / QUAD; i += CHAINS)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; c++) {
        const uint8_t* block = blocks + (i + c) * BLOCK;
        __builtin_prefetch(block + AHEAD);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) parts[m][c] = add_products(parts[m][c], block, x + m * groups * GROUP + (i + c) * QUAD);
      }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const int64_t at = (first + m) * groups + g;
      Indices sum = parts[m][0] + rows.surplus[at];
#pragma GCC unroll 4
      for (int c = 1; c < CHAINS; c++) sum += parts[m][c];
      sums[m] += __builtin_convertvector(sum, Floats) * rows.scales[at];
    }
  }
  const int64_t num = std::min(int64_t(LANES), w.N - n);
  Floats scale = {};
  std::memcpy(&scale, w.scales + n, num * sizeof(float));
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    alignas(64) float y[LANES];
    store_lanes(y, sums[m] * scale);
    T* to = out + (first + m) * w.N + n;
    if (num == LANES)
#pragma omp simd
      for (int i = 0; i < LANES; i++) store(to[i], y[i]);
    else
      for (int64_t i = 0; i < num; i++) store(to[i], y[i]);
  }
}

template <typename T>
void multiply(const Int8Rows& rows, const Int8Weight& w, int64_t R, T* out) {
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t n = 0; n < w.N; n += LANES) {
    int64_t r = 0;
    for (; r + 8 <= R; r += 8) multiply_column<8>(rows, w, r, n, out);
    for (; r + 4 <= R; r += 4) multiply_column<4>(rows, w, r, n, out);
    for (; r + 2 <= R; r += 2) multiply_column<2>(rows, w, r, n, out);
    if (r < R) multiply_column<1>(rows, w, r, n, out);
  }
}

}  // namespace

#else
#define INT8 0
#endif
