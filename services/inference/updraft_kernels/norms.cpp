// RMS norm with the residual's addition, and SwiGLU's activation, each as one call.
//
// Sizes: R rows, D hidden, I intermediate.

#include "simd.h"

namespace {

template <typename T>
void add_norm(const T* x, const T* y, const T* weight, T* sum, T* out, int64_t R, int64_t D, float eps) {
#pragma omp parallel for if (R > 16)
  for (int64_t r = 0; r < R; r++) {
    const T* row = x + r * D;
    if (y) {
      T* total = sum + r * D;
#pragma omp simd
      for (int64_t i = 0; i < D; i++) store(total[i], load(row[i]) + load(y[r * D + i]));
      row = total;
    }
    norm(row, weight, out + r * D, D, eps);
  }
}

template <typename T>
void silu_and_mul(const T* gate_up, T* out, int64_t R, int64_t I) {
#pragma omp parallel for if (R > 4)
  for (int64_t r = 0; r < R; r++) {
    const T *row = gate_up + r * 2 * I, *up = row + I;
#pragma omp simd
    for (int64_t i = 0; i < I; i++) {
      const float x = load(row[i]);
      store(out[r * I + i], x / (1.0f + exponential(-x)) * load(up[i]));
    }
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                          \
  extern "C" void add_norm_##NAME(const T* x, const T* y, const T* weight, T* sum, T* out, int64_t R, int64_t D, \
                                  float eps) {                                                                   \
    add_norm(x, y, weight, sum, out, R, D, eps);                                                                 \
  }                                                                                                              \
  extern "C" void silu_and_mul_##NAME(const T* gate_up, T* out, int64_t R, int64_t I) { silu_and_mul(gate_up, out, R, I); }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
