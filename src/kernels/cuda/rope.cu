// What stands between the product that makes queries, keys and values and attention: norms of heads, rotation, and keys and values into
// their slots of the paged cache. A block for a token, or for some of its heads where those are many; they lie in shared memory as f32, and a
// head is one warp's.
#include "common.h"

// cos and sin of position · frequency, [t, pairs]: once a step for each table.
__global__ void angles(const int* positions, const float* frequencies, float factor, float* cosines, float* sines, int pairs) {
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const float angle = float(positions[blockIdx.x]) * frequencies[i];
    cosines[size_t(blockIdx.x) * pairs + i] = cosf(angle) * factor;
    sines[size_t(blockIdx.x) * pairs + i] = sinf(angle) * factor;
  }
}

// crate::AttentionSpec's part of it. NORM_NONE, a head or a token on its own; before the rotation or after it.
enum Extent { NORM_NONE = 0, NORM_HEAD = 1, NORM_TOKEN = 2 };
struct Preparation {
  int heads, kv_heads, head_dim;
  int pairs;        // that are rotated; 0: none
  int interleaved;  // neighbours, not halves
  int extent, after_rope;
  float norm_epsilon;
  int norms_values;
  float value_epsilon;
  float growth;  // queries · 1 + growth · ln(1 + position / growth_length); 0: no
  int growth_length;
};

__device__ __forceinline__ float head_squares(const float* head, int d, int lane) {
  float sum = 0;
  for (int i = lane; i < d; i += WARP) sum += head[i] * head[i];
  return sum;
}
__device__ __forceinline__ void scale_head(float* head, int d, int lane, float scale, const float* weight) {
  for (int i = lane; i < d; i += WARP) head[i] *= weight ? scale * weight[i] : scale;
}

// RMS norms of the queries and keys among heads `from` to `to`, which begin at `row`, by the warps that own the heads.
__device__ __forceinline__ void norm_heads(float* row, int from, int to, const Preparation& p, const float* q_weight, const float* k_weight, float* partial) {
  const int d = p.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  float scale[2] = {0, 0};
  if (p.extent == NORM_TOKEN)  // then the block has the whole token
    for (int keys = 0; keys < 2; ++keys) {
      const int first = keys ? p.heads : 0, end = keys ? p.heads + p.kv_heads : p.heads;
      float sum = 0;
      for (int head = warp; head < end; head += warps)
        if (head >= first) sum += head_squares(row + head * d, d, lane);
      scale[keys] = rsqrtf(block_sum(sum, partial) / float((end - first) * d) + p.norm_epsilon);
      __syncthreads();  // `partial` is written again
    }
  for (int head = from + warp; head < smaller(to, p.heads + p.kv_heads); head += warps) {
    float* mine = row + (head - from) * d;
    const bool is_key = head >= p.heads;
    const float* weight = is_key ? k_weight : q_weight;
    float by = scale[is_key];
    if (p.extent == NORM_HEAD) by = rsqrtf(warp_sum(head_squares(mine, d, lane)) / float(d) + p.norm_epsilon);
    if (p.extent == NORM_TOKEN && weight) weight += (is_key ? head - p.heads : head) * d;
    scale_head(mine, d, lane, by, weight);
  }
  // The lanes of a head's warp read what others of them have written.
  __syncwarp();
}

template <class T>
__global__ void rope_and_store(T* qkv, int per_block, Preparation p, const float* q_weight, const float* k_weight, const float* cosines, const float* sines,
                               const int* positions, const int* slots, T* keys, T* values) {
  DYNAMIC_SHARED(float, row);
  SHARED(float, partial, [WARP]);
  const int d = p.head_dim, all = p.heads + 2 * p.kv_heads, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int first = blockIdx.y * per_block, last = smaller(all, first + per_block), rotated = smaller(last, p.heads + p.kv_heads);
  T* from = qkv + size_t(blockIdx.x) * all * d;
  // From here to the end a warp reads and writes its own heads alone.
  for (int head = first + warp; head < last; head += warps)
    for (int i = lane; i < d; i += WARP) row[(head - first) * d + i] = to_float(from[head * d + i]);
  __syncwarp();
  if (p.extent != NORM_NONE && !p.after_rope) norm_heads(row, first, last, p, q_weight, k_weight, partial);
  if (p.pairs > 0) {
    const float *c = cosines + size_t(blockIdx.x) * p.pairs, *s = sines + size_t(blockIdx.x) * p.pairs;
    for (int head = first + warp; head < rotated; head += warps)
      for (int i = lane; i < p.pairs; i += WARP) {
        float* a = row + (head - first) * d + (p.interleaved ? 2 * i : i);
        float* b = p.interleaved ? a + 1 : a + p.pairs;
        const float x = *a, y = *b;
        *a = x * c[i] - y * s[i], *b = x * s[i] + y * c[i];
      }
    __syncwarp();
  }
  if (p.extent != NORM_NONE && p.after_rope) norm_heads(row, first, last, p, q_weight, k_weight, partial);
  const int slot = slots[blockIdx.x];
  const float grown = p.growth == 0.0f ? 1.0f : 1.0f + p.growth * logf(float(1 + positions[blockIdx.x] / p.growth_length));
  for (int head = first + warp; head < last; head += warps) {
    const float* mine = row + (head - first) * d;
    if (head < p.heads) {
      for (int i = lane; i < d; i += WARP) from[head * d + i] = from_float<T>(mine[i] * grown);
      continue;
    }
    const bool is_value = head >= p.heads + p.kv_heads;
    float scale = 1;
    if (is_value && p.norms_values) scale = rsqrtf(warp_sum(head_squares(mine, d, lane)) / float(d) + p.value_epsilon);
    if (slot < 0) continue;  // a row that fills up a bucket of a graph
    const int kv_head = (head - p.heads) % p.kv_heads;
    T* to = (is_value ? values : keys) + (size_t(slot) * p.kv_heads + kv_head) * d;
    for (int i = lane; i < d; i += WARP) to[i] = from_float<T>(mine[i] * scale);
  }
}

extern "C" int wc_angles(void* stream, const int* positions, const float* frequencies, float factor, float* cosines, float* sines, int tokens, int pairs) {
  return launch(stream, tokens, 64, 0, KERNEL(angles), positions, frequencies, factor, cosines, sines, pairs);
}

template <class T>
int rope_of(void* stream, void* qkv, const Preparation& p, const float* q_weight, const float* k_weight, const float* cosines, const float* sines,
            const int* positions, const int* slots, void* keys, void* values, int tokens) {
  // A norm over all heads needs all of them; else more blocks are better than more than 16 KB.
  const int all = p.heads + 2 * p.kv_heads, fit = 4096 / p.head_dim > 1 ? 4096 / p.head_dim : 1;
  const int per_block = p.extent == NORM_TOKEN || all < fit ? all : fit, warps = per_block < 8 ? per_block : 8;
  return launch(stream, dim3(tokens, blocks_of(all, per_block)), warps * WARP, size_t(per_block) * p.head_dim * sizeof(float), KERNEL(rope_and_store<T>),
                static_cast<T*>(qkv), per_block, p, q_weight, k_weight,
                cosines, sines, positions, slots, static_cast<T*>(keys), static_cast<T*>(values));
}

// Queries stay in the first heads · head_dim columns of `qkv`; a slot below 0 is not written.
extern "C" int wc_rope_and_store(void* stream, int dtype, void* qkv, const Preparation* p, const float* q_weight, const float* k_weight, const float* cosines,
                                 const float* sines, const int* positions, const int* slots, void* keys, void* values, int tokens) {
  return dtype == BF16 ? rope_of<bf16>(stream, qkv, *p, q_weight, k_weight, cosines, sines, positions, slots, keys, values, tokens)
                       : rope_of<float>(stream, qkv, *p, q_weight, k_weight, cosines, sines, positions, slots, keys, values, tokens);
}
