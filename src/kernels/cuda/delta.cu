// The gated delta rule (crate::DeltaSpec), token after token: a block has some columns of one head's state for all tokens of a row, in registers.
// Columns do not depend on each other, so prompts are shared out over many blocks, each of 32 columns; of a few tokens one block has the whole
// head, and its norm with it. A warp has 8 columns, four lanes each: those of a group hold every fourth four rows.
#include "states.h"

struct Delta {
  int key_heads, value_heads, key_dim, value_dim;
  float epsilon;
  const float *decay, *decay_bias;  // [value_heads]
  const float* norm;                // [value_dim]
};

constexpr int STAGE = 16, COLUMNS = 8, GROUPS = WARP / COLUMNS;  // tokens that are prepared together; columns of a warp

// Queries, keys [STAGE][KEY] and values [STAGE][columns] of some tokens in shared memory, and what goes with each token.
struct Staged {
  float *q, *k, *v;
  float *shrink, *correct, *match;  // [STAGE]: what is left of the state, how much of a correction is made, query · key
};

// Token `token` for a head, by one warp: queries and keys become unit vectors, queries times the scale of scores.
template <class T, int KEY> __device__ __forceinline__ void prepare(const T* qkv, const T* gates, const Delta& d, int head, size_t token, int at, const Staged& to) {
  const int lane = threadIdx.x % WARP, key_width = d.key_heads * d.key_dim;
  const T* query = qkv + token * (2 * key_width + d.value_heads * d.value_dim) + head / (d.value_heads / d.key_heads) * d.key_dim;
  float q[KEY / WARP], k[KEY / WARP], squares_q = 0, squares_k = 0, both = 0;
#pragma unroll
  for (int j = 0; j < KEY / WARP; ++j) {
    const int i = j * WARP + lane;
    q[j] = i < d.key_dim ? to_float(query[i]) : 0.0f, k[j] = i < d.key_dim ? to_float(query[key_width + i]) : 0.0f;
    squares_q += q[j] * q[j], squares_k += k[j] * k[j], both += q[j] * k[j];
  }
  const float by_q = rsqrtf(warp_sum(squares_q) + 1e-6f) * rsqrtf(float(d.key_dim)), by_k = rsqrtf(warp_sum(squares_k) + 1e-6f);
  both = warp_sum(both);
#pragma unroll
  for (int j = 0; j < KEY / WARP; ++j) to.q[at * KEY + j * WARP + lane] = q[j] * by_q, to.k[at * KEY + j * WARP + lane] = k[j] * by_k;
  if (lane > 0) return;
  const T* gate = gates + token * 2 * d.value_heads + head;
  const float x = to_float(gate[d.value_heads]) + d.decay_bias[head];
  to.shrink[at] = expf(-d.decay[head] * (x > 20.0f ? x : log1pf(expf(x))));
  to.correct[at] = 1.0f / (1.0f + expf(-to_float(gate[0])));
  to.match[at] = both * by_q * by_k;
}

// PIECES times four rows of the state a lane, THREADS / 4 columns a block. Block (columns, head, row).
template <class T, int PIECES, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS > 128 ? 1 : PIECES > 8 ? 2 : 4) delta_rule(const T* qkv, const T* gates, const T* z, Delta d, States states, float* state, T* out) {
  constexpr int KEY = PIECES * 4 * GROUPS;
  DYNAMIC_SHARED(float, memory);
  SHARED(float, partial, [2][WARP]);
  SHARED(float, of_tokens, [3][STAGE]);
  const int columns = blockDim.x / GROUPS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, group = lane / COLUMNS;
  const int own = warp * COLUMNS + lane % COLUMNS, first = blockIdx.x * columns, column = first + own, head = blockIdx.y, row = blockIdx.z;
  const Staged staged = {memory, memory + STAGE * KEY, memory + 2 * STAGE * KEY, of_tokens[0], of_tokens[1], of_tokens[2]};
  const bool there = column < d.value_dim, normalizes = gridDim.x == 1;
  const size_t value_width = size_t(d.value_heads) * d.value_dim, qkv_width = 2 * size_t(d.key_heads) * d.key_dim + value_width;
  // Where number i of the lane lies in a slot.
  auto at = [&](int slot, int i) { return state + ((size_t(slot) * d.value_heads + head) * d.key_dim + i / 4 * 4 * GROUPS + group * 4 + i % 4) * d.value_dim + column; };
  auto has = [&](int i) { return there && i / 4 * 4 * GROUPS + group * 4 + i % 4 < d.key_dim; };
  float s[PIECES * 4];
  const bool goes_on = states.goes_on[row];
#pragma unroll
  for (int i = 0; i < PIECES * 4; ++i) s[i] = goes_on && has(i) ? *at(states.slots[row], i) : 0.0f;
  int next = states.save_begins[row];
  const int begin = states.begins[row], end = states.begins[row + 1], last_save = states.save_begins[row + 1];
  for (int from = begin; from < end; from += STAGE) {
    const int count = end - from < STAGE ? end - from : STAGE;
    for (int i = warp; i < count; i += warps) prepare<T, KEY>(qkv, gates, d, head, from + i, i, staged);
    for (int i = threadIdx.x; i < count * columns; i += blockDim.x) {
      const int c = first + i % columns;
      staged.v[i] = c < d.value_dim ? to_float(qkv[size_t(from + i / columns) * qkv_width + 2 * d.key_heads * d.key_dim + size_t(head) * d.value_dim + c]) : 0.0f;
    }
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const float *k = staged.k + t * KEY + group * 4, *q = staged.q + t * KEY + group * 4, shrink = staged.shrink[t];
      float by_key = 0, by_query = 0;
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const float4 key = load<float4>(k + p * 4 * GROUPS), query = load<float4>(q + p * 4 * GROUPS);
        by_key += s[p * 4] * key.x + s[p * 4 + 1] * key.y + (s[p * 4 + 2] * key.z + s[p * 4 + 3] * key.w);
        by_query += s[p * 4] * query.x + s[p * 4 + 1] * query.y + (s[p * 4 + 2] * query.z + s[p * 4 + 3] * query.w);
      }
#pragma unroll
      for (int far = COLUMNS; far < WARP; far *= 2) by_key += __shfl_xor_sync(FULL, by_key, far), by_query += __shfl_xor_sync(FULL, by_query, far);
      const float change = (staged.v[t * columns + own] - shrink * by_key) * staged.correct[t];
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const float4 key = load<float4>(k + p * 4 * GROUPS);
        s[p * 4] = shrink * s[p * 4] + key.x * change, s[p * 4 + 1] = shrink * s[p * 4 + 1] + key.y * change;
        s[p * 4 + 2] = shrink * s[p * 4 + 2] + key.z * change, s[p * 4 + 3] = shrink * s[p * 4 + 3] + key.w * change;
      }
      // What the query reads of the state as it is now.
      float result = shrink * by_query + staged.match[t] * change;
      const size_t to = size_t(from + t) * value_width + size_t(head) * d.value_dim + column;
      const bool writes = there && group == 0;
      if (normalizes) {
        const float squares = block_sum(writes ? result * result : 0.0f, partial[t % 2]);
        if (writes) result *= rsqrtf(squares / float(d.value_dim) + d.epsilon) * d.norm[column] * to_float(z[to]);
      }
      if (writes) out[to] = from_float<T>(result);
      for (; next < last_save && states.saves[next].x == from + t; ++next)
#pragma unroll
        for (int i = 0; i < PIECES * 4; ++i)
          if (has(i)) *at(states.saves[next].y, i) = s[i];
    }
    __syncthreads();  // what is staged is written again
  }
}

// out = norm(out) · z for each head, where several blocks had a head's columns. A warp for a head of a token.
template <class T> __global__ void delta_norm(const T* z, Delta d, T* out, int heads) {
  const int lane = threadIdx.x % WARP, head = blockIdx.x * 4 + threadIdx.x / WARP;
  if (head >= heads) return;  // there is no barrier of the block
  const size_t at = size_t(head) * d.value_dim;
  float squares = 0;
  for (int i = lane; i < d.value_dim; i += WARP) squares += to_float(out[at + i]) * to_float(out[at + i]);
  const float scale = rsqrtf(warp_sum(squares) / float(d.value_dim) + d.epsilon);
  for (int i = lane; i < d.value_dim; i += WARP) out[at + i] = from_float<T>(to_float(out[at + i]) * scale * d.norm[i] * to_float(z[at + i]));
}

struct DeltaArguments {
  const void *qkv, *gates, *z;
  float* state;
  void* out;
  int rows, tokens;
};

template <class T, int PIECES, int THREADS> int delta_by(void* stream, const DeltaArguments& a, const Delta& d, const States& states) {
  const int wanted = blocks_of(d.value_dim, COLUMNS) * WARP, threads = wanted < THREADS ? wanted : THREADS, columns = threads / GROUPS;
  const dim3 grid(blocks_of(d.value_dim, columns), d.value_heads, a.rows);
  const size_t shared = size_t(STAGE) * (2 * PIECES * 4 * GROUPS + columns) * sizeof(float);
  const int error = launch(stream, grid, threads, shared, KERNEL(delta_rule<T, PIECES, THREADS>), static_cast<const T*>(a.qkv), static_cast<const T*>(a.gates),
                           static_cast<const T*>(a.z), d, states, a.state, static_cast<T*>(a.out));
  if (error || grid.x == 1) return error;
  const int heads = a.tokens * d.value_heads;
  return launch(stream, blocks_of(heads, 4), 128, 0, KERNEL(delta_norm<T>), static_cast<const T*>(a.z), d, static_cast<T*>(a.out), heads);
}
template <class T> int delta_of(void* stream, const DeltaArguments& a, const Delta& d, const States& states, bool few) {
  if (d.key_dim > 256) return NOT_SUPPORTED;
  if (d.key_dim > 128) return delta_by<T, 16, 128>(stream, a, d, states);
  if (d.key_dim > 32) return few ? delta_by<T, 8, 512>(stream, a, d, states) : delta_by<T, 8, 128>(stream, a, d, states);
  return few ? delta_by<T, 2, 512>(stream, a, d, states) : delta_by<T, 2, 128>(stream, a, d, states);
}

// `few`: rows have so few tokens that a block had better keep a whole head.
extern "C" int wc_gated_delta(void* stream, int dtype, const DeltaArguments* a, const Delta* d, const States* states, int few) {
  return dtype == BF16 ? delta_of<bf16>(stream, *a, *d, *states, few) : delta_of<float>(stream, *a, *d, *states, few);
}
