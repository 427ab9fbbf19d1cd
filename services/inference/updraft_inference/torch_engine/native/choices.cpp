// What a step wants to know of logits, in one reading: see `fused.py`, and ADR 0019 for why.
//
// Sizes: R rows, V vocabulary.

#include <algorithm>

#include "lanes.h"

namespace {

constexpr int64_t BLOCK = 1024;  // tokens of which the best is looked for by its value first, and then by its place

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

// The greatest logit of a row and the first token that has it; no number if any is none.
template <typename T>
void likeliest(const T* row, int64_t V, float& best, int64_t& choice) {
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
  choice = block;
  while (choice < std::min(block + BLOCK, V) - 1 && load(row[choice]) != best) choice++;
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
void choices(const T* logits, const uint8_t* wants_sum, float* best, int64_t* choice, float* sums, int64_t R, int64_t V) {
#pragma omp parallel for schedule(dynamic) if (R > 1)
  for (int64_t r = 0; r < R; r++) {
    likeliest(logits + r * V, V, best[r], choice[r]);
    if (wants_sum[r]) sums[r] = log_sum(logits + r * V, V, best[r]);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
  extern "C" void choices_##NAME(const T* logits, const uint8_t* wants_sum, float* best, int64_t* choice, float* sums, \
                                 int64_t R, int64_t V) {                                                              \
    choices(logits, wants_sum, best, choice, sums, R, V);                                                             \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
