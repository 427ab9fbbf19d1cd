// Forward KL divergence of rows of logits, and its gradients, a row at a time in the cache of a core.
//
// Probabilities below e^-70 of a row's largest one count as 0: their quotients would be denormal numbers, which some CPUs
// multiply a hundred times as slowly. NaN propagates to a row's loss.
//
// Sizes: R rows, V draft vocabulary.

#include <algorithm>

#include "simd.h"

namespace {

constexpr float LEAST = -70.0f;
constexpr int64_t BLOCK = 1024;  // tokens whose sum is taken in float; a longer one would lose small terms

inline float exponential_or_zero(float x) { return x < LEAST ? 0.0f : exponential(x); }

struct Sums {
  double sum = 0, dot = 0;

  void add(float more, float more_dot) {
    sum += more;
    dot += more_dot;
  }
};

template <typename T>
float largest(const T* row, int64_t V) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < V; i++) top = load(row[i]) > top ? load(row[i]) : top;
  return top;
}

// p [R, V], and the sums of p log p [R].
template <typename T>
void predictions(const T* logits, float* p, float* negentropy, int64_t R, int64_t V) {
#pragma omp parallel for if (R > 1)
  for (int64_t r = 0; r < R; r++) {
    const T* row = logits + r * V;
    float* out = p + r * V;
    const float top = largest(row, V);
    Sums all;
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
      float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t i = begin; i < std::min(begin + BLOCK, V); i++) {
        const float value = load(row[i]) - top, weight = exponential_or_zero(value);
        out[i] = weight;
        sum += weight;
        dot += weight * value;
      }
      all.add(sum, dot);
    }
    const float scale = float(1 / all.sum);
#pragma omp simd
    for (int64_t i = 0; i < V; i++) out[i] *= scale;
    negentropy[r] = float(all.dot / all.sum - std::log(all.sum));
  }
}

// KL(p || q) [R] of the draft's logits, and its gradients q - p [R, V].
template <typename T>
void forward_kl(const T* logits, const float* p, const float* negentropy, float* losses, T* gradients, int64_t R, int64_t V) {
#pragma omp parallel for if (R > 1)
  for (int64_t r = 0; r < R; r++) {
    const T* row = logits + r * V;
    const float* target = p + r * V;
    T* out = gradients + r * V;
    const float top = largest(row, V);
    Sums all;
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
      float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t i = begin; i < std::min(begin + BLOCK, V); i++) {
        const float value = load(row[i]) - top;
        sum += exponential_or_zero(value);
        dot += target[i] * value;
      }
      all.add(sum, dot);
    }
    const float scale = float(1 / all.sum);
#pragma omp simd
    for (int64_t i = 0; i < V; i++) store(out[i], exponential_or_zero(load(row[i]) - top) * scale - target[i]);
    losses[r] = float(negentropy[r] - all.dot + std::log(all.sum));
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                     \
  extern "C" void predictions_##NAME(const T* logits, float* p, float* negentropy, int64_t R, int64_t V) {                  \
    predictions(logits, p, negentropy, R, V);                                                                               \
  }                                                                                                                         \
  extern "C" void forward_kl_##NAME(const T* logits, const float* p, const float* negentropy, float* losses, T* gradients,  \
                                    int64_t R, int64_t V) {                                                                 \
    forward_kl(logits, p, negentropy, losses, gradients, R, V);                                                             \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
