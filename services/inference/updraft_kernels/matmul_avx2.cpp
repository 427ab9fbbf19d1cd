// Matrix products with weights in bfloat16 on CPUs that have no instruction for them.
//
// A decode step reads every weight once for a few rows, so weights stay in 16 bits in memory and are widened in registers, once
// for up to six rows. They lie as [N / 16, K, 8, 2]: a word of 32 bits holds outputs i and i + 8 of a block, so one shift and
// one mask widen 16 of them. Sums run over the inputs in order, so a row's result does not depend on the rows next to it.
//
// Sizes: R rows, N outputs, K inputs.

#include "simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

#include <algorithm>

namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));

constexpr int64_t TOGETHER = 4 * LANES;  // outputs of a task

struct Product {
  const float* x;
  const bf16* blocks;
  const float* bias;
  bf16* out;
  int64_t R, N, K;

  void run() const {
#pragma omp parallel for schedule(dynamic)
    for (int64_t n = 0; n < N; n += TOGETHER) columns(n, std::min(n + TOGETHER, N));
  }

  void columns(int64_t first, int64_t end) const {
    int64_t r = 0;
    for (; r + 6 <= R; r += 6) rows<6, 1>(r, first, end);
    switch (R - r) {
      case 5: return rows<5, 1>(r, first, end);
      case 4: return rows<4, 1>(r, first, end);
      case 3: return rows<3, 1>(r, first, end);
      case 2: return rows<2, 2>(r, first, end);
      case 1: return rows<1, 4>(r, first, end);
    }
  }

  // M rows from r. Few rows take B blocks of outputs at a time, for enough sums that do not wait for each other.
  template <int M, int B>
  void rows(int64_t r, int64_t n, int64_t end) const {
    for (; n + B * LANES <= end; n += B * LANES) multiply<M, B>(r, n);
    for (; n < end; n += LANES) multiply<M, 1>(r, n);
  }

  template <int M, int B>
  void multiply(int64_t r, int64_t n) const {
    Eight low[M][B] = {}, high[M][B] = {};
    const bf16* from = blocks + n * K;
    const float* inputs = x + r * K;
    for (int64_t k = 0; k < K; k++)
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) {
        const EightWords words = load_as<EightWords>(from + (b * K + k) * LANES);
        const Eight first = (Eight)(words << 16), second = (Eight)(words & 0xffff0000u);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
          low[m][b] += first * inputs[m * K + k];
          high[m][b] += second * inputs[m * K + k];
        }
      }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) round(low[m][b], high[m][b], r + m, n + b * LANES);
  }

  void round(Eight low, Eight high, int64_t r, int64_t n) const {
    float y[LANES];
    std::memcpy(y, &low, sizeof low);
    std::memcpy(y + 8, &high, sizeof high);
    bf16* to = out + r * N + n;
#pragma omp simd
    for (int i = 0; i < LANES; i++) store(to[i], bias ? y[i] + bias[n + i] : y[i]);
  }
};

}  // namespace

extern "C" void matmul_avx2(const float* x, const bf16* blocks, const float* bias, bf16* out, int64_t R, int64_t N, int64_t K) {
  Product{x, blocks, bias, out, R, N, K}.run();
}

#endif
