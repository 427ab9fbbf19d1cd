// A step of the draft as one call, and its head as another: embedding row, norms, attention over the slots' cache, MLP, logits.
//
// Sizes: R rows, D hidden, I intermediate, H heads, K key-value heads, E head size, S positions of a slot, V draft vocabulary.

#include "int8.h"

#if INT8

#include <omp.h>

#include <new>

extern "C" bool attention_bfloat16(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, const bf16* cos, const bf16* sin,
                                   bf16* keys, bf16* values, bf16* out, const int64_t* plan, int64_t B, int64_t K, int64_t G,
                                   int64_t E, int64_t S, int64_t window, float scale, float eps);
extern "C" void top_scores_float32(const float* logits, const uint8_t* needs_sum, float* best, int64_t* token, float* sums,
                                   int64_t R, int64_t V);

namespace {

// As `DraftStep` in Python.
struct Step {
  Int8Weight qkv, o, gate_up, down, head;
  const bf16 *embedding, *token_norm, *state_norm, *mlp_norm, *final_norm, *cos, *sin;
  bf16 *keys, *values;
  int64_t D, I, H, K, E, S;
  int64_t norms_residual;
  float eps;
};

// While it exists, the caller's thread computes alone if the work is small. Waiting for helpers whose cores others use takes
// milliseconds, so few helpers do not pay for less than about one; many save more.
struct Team {
  static constexpr int64_t SMALL = int64_t(1) << 27;
  const int threads = omp_get_max_threads();
  Team(int64_t weights, int64_t R) {  // multiplying a weight by four rows takes about as long as reading it
    if (weights * (R + 4) * threads < SMALL) omp_set_num_threads(1);
  }
  ~Team() { omp_set_num_threads(threads); }
};

// Memory of a thread that calls; it grows to what its largest step needs.
struct Scratch {
  Int8Rows rows;
  std::vector<bf16> qkv, attended, cos, sin;
  std::vector<float> both, residual, y, gate_up;
};
thread_local Scratch scratch;

template <typename T>
T* sized(std::vector<T>& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// Norms of the embedding and of the state, side by side, for the projections; and what is added after attention.
void read_inputs(const Step& s, const bf16* x, const int64_t* ids, int64_t R, float* residual) {
  float* both = sized(scratch.both, R * 2 * s.D);
  scratch.rows.reset(R, 2 * s.D);
  for (int64_t r = 0; r < R; r++) {
    float *of_token = both + r * 2 * s.D, *of_state = of_token + s.D;
    norm(s.embedding + ids[r] * s.D, s.token_norm, of_token, s.D, s.eps);
    norm(x + r * s.D, s.state_norm, of_state, s.D, s.eps);
    for (int64_t i = 0; i < s.D; i++) residual[r * s.D + i] = s.norms_residual ? of_state[i] : load(x[r * s.D + i]);
    scratch.rows.set(r, of_token, 2 * s.D);
  }
}

// Attention's output, as inputs of the next product. False if there was no memory.
bool attend(const Step& s, const int64_t* plan, int64_t B, int64_t R) {
  const int64_t size = s.H * s.E, *starts = plan + B, *counts = plan + 2 * B;
  bf16 *qkv = sized(scratch.qkv, R * s.qkv.N), *out = sized(scratch.attended, R * size);
  bf16 *cos = sized(scratch.cos, R * s.E), *sin = sized(scratch.sin, R * s.E);
  for (int64_t b = 0, r = 0; b < B; b++)
    for (int64_t at = starts[b]; at < starts[b] + counts[b]; at++, r++) {
      std::memcpy(cos + r * s.E, s.cos + at * s.E, s.E * sizeof(bf16));
      std::memcpy(sin + r * s.E, s.sin + at * s.E, s.E * sizeof(bf16));
    }
  multiply(scratch.rows, s.qkv, R, qkv);
  const float scale = 1 / std::sqrt(float(s.E));
  if (!attention_bfloat16(qkv, nullptr, nullptr, cos, sin, s.keys, s.values, out, plan, B, s.K, s.H / s.K, s.E, s.S, 0, scale,
                          0))
    return false;
  scratch.rows.reset(R, size);
  for (int64_t r = 0; r < R; r++) scratch.rows.set(r, out + r * size, size);
  return true;
}

// Add the output of attention and that of the MLP to the residual.
void finish(const Step& s, int64_t R, float* residual, bf16* out) {
  float *y = sized(scratch.y, R * s.D), *gate_up = sized(scratch.gate_up, R * 2 * s.I), *normed = scratch.both.data();
  multiply(scratch.rows, s.o, R, y);
  scratch.rows.reset(R, s.D);
  for (int64_t r = 0; r < R; r++) {
    for (int64_t i = r * s.D; i < (r + 1) * s.D; i++) residual[i] += y[i];
    norm(residual + r * s.D, s.mlp_norm, normed, s.D, s.eps);
    scratch.rows.set(r, normed, s.D);
  }
  multiply(scratch.rows, s.gate_up, R, gate_up);
  scratch.rows.reset(R, s.I);
  for (int64_t r = 0; r < R; r++) {
    float *gate = gate_up + r * 2 * s.I, *up = gate + s.I;
#pragma omp simd
    for (int64_t i = 0; i < s.I; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    scratch.rows.set(r, gate, s.I);
  }
  multiply(scratch.rows, s.down, R, y);
  for (int64_t i = 0; i < R * s.D; i++) store(out[i], residual[i] + y[i]);
}

}  // namespace

// One product by itself, of x [R, K]. False, here and below, if there was no memory.
extern "C" bool matmul_int8(const Int8Weight* w, const bf16* x, bf16* out, int64_t R) {
  try {
    const Team team(w->size(), R);
    scratch.rows.reset(R, w->K);
    for (int64_t r = 0; r < R; r++) scratch.rows.set(r, x + r * w->K, w->K);
    multiply(scratch.rows, *w, R, out);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// States [R, D] after states `x` and the tokens `ids` after them. `plan` as for attention.
extern "C" bool draft_step(const Step* s, const bf16* x, const int64_t* ids, const int64_t* plan, int64_t B, int64_t R,
                           bf16* out) {
  try {
    const Team team(s->qkv.size() + s->o.size() + s->gate_up.size() + s->down.size(), R);
    float* residual = sized(scratch.residual, R * s->D);
    read_inputs(*s, x, ids, R, residual);
    if (!attend(*s, plan, B, R)) return false;
    finish(*s, R, residual, out);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// Logits [R, V] of states, and of each row the greatest, its place, and the logarithm of the sum of exponentials.
extern "C" bool draft_head(const Step* s, const bf16* x, int64_t R, float* logits, float* best, int64_t* token, float* sums) {
  try {
    const Team team(s->head.size(), R);
    float* normed = sized(scratch.both, s->D);
    scratch.rows.reset(R, s->D);
    for (int64_t r = 0; r < R; r++) {
      norm(x + r * s->D, s->final_norm, normed, s->D, s->eps);
      scratch.rows.set(r, normed, s->D);
    }
    multiply(scratch.rows, s->head, R, logits);
    const std::vector<uint8_t> needs_sum(R, 1);
    top_scores_float32(logits, needs_sum.data(), best, token, sums, R, s->head.N);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

#endif
