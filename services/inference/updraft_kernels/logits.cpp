// The greatest logit of each row, its token, and the logarithm of the sum of exponentials, in one pass over memory.
//
// Sizes: R rows, V vocabulary.

#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 1024;  // tokens; the greatest value is found per block, and its index only in the block that has it

template <typename T>
float greatest(const T* x, int64_t size, bool& has_nan) {
  float top = -INFINITY;
  int nans = 0;
#pragma omp simd reduction(max : top) reduction(+ : nans)
  for (int64_t i = 0; i < size; i++) {
    const float value = load(x[i]);
    top = value > top ? value : top;
    nans += value != value;
  }
  has_nan |= nans > 0;
  return top;
}

// The greatest logit of a row and the first token that has it. The logit is NaN if any logit of the row is.
template <typename T>
void argmax(const T* row, int64_t V, float& best, int64_t& token) {
  bool has_nan = false;
  int64_t block = 0;
  best = -INFINITY;
  for (int64_t begin = 0; begin < V; begin += BLOCK) {
    const float top = greatest(row + begin, std::min(BLOCK, V - begin), has_nan);
    if (top > best) {
      best = top;
      block = begin;
    }
  }
  token = block;
  while (token < std::min(block + BLOCK, V) - 1 && load(row[token]) != best) token++;
  if (has_nan) best = NAN;
}

template <typename T>
float log_sum(const T* row, int64_t V, float best) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < V; i++) sum += exponential(load(row[i]) - best);
  return best + std::log(sum);
}

template <typename T>
void top_scores(const T* logits, const uint8_t* needs_sum, float* best, int64_t* token, float* sums, int64_t R, int64_t V) {
#pragma omp parallel for schedule(dynamic) if (R > 1)
  for (int64_t r = 0; r < R; r++) {
    argmax(logits + r * V, V, best[r], token[r]);
    if (needs_sum[r]) sums[r] = log_sum(logits + r * V, V, best[r]);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                  \
  extern "C" void top_scores_##NAME(const T* logits, const uint8_t* needs_sum, float* best, int64_t* token, float* sums, \
                                    int64_t R, int64_t V) {                                                              \
    top_scores(logits, needs_sum, best, token, sums, R, V);                                                              \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
