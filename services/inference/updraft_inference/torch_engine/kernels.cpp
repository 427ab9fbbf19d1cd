// What a decode step does between two matrix products, each as one call: see `fused.py`, and ADR 0019 for why.
//
// Compiled where it runs (`kernels.py`). Threads are torch's: this must not be linked with another OpenMP. Numbers are bfloat16
// or float in memory, and float in registers. What is not finite stays so, for callers look for it.
//
// Sizes: R rows, D hidden, I intermediate, B sequences, H heads, K key-value heads, G = H / K, E head size (a multiple of
// LANES), S positions of a slot.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t AHEAD = 2 * LANES;  // positions between what is read and what is fetched: rows of a head lie apart

// As wide as the widest vectors; compilers split them where a processor's are narrower. Memory is read and written by memcpy,
// which asks for no alignment and no type.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));
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

inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to 2 units in the last place (Cephes' expf), for the library's does not vectorise; between e^-87 and e^88, which is as
// good as 0 and infinity for what it is used for.
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

template <typename T>
void norm(const T* x, const T* weight, T* out, int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += load(x[i]) * load(x[i]);
  const float scale = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++) store(out[i], load(x[i]) * scale * load(weight[i]));
}

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
void gate(const T* gate_up, T* out, int64_t R, int64_t I) {
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

// Rotary embedding in the half-split layout of Hugging Face; `sin` has its signs.
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, float* out, int64_t E) {
  const int64_t half = E / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float a = load(x[i]), b = load(x[i + half]);
    out[i] = a * load(cos[i]) + b * load(sin[i]);
    out[i + half] = b * load(cos[i + half]) + a * load(sin[i + half]);
  }
}

// -- attention, over blocks of LANES positions ------------------------------------------------------------------------

// Keys or values of one head and one sequence: position s begins at first + s * pitch; `end` positions are there.
template <typename T>
struct Rows {
  T* first;
  int64_t pitch, end;

  const T* at(int64_t s) const { return first + std::min(s, end - 1) * pitch; }  // beyond the end the last one, unseen
  void fetch(int64_t begin, int64_t E) const {
    for (int64_t s = begin; s < std::min(begin + LANES, end); s++)
      for (int64_t i = 0; i < E; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(first + s * pitch + i);
  }
};

// Of a square of 16 x 16, exchange what lies off the diagonal in blocks of `half`; all four sizes transpose it.
template <int half, typename V>
inline void exchange(V* rows) {
#define LOW(i) ((i) & half ? (i) - half + 16 : (i))
#define HIGH(i) ((i) & half ? (i) + 16 : (i) + half)
#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & half)) {
      const V low = rows[i], high = rows[i + half];
      rows[i] = __builtin_shuffle(low, high, Places{ALL(LOW)});
      rows[i + half] = __builtin_shuffle(low, high, Places{ALL(HIGH)});
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

// A block as columns: out[e] has element e of LANES positions.
template <typename T>
inline void some_columns(const Rows<T>& rows, int64_t begin, int64_t c, Floats* out) {
#pragma GCC unroll 16
  for (int j = 0; j < LANES; j++) out[c + j] = load_lanes(rows.at(begin + j) + c);
  transpose(out + c);
}
inline void columns(const Rows<float>& rows, int64_t begin, int64_t E, Floats* out) {
  for (int64_t c = 0; c < E; c += LANES) some_columns(rows, begin, c, out);
}
inline void columns(const Rows<bf16>& rows, int64_t begin, int64_t E, Floats* out) {
  int64_t c = 0;
  for (; c + 2 * LANES <= E; c += 2 * LANES) {  // two numbers travel in one word: half the work
    Words pairs[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) pairs[j] = load_as<Words>(rows.at(begin + j) + c);
    transpose(pairs);
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
      out[c + 2 * j] = (Floats)(pairs[j] << 16);
      out[c + 2 * j + 1] = (Floats)(pairs[j] & 0xffff0000u);
    }
  }
  if (c < E) some_columns(rows, begin, c, out);
}

// Scores [M, LANES] of M queries [M, E] and a block of keys.
template <int M>
inline void score(const float* q, int64_t E, const Floats* keys, float* scores, int64_t span) {
  Floats even[M] = {}, odd[M] = {};
  for (int64_t e = 0; e < E; e += 2)
    for (int m = 0; m < M; m++) {
      even[m] += q[m * E + e] * keys[e];
      odd[m] += q[m * E + e + 1] * keys[e + 1];
    }
  for (int m = 0; m < M; m++) store_lanes(scores + m * span, even[m] + odd[m]);
}

// Add to outputs [M, E] a block of values by its weights [M, LANES].
template <int M>
inline void mix(const float* weights, int64_t span, const Floats* values, int64_t E, float* out) {
  const int64_t C = E / LANES;
  for (int64_t c = 0; c < C; c++) {
    Floats sum[M];
    for (int m = 0; m < M; m++) sum[m] = load_lanes(out + m * E + c * LANES);
    for (int j = 0; j < LANES; j++)
      for (int m = 0; m < M; m++) sum[m] += weights[m * span + j] * values[j * C + c];
    for (int m = 0; m < M; m++) store_lanes(out + m * E + c * LANES, sum[m]);
  }
}

// What four rows share is read once for them; `Kernel<M>` does M of them.
template <template <int> class Kernel, typename... Args>
inline void by_fours(int64_t N, Args... args) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) Kernel<4>::run(n, args...);
  if (n + 2 <= N) {
    Kernel<2>::run(n, args...);
    n += 2;
  }
  if (n < N) Kernel<1>::run(n, args...);
}
template <int M>
struct Score {
  static void run(int64_t n, const float* q, int64_t E, const Floats* keys, float* scores, int64_t span) {
    score<M>(q + n * E, E, keys, scores + n * span, span);
  }
};
template <int M>
struct Mix {
  static void run(int64_t n, const float* weights, int64_t span, const Floats* values, int64_t E, float* out) {
    mix<M>(weights + n * span, span, values, E, out + n * E);
  }
};

// Weights of positions [seen_from, seen_to) from their scores, in place; others get none.
void softmax(float* scores, int64_t span, int64_t seen_from, int64_t seen_to) {
  float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t s = seen_from; s < seen_to; s++) top = scores[s] > top ? scores[s] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = seen_from; s < seen_to; s++) {
    scores[s] = exponential(scores[s] - top);
    sum += scores[s];
  }
  for (int64_t s = seen_from; s < seen_to; s++) scores[s] /= sum;
  std::fill(scores, scores + seen_from, 0.0f);
  std::fill(scores + seen_to, scores + span, 0.0f);
}

template <typename T>
struct Attention {
  const T *qkv, *q_norm, *k_norm, *cos, *sin;
  T *keys, *values, *out;
  int64_t B, K, G, E, S, window;
  float scale, eps;

  // New rows [first, first + num) of one sequence, the first at position `start`, in key-value head `head`: rotate and keep
  // keys and values, then attend to them and to all before. `scratch` begins where a cache line does.
  void attend(int64_t head, int64_t slot, int64_t start, int64_t first, int64_t num, float* scratch) const {
    const int64_t H = K * G, width = (H + 2 * K) * E, N = num * G, end = start + num;
    const int64_t begin = first_seen(start), span = padded(end - begin), at = slot * S * K * E + head * E;
    const Rows<T> k{keys + at, K * E, end}, v{values + at, K * E, end};
    Floats* block = (Floats*)scratch;
    T* normed = (T*)(block + E);
    float *q = (float*)(block + E) + E, *mixed = q + N * E, *scores = mixed + N * E;

    for (int64_t t = 0; t < num; t++) {
      const T* row = qkv + (first + t) * width;
      turn(row + (H + head) * E, k_norm, first + t, normed, mixed);  // free until values are mixed
      for (int64_t i = 0; i < E; i++) store(k.first[(start + t) * k.pitch + i], mixed[i]);
      std::memcpy(v.first + (start + t) * v.pitch, row + (H + K + head) * E, E * sizeof(T));
      for (int64_t g = 0; g < G; g++) turn(row + (head * G + g) * E, q_norm, first + t, normed, q + (t * G + g) * E);
    }
    for (int64_t i = 0; i < N * E; i++) q[i] *= scale;

    for (int64_t s = 0; s < span; s += LANES) {
      k.fetch(begin + s + AHEAD, E);
      columns(k, begin + s, E, block);
      by_fours<Score>(N, q, E, block, scores + s, span);
    }
    for (int64_t n = 0; n < N; n++) {
      const int64_t seen_to = start + n / G + 1;
      const int64_t seen_from = window ? std::max(begin, seen_to - window) : begin;
      softmax(scores + n * span, span, seen_from - begin, seen_to - begin);
    }
    std::fill(mixed, mixed + N * E, 0.0f);
    for (int64_t s = 0; s < span; s += LANES) {
      v.fetch(begin + s + AHEAD, E);
      for (int64_t j = 0; j < LANES; j++)
        for (int64_t c = 0; c < E / LANES; c++) block[j * (E / LANES) + c] = load_lanes(v.at(begin + s + j) + c * LANES);
      by_fours<Mix>(N, scores + s, span, block, E, mixed);
    }
    for (int64_t t = 0; t < num; t++)
      for (int64_t i = 0; i < G * E; i++) store(out[((first + t) * H + head * G) * E + i], mixed[t * G * E + i]);
  }

  // Norm if there is one, and rotate.
  void turn(const T* x, const T* weight, int64_t row, T* normed, float* to) const {
    if (weight) {
      norm(x, weight, normed, E, eps);
      x = normed;
    }
    rotate(x, cos + row * E, sin + row * E, to, E);
  }

  // Of a sequence whose first new row is at `start`; where a block begins.
  int64_t first_seen(int64_t start) const {
    return window ? std::max(int64_t(0), start + 1 - window) / LANES * LANES : 0;
  }

  static int64_t padded(int64_t num) { return (num + LANES - 1) / LANES * LANES; }

  // Floats that `attend` needs.
  int64_t needed(int64_t start, int64_t num) const {
    const int64_t N = num * G;
    return LANES * E + E + 2 * N * E + N * padded(start + num - first_seen(start));
  }

  // `plan` [3, B]: slots, first positions and numbers of new rows.
  void run(const int64_t* plan) const {
    const int64_t *slots = plan, *starts = plan + B, *counts = plan + 2 * B;
    static thread_local std::vector<float> memory;
    std::vector<int64_t> first(B + 1, 0);
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++) {
      first[b + 1] = first[b] + counts[b];
      most = std::max(most, padded(needed(starts[b], counts[b])));
    }
    memory.resize(omp_get_max_threads() * most + LANES);
    float* scratch = (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < B * K; item++) {
      const int64_t b = item / K;
      attend(item % K, slots[b], starts[b], first[b], counts[b], scratch + omp_get_thread_num() * most);
    }
  }
};

}  // namespace

// `attend` says if there was memory for it.
#define EXPORT(T, NAME)                                                                                                     \
  extern "C" void add_norm_##NAME(const T* x, const T* y, const T* weight, T* sum, T* out, int64_t R, int64_t D,            \
                                  float eps) {                                                                              \
    add_norm(x, y, weight, sum, out, R, D, eps);                                                                            \
  }                                                                                                                         \
  extern "C" void gate_##NAME(const T* gate_up, T* out, int64_t R, int64_t I) { gate(gate_up, out, R, I); }                 \
  extern "C" bool attend_##NAME(const T* qkv, const T* q_norm, const T* k_norm, const T* cos, const T* sin, T* keys,        \
                                T* values, T* out, const int64_t* plan, int64_t B, int64_t K, int64_t G, int64_t E,         \
                                int64_t S, int64_t window, float scale, float eps) {                                        \
    try {                                                                                                                   \
      Attention<T>{qkv, q_norm, k_norm, cos, sin, keys, values, out, B, K, G, E, S, window, scale, eps}.run(plan);          \
      return true;                                                                                                          \
    } catch (const std::bad_alloc&) {                                                                                       \
      return false;                                                                                                         \
    }                                                                                                                       \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)

// Whether `attend` is faster than torch: exchanges of 16 lanes are one instruction each here, where others need dozens.
extern "C" bool has_wide_vectors() {
#ifdef __AVX512F__
  return true;
#else
  return false;
#endif
}
