// Rotation, cache and attention of all rows of all sequences, as one call: see `fused.py`, and ADR 0019 for why.
//
// Sizes: B sequences, H heads, K key-value heads, G = H / K, E head size (a multiple of LANES), S positions of a slot.

#include <omp.h>

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "tiles.h"

namespace {

constexpr int64_t AHEAD = 2 * LANES;  // positions between what is read and what is fetched: rows of a head lie apart

inline int64_t padded(int64_t num, int64_t to) { return (num + to - 1) / to * to; }

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

// What the new rows of one sequence attend to in one key-value head: `span` positions from `begin` on, a multiple of DEPTH, of
// which those beyond the last one are given no weight. N queries, in memory for a multiple of SIDE, of heads of size E.
template <typename T>
struct View {
  Rows<T> k, v;
  int64_t begin, span, N, E;

  int64_t whole() const { return padded(N, SIDE); }
  // Floats that scores and outputs need besides.
  static int64_t needed(int64_t N, int64_t E, int64_t span) {
    return LANES * E + (padded(N, SIDE) + span) * E + padded(N, SIDE) * span;
  }
};

// Scores [N, span] of queries [N, E]. All memory begins where a cache line does.
template <typename T>
void score_by_vectors(const View<T>& view, const float* q, float* scores, float* scratch) {
  for (int64_t s = 0; s < view.span; s += LANES) {
    view.k.fetch(view.begin + s + AHEAD, view.E);
    columns(view.k, view.begin + s, view.E, (Floats*)scratch);
    by_fours<Score>(view.N, q, view.E, (const Floats*)scratch, scores + s, view.span);
  }
}

// Outputs [N, E] by weights [N, span].
template <typename T>
void mix_by_vectors(const View<T>& view, const float* weights, float* out, float* scratch) {
  const int64_t E = view.E;
  Floats* block = (Floats*)scratch;
  std::fill(out, out + view.N * E, 0.0f);
  for (int64_t s = 0; s < view.span; s += LANES) {
    view.v.fetch(view.begin + s + AHEAD, E);
    for (int64_t j = 0; j < LANES; j++)
      for (int64_t c = 0; c < E; c += LANES) block[(j * E + c) / LANES] = load_lanes(view.v.at(view.begin + s + j) + c);
    by_fours<Mix>(view.N, weights + s, view.span, (const Floats*)block, E, out);
  }
}

// The same by tiles, of numbers rounded to bfloat16; false, and nothing is done, where there are none.
inline bool score_by_tiles(const View<float>&, const float*, float*, float*) { return false; }
inline bool mix_by_tiles(const View<float>&, const float*, float*, float*) { return false; }

#if TILES

template <typename T>
bool is_tiled(int64_t E) {
  return std::is_same_v<T, bf16> && E % DEPTH == 0 && has_tiles_here();
}

// This thread has tiles as long as this lives.
template <typename T>
struct Tiled {
  const bool is;
  explicit Tiled(int64_t E) : is(is_tiled<T>(E)) {
    if (is) configure(SIDE);
  }
  ~Tiled() {
    if (is) _tile_release();
  }
};

inline void round_all(const float* from, int64_t size, bf16* to) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) store(to[i], from[i]);
}

bool score_by_tiles(const View<bf16>& view, const float* q, float* scores, float* scratch) {
  const int64_t E = view.E;
  if (!is_tiled<bf16>(E)) return false;
  Words* keys = (Words*)scratch;  // [E / DEPTH] tiles of a block
  bf16* rounded = (bf16*)(scratch + LANES * E);
  round_all(q, view.N * E, rounded);
  for (int64_t s = 0; s < view.span; s += SIDE) {
    view.k.fetch(view.begin + s + AHEAD, E);
    for (int64_t c = 0; c < E; c += DEPTH) {
      Words* tile = keys + c / 2;
#pragma GCC unroll 16
      for (int j = 0; j < SIDE; j++) tile[j] = load_as<Words>(view.k.at(view.begin + s + j) + c);
      transpose(tile);
    }
    is_in_memory(*keys);
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

bool mix_by_tiles(const View<bf16>& view, const float* weights, float* out, float* scratch) {
  const int64_t E = view.E, span = view.span;
  if (!is_tiled<bf16>(E)) return false;
  Words* values = (Words*)scratch;  // [span / DEPTH, E / SIDE] tiles
  bf16* rounded = (bf16*)(scratch + span * E / 2);
  round_all(weights, view.N * span, rounded);
  for (int64_t s = 0; s < span; s += DEPTH) {
    view.v.fetch(view.begin + s + AHEAD, E);
    view.v.fetch(view.begin + s + AHEAD + LANES, E);
    for (int64_t pair = 0; pair < SIDE; pair++) {
      const bf16 *even = view.v.at(view.begin + s + 2 * pair), *odd = view.v.at(view.begin + s + 2 * pair + 1);
      for (int64_t c = 0; c < E; c += SIDE) {
        const Words low = __builtin_convertvector(load_as<Halves>(even + c), Words);
        const Words high = __builtin_convertvector(load_as<Halves>(odd + c), Words);
        values[s / DEPTH * E + c + pair] = low | high << 16;
      }
    }
  }
  is_in_memory(*values);
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
struct Tiled {
  explicit Tiled(int64_t) {}
};

inline bool score_by_tiles(const View<bf16>&, const float*, float*, float*) { return false; }
inline bool mix_by_tiles(const View<bf16>&, const float*, float*, float*) { return false; }

#endif

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
    const int64_t begin = first_seen(start), span = padded(end - begin, DEPTH), at = slot * S * K * E + head * E;
    const View<T> view{{keys + at, K * E, end}, {values + at, K * E, end}, begin, span, N, E};
    const Rows<T>&k = view.k, &v = view.v;
    T* normed = (T*)scratch;
    float *q = scratch + E, *mixed = q + view.whole() * E, *scores = mixed + view.whole() * E;
    float* more = scores + view.whole() * span;

    for (int64_t t = 0; t < num; t++) {
      const T* row = qkv + (first + t) * width;
      turn(row + (H + head) * E, k_norm, first + t, normed, mixed);  // free until values are mixed
      for (int64_t i = 0; i < E; i++) store(k.first[(start + t) * k.pitch + i], mixed[i]);
      std::memcpy(v.first + (start + t) * v.pitch, row + (H + K + head) * E, E * sizeof(T));
      for (int64_t g = 0; g < G; g++) turn(row + (head * G + g) * E, q_norm, first + t, normed, q + (t * G + g) * E);
    }
    for (int64_t i = 0; i < N * E; i++) q[i] *= scale;

    if (!score_by_tiles(view, q, scores, more)) score_by_vectors(view, q, scores, more);
    for (int64_t n = 0; n < N; n++) {
      const int64_t seen_to = start + n / G + 1;
      const int64_t seen_from = window ? std::max(begin, seen_to - window) : begin;
      softmax(scores + n * span, span, seen_from - begin, seen_to - begin);
    }
    if (!mix_by_tiles(view, scores, mixed, more)) mix_by_vectors(view, scores, mixed, more);
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

  // Floats that `attend` needs.
  int64_t needed(int64_t start, int64_t num) const {
    const int64_t N = num * G;
    const int64_t span = padded(start + num - first_seen(start), DEPTH), whole = padded(N, SIDE);
    return E + 2 * whole * E + whole * span + View<T>::needed(N, E, span);
  }

  // `plan` [3, B]: slots, first positions and numbers of new rows.
  void run(const int64_t* plan) const {
    const int64_t *slots = plan, *starts = plan + B, *counts = plan + 2 * B;
    static thread_local std::vector<float> memory;
    std::vector<int64_t> first(B + 1, 0);
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++) {
      first[b + 1] = first[b] + counts[b];
      most = std::max(most, padded(needed(starts[b], counts[b]), LANES));
    }
    memory.resize(omp_get_max_threads() * most + LANES);
    float* scratch = (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
#pragma omp parallel
    {
      const Tiled<T> tiles(E);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < B * K; item++) {
        const int64_t b = item / K;
        attend(item % K, slots[b], starts[b], first[b], counts[b], scratch + omp_get_thread_num() * most);
      }
    }
  }
};

}  // namespace

// `attend` says if there was memory for it.
#define EXPORT(T, NAME)                                                                                                     \
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
