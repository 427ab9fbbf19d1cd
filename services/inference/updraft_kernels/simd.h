// Number types, vectors of 16 numbers, and functions of one row, shared by all kernels.
//
// Numbers are bfloat16 or float in memory and float in registers. NaN and infinity propagate, because callers check for them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

// The compiler splits these vectors for CPUs with narrower ones. Memory is accessed by memcpy, which needs no alignment and
// breaks no aliasing rule.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Indices __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

template <typename V>
inline V load_as(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline Floats load_lanes(const float* x) { return load_as<Floats>(x); }
inline Floats load_lanes(const bf16* x) { return (Floats)(__builtin_convertvector(load_as<Halves>(x), Words) << 16); }
inline void store_lanes(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Swap the off-diagonal blocks of size `half` in a 16 x 16 matrix. Sizes 8, 4, 2 and 1 together transpose it.
template <int half, typename V>
inline void exchange(V* rows) {
#define LOW(i) ((i) & half ? (i) - half + 16 : (i))
#define HIGH(i) ((i) & half ? (i) + 16 : (i) + half)
#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & half)) {
      const V low = rows[i], high = rows[i + half];
      rows[i] = __builtin_shuffle(low, high, Indices{ALL(LOW)});
      rows[i + half] = __builtin_shuffle(low, high, Indices{ALL(HIGH)});
    }
#undef ALL
#undef HIGH
#undef LOW
}
template <typename V>
inline void transpose(V* rows) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to 2 units in the last place (Cephes' expf), because the standard library's does not vectorize. The result is clamped to
// e^-87 and e^88, which its callers cannot tell from 0 and infinity.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n == n ? n : 0.0f) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

template <typename X, typename T, typename Y>
void norm(const X* x, const T* weight, Y* out, int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += load(x[i]) * load(x[i]);
  const float scale = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++) store(out[i], load(x[i]) * scale * load(weight[i]));
}

}  // namespace
