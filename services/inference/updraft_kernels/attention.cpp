// Rotary embedding, cache update and attention for all new rows of all sequences, as one call.
//
// Sizes: B sequences, H heads, K key-value heads, G = H / K, E head size (a multiple of LANES), S positions of a slot.

#include <omp.h>

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "simd.h"

namespace {

constexpr int64_t AHEAD = 2 * LANES;  // positions by which to prefetch ahead; the rows of a head are not adjacent

inline int64_t padded(int64_t num, int64_t to) { return (num + to - 1) / to * to; }

// Rotary embedding in Hugging Face's half-split layout; `sin` includes the signs.
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

// Keys or values of one head and one sequence: position s starts at first + s * pitch, and there are `end` positions.
template <typename T>
struct Rows {
  T* first;
  int64_t pitch, end;

  const T* at(int64_t s) const { return first + std::min(s, end - 1) * pitch; }  // past the end: the last, with no weight
  void prefetch(int64_t begin, int64_t E) const {
    for (int64_t s = begin; s < std::min(begin + LANES, end); s++)
      for (int64_t i = 0; i < E; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(first + s * pitch + i);
  }
};

// Transpose a block: out[e] receives element e of LANES positions.
template <typename T>
inline void transpose_part(const Rows<T>& rows, int64_t begin, int64_t c, Floats* out) {
#pragma GCC unroll 16
  for (int j = 0; j < LANES; j++) out[c + j] = load_lanes(rows.at(begin + j) + c);
  transpose(out + c);
}
inline void transpose_block(const Rows<float>& rows, int64_t begin, int64_t E, Floats* out) {
  for (int64_t c = 0; c < E; c += LANES) transpose_part(rows, begin, c, out);
}
inline void transpose_block(const Rows<bf16>& rows, int64_t begin, int64_t E, Floats* out) {
  int64_t c = 0;
  for (; c + 2 * LANES <= E; c += 2 * LANES) {  // two numbers move as one word, which halves the work
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
  if (c < E) transpose_part(rows, begin, c, out);
}

// Compute scores [M, LANES] of M queries [M, E] and a block of keys.
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

// Add a block of values, weighted by [M, LANES], to outputs [M, E].
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

// Process rows by fours, which then share what they read; `Kernel<M>` processes M rows.
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

// Turn the scores of positions [from, to) into weights, in place; other positions get weight 0.
void softmax(float* scores, int64_t span, int64_t from, int64_t to) {
  float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t s = from; s < to; s++) top = scores[s] > top ? scores[s] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = from; s < to; s++) {
    scores[s] = exponential(scores[s] - top);
    sum += scores[s];
  }
  for (int64_t s = from; s < to; s++) scores[s] /= sum;
  std::fill(scores, scores + from, 0.0f);
  std::fill(scores + to, scores + span, 0.0f);
}

// What the new rows of one sequence attend to in one key-value head: `span` positions from `begin`. `span` is a multiple of
// DEPTH; positions past the end get no weight. There are N queries of size E, in memory for a multiple of SIDE.
template <typename T>
struct AttentionSpan {
  Rows<T> k, v;
  int64_t begin, span, N, E;

  int64_t padded_N() const { return padded(N, SIDE); }
  // Floats of scratch memory for scores and outputs.
  static int64_t scratch_size(int64_t N, int64_t E, int64_t span) {
    return LANES * E + (padded(N, SIDE) + span) * E + padded(N, SIDE) * span;
  }
};

// Compute scores [N, span] of queries [N, E]. All arguments are aligned to cache lines.
template <typename T>
void score_by_simd(const AttentionSpan<T>& view, const float* q, float* scores, float* scratch) {
  for (int64_t s = 0; s < view.span; s += LANES) {
    view.k.prefetch(view.begin + s + AHEAD, view.E);
    transpose_block(view.k, view.begin + s, view.E, (Floats*)scratch);
    by_fours<Score>(view.N, q, view.E, (const Floats*)scratch, scores + s, view.span);
  }
}

// Compute outputs [N, E] from weights [N, span].
template <typename T>
void mix_by_simd(const AttentionSpan<T>& view, const float* weights, float* out, float* scratch) {
  const int64_t E = view.E;
  Floats* block = (Floats*)scratch;
  std::fill(out, out + view.N * E, 0.0f);
  for (int64_t s = 0; s < view.span; s += LANES) {
    view.v.prefetch(view.begin + s + AHEAD, E);
    for (int64_t j = 0; j < LANES; j++)
      for (int64_t c = 0; c < E; c += LANES) block[(j * E + c) / LANES] = load_lanes(view.v.at(view.begin + s + j) + c);
    by_fours<Mix>(view.N, weights + s, view.span, (const Floats*)block, E, out);
  }
}

// The same by AMX, with inputs rounded to bfloat16. False, with nothing done, where AMX does not apply.
inline bool score_by_amx(const AttentionSpan<float>&, const float*, float*, float*) { return false; }
inline bool mix_by_amx(const AttentionSpan<float>&, const float*, float*, float*) { return false; }

#if AMX

template <typename T>
bool uses_amx(int64_t E) {
  return std::is_same_v<T, bf16> && E % DEPTH == 0;
}

// Gives this thread its tiles while it exists.
template <typename T>
struct Tiles {
  const bool is_configured;
  explicit Tiles(int64_t E) : is_configured(uses_amx<T>(E)) {
    if (is_configured) configure_tiles(SIDE);
  }
  ~Tiles() {
    if (is_configured) _tile_release();
  }
};

inline void round_all(const float* from, int64_t size, bf16* to) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) store(to[i], from[i]);
}

bool score_by_amx(const AttentionSpan<bf16>& view, const float* q, float* scores, float* scratch) {
  const int64_t E = view.E;
  if (!uses_amx<bf16>(E)) return false;
  Words* keys = (Words*)scratch;  // [E / DEPTH] tiles of a block
  bf16* rounded = (bf16*)(scratch + LANES * E);
  round_all(q, view.N * E, rounded);
  for (int64_t s = 0; s < view.span; s += SIDE) {
    view.k.prefetch(view.begin + s + AHEAD, E);
    for (int64_t c = 0; c < E; c += DEPTH) {
      Words* tile = keys + c / 2;
#pragma GCC unroll 16
      for (int j = 0; j < SIDE; j++) tile[j] = load_as<Words>(view.k.at(view.begin + s + j) + c);
      transpose(tile);
    }
    flush_to_memory(*keys);
    for (int64_t n = 0; n < view.N; n += SIDE) {
      _tile_zero(0);
      for (int64_t c = 0; c < E; c += DEPTH) {
        _tile_loadd(4, rounded + n * E + c, 2 * E);
        _tile_loadd(6, keys + c / 2, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, scores + n * view.span + s, 4 * view.span);
    }
  }
  return true;
}

bool mix_by_amx(const AttentionSpan<bf16>& view, const float* weights, float* out, float* scratch) {
  const int64_t E = view.E, span = view.span;
  if (!uses_amx<bf16>(E)) return false;
  Words* values = (Words*)scratch;  // [span / DEPTH, E / SIDE] tiles
  bf16* rounded = (bf16*)(scratch + span * E / 2);
  round_all(weights, view.N * span, rounded);
  for (int64_t s = 0; s < span; s += DEPTH) {
    view.v.prefetch(view.begin + s + AHEAD, E);
    view.v.prefetch(view.begin + s + AHEAD + LANES, E);
    for (int64_t pair = 0; pair < SIDE; pair++) {
      const bf16 *even = view.v.at(view.begin + s + 2 * pair), *odd = view.v.at(view.begin + s + 2 * pair + 1);
      for (int64_t c = 0; c < E; c += SIDE) {
        const Words low = __builtin_convertvector(load_as<Halves>(even + c), Words);
        const Words high = __builtin_convertvector(load_as<Halves>(odd + c), Words);
        values[s / DEPTH * E + c + pair] = low | high << 16;
      }
    }
  }
  flush_to_memory(*values);
  for (int64_t n = 0; n < view.N; n += SIDE)
    for (int64_t c = 0; c < E; c += 2 * SIDE) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < span; s += DEPTH) {
        const Words* tiles = values + s / DEPTH * E + c;
        _tile_loadd(4, rounded + n * span + s, 2 * span);
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + SIDE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, out + n * E + c, 4 * E);
      _tile_stored(1, out + n * E + c + SIDE, 4 * E);
    }
  return true;
}

#else

template <typename T>
struct Tiles {
  explicit Tiles(int64_t) {}
};

inline bool score_by_amx(const AttentionSpan<bf16>&, const float*, float*, float*) { return false; }
inline bool mix_by_amx(const AttentionSpan<bf16>&, const float*, float*, float*) { return false; }

#endif

template <typename T>
struct Attention {
  const T *qkv, *q_norm, *k_norm, *cos, *sin;
  T *keys, *values, *out;
  int64_t B, K, G, E, S, window;
  float scale, eps;

  // For the new rows [first, first + num) of one sequence, the first at position `start`, in key-value head `head`: store
  // rotated keys and values, then attend to them and to all earlier ones. `scratch` is aligned to a cache line.
  void attend(int64_t head, int64_t slot, int64_t start, int64_t first, int64_t num, float* scratch) const {
    const int64_t H = K * G, width = (H + 2 * K) * E, N = num * G, end = start + num;
    const int64_t begin = first_visible(start), span = padded(end - begin, DEPTH), at = slot * S * K * E + head * E;
    const AttentionSpan<T> view{{keys + at, K * E, end}, {values + at, K * E, end}, begin, span, N, E};
    const Rows<T>&k = view.k, &v = view.v;
    T* normed = (T*)scratch;
    float *q = scratch + E, *mixed = q + view.padded_N() * E, *scores = mixed + view.padded_N() * E;
    float* more = scores + view.padded_N() * span;

    for (int64_t t = 0; t < num; t++) {
      const T* row = qkv + (first + t) * width;
      norm_and_rotate(row + (H + head) * E, k_norm, first + t, normed, mixed);  // `mixed` is free until values are mixed
      for (int64_t i = 0; i < E; i++) store(k.first[(start + t) * k.pitch + i], mixed[i]);
      std::memcpy(v.first + (start + t) * v.pitch, row + (H + K + head) * E, E * sizeof(T));
      for (int64_t g = 0; g < G; g++) norm_and_rotate(row + (head * G + g) * E, q_norm, first + t, normed, q + (t * G + g) * E);
    }
    for (int64_t i = 0; i < N * E; i++) q[i] *= scale;

    if (!score_by_amx(view, q, scores, more)) score_by_simd(view, q, scores, more);
    for (int64_t n = 0; n < N; n++) {
      const int64_t to = start + n / G + 1;
      const int64_t from = window ? std::max(begin, to - window) : begin;
      softmax(scores + n * span, span, from - begin, to - begin);
    }
    if (!mix_by_amx(view, scores, mixed, more)) mix_by_simd(view, scores, mixed, more);
    for (int64_t t = 0; t < num; t++)
      for (int64_t i = 0; i < G * E; i++) store(out[((first + t) * H + head * G) * E + i], mixed[t * G * E + i]);
  }

  // Normalize, if there is a weight, and rotate.
  void norm_and_rotate(const T* x, const T* weight, int64_t row, T* normed, float* to) const {
    if (weight) {
      norm(x, weight, normed, E, eps);
      x = normed;
    }
    rotate(x, cos + row * E, sin + row * E, to, E);
  }

  // The first visible position of a sequence whose first new row is at `start`, rounded down to a block.
  int64_t first_visible(int64_t start) const {
    return window ? std::max(int64_t(0), start + 1 - window) / LANES * LANES : 0;
  }

  // Floats of scratch memory for `attend`.
  int64_t scratch_size(int64_t start, int64_t num) const {
    const int64_t N = num * G;
    const int64_t span = padded(start + num - first_visible(start), DEPTH), padded_N = padded(N, SIDE);
    return E + 2 * padded_N * E + padded_N * span + AttentionSpan<T>::scratch_size(N, E, span);
  }

  // `plan` [3, B]: per sequence its slot, the position of its first new row, and its number of new rows.
  void run(const int64_t* plan) const {
    const int64_t *slots = plan, *starts = plan + B, *counts = plan + 2 * B;
    static thread_local std::vector<float> memory;
    std::vector<int64_t> first(B + 1, 0);
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++) {
      first[b + 1] = first[b] + counts[b];
      most = std::max(most, padded(scratch_size(starts[b], counts[b]), LANES));
    }
    memory.resize(omp_get_max_threads() * most + LANES);
    float* scratch = (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
#pragma omp parallel
    {
      const Tiles<T> tiles(E);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < B * K; item++) {
        const int64_t b = item / K;
        attend(item % K, slots[b], starts[b], first[b], counts[b], scratch + omp_get_thread_num() * most);
      }
    }
  }
};

}  // namespace

// False if there was no memory for it.
#define EXPORT(T, NAME)                                                                                                 \
  extern "C" bool attention_##NAME(const T* qkv, const T* q_norm, const T* k_norm, const T* cos, const T* sin, T* keys, \
                                   T* values, T* out, const int64_t* plan, int64_t B, int64_t K, int64_t G, int64_t E,  \
                                   int64_t S, int64_t window, float scale, float eps) {                                 \
    try {                                                                                                               \
      Attention<T>{qkv, q_norm, k_norm, cos, sin, keys, values, out, B, K, G, E, S, window, scale, eps}.run(plan);      \
      return true;                                                                                                      \
    } catch (const std::bad_alloc&) {                                                                                   \
      return false;                                                                                                     \
    }                                                                                                                   \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
