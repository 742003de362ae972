// Attention on tensor cores over heads as wide as latent attention's, of which many share a key: up to 32 query heads of one token are the
// rows of a tile. A product with queries is shared out among four warps by components, one with weights by columns of the result. Keys and
// values have one place each: while one is computed with, the other one's next arrive.
#pragma once
#include "attention.h"

template <int D_> struct Wide {
  static constexpr int D = D_, ROWS = 32, KEYS = 16, PARTS = 4, THREADS = ROWS / 16 * PARTS * WARP, STRIDE = D + 8, SHARE = D / PARTS, WEIGHTS = KEYS + 8;
  static constexpr int BYTES = (ROWS + 2 * KEYS) * STRIDE * int(sizeof(bf16));
  static_assert(SHARE % 16 == 0, "a product takes 16 components");
  static_assert(THREADS == ROWS * KEYS / 2, "in the softmax a thread has two keys of a row");
};

template <class S> __device__ __forceinline__ void fetch_wide(bf16* to, const bf16* cache, const Attention& a, int sequence, int kv_head, int from, int end) {
  for (int i = threadIdx.x; i < S::KEYS * (S::D / 8); i += S::THREADS) {
    const int key = i / (S::D / 8), column = i % (S::D / 8) * 8;
    const bool valid = from + key < end;
    const size_t at = valid ? (slot_of(a, sequence, from + key) * a.kv_heads + kv_head) * S::D + column : 0;
    cp_async_16(to + key * S::STRIDE + column, cache + at, valid);
  }
}

// Block (kv head and chunk of its query heads, token, split of the context).
template <class S>
__global__ void __launch_bounds__(S::THREADS) attend_wide(const bf16* q, const bf16* keys, const bf16* values, Attention a, bf16* out, int chunks) {
  constexpr int D = S::D, STRIDE = S::STRIDE, ROWS = S::ROWS, KEYS = S::KEYS, NS = S::SHARE / 8;
  DYNAMIC_SHARED(bf16, memory);
  SHARED(float, scores, [S::PARTS][ROWS][KEYS]);
  SHARED(bf16, weights, [ROWS][S::WEIGHTS]);
  SHARED(float, keeps, [ROWS]);
  SHARED(float2, found, [ROWS]);  // of each row the greatest score and the sum of weights
  bf16 *query = memory, *key = memory + ROWS * STRIDE, *value = key + KEYS * STRIDE;
  const int kv_head = blockIdx.x / chunks, group = a.heads / a.kv_heads, token = blockIdx.y, sequence = a.sequences[token];
  const int first_head = kv_head * group + blockIdx.x % chunks * ROWS, rows = smaller(ROWS, (kv_head + 1) * group - first_head);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, half = warp / S::PARTS * 16, part = warp % S::PARTS, column = part * S::SHARE;
  const Span seen = seen_by(a, token);
  const int share = ((seen.end - seen.begin + KEYS - 1) / KEYS + a.splits - 1) / a.splits * KEYS;
  const int begin = seen.begin + int(blockIdx.z) * share, end = smaller(seen.end, begin + share);
  const int steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
  for (int i = threadIdx.x; i < ROWS * (D / 8); i += S::THREADS) {
    const int r = i / (D / 8), c = i % (D / 8) * 8;
    const bool valid = r < rows;
    cp_async_16(query + r * STRIDE + c, q + (valid ? size_t(token) * a.q_stride + size_t(first_head + r) * D + c : 0), valid);
  }
  if (steps > 0) fetch_wide<S>(key, keys, a, sequence, kv_head, begin, end);
  cp_async_commit();
  if (steps > 0) fetch_wide<S>(value, values, a, sequence, kv_head, begin, end);
  cp_async_commit();
  const int row = threadIdx.x / (KEYS / 2), pair = threadIdx.x % (KEYS / 2) * 2;  // in the softmax
  float sum[NS][4] = {}, top = -INFINITY, total = 0;
  for (int step = 0; step < steps; ++step) {
    const int from = begin + step * KEYS;
    cp_async_wait<1>();
    __syncthreads();  // queries and this step's keys are there for all
    float score[2][4] = {};
#pragma unroll
    for (int k = 0; k < S::SHARE; k += 16) {
      uint32_t left[4], right[4];
      ldmatrix_x4(left, query + (half + lane % 16) * STRIDE + column + k + lane / 16 * 8);
      ldmatrix_x4(right, key + (lane / 16 * 8 + lane % 8) * STRIDE + column + k + lane / 8 % 2 * 8);
      mma_m16n8k16_bf16(score[0], left, right, score[0]);
      mma_m16n8k16_bf16(score[1], left, right + 2, score[1]);
    }
    for (int n = 0; n < 2; ++n)
      for (int upper = 0; upper < 2; ++upper)
        store(&scores[part][half + lane / 4 + upper * 8][n * 8 + lane % 4 * 2], make_float2(score[n][upper * 2], score[n][upper * 2 + 1]));
    __syncthreads();  // all parts of the scores are there, and nobody reads the keys any more
    if (step + 1 < steps) fetch_wide<S>(key, keys, a, sequence, kv_head, from + KEYS, end);
    cp_async_commit();
    float mine[2] = {}, most = top;
    for (int p = 0; p < S::PARTS; ++p) mine[0] += scores[p][row][pair], mine[1] += scores[p][row][pair + 1];
    for (int i = 0; i < 2; ++i) {
      mine[i] = from + pair + i < end ? capped(mine[i] * a.scale, a.soft_cap) : -INFINITY;
      most = fmaxf(most, mine[i]);
    }
    for (int far = 1; far < KEYS / 2; far *= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, far));
    const float keep = __expf(top - most);  // the first position of a step is always seen: `most` is a number
    top = most, total *= keep;
    for (int i = 0; i < 2; ++i) mine[i] = __expf(mine[i] - most), total += mine[i];
    store(&weights[row][pair], pack_bf16(mine[0], mine[1]));
    if (pair == 0) keeps[row] = keep;
    cp_async_wait<1>();
    __syncthreads();  // this step's values, weights and factors are there for all
    const float before[2] = {keeps[half + lane / 4], keeps[half + lane / 4 + 8]};
    for (int n = 0; n < NS; ++n)
      for (int i = 0; i < 4; ++i) sum[n][i] *= before[i / 2];
    uint32_t left[4];
    ldmatrix_x4(left, &weights[half + lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int n = 0; n < NS; n += 2) {
      uint32_t right[4];
      ldmatrix_x4_trans(right, value + lane % 16 * STRIDE + column + n * 8 + lane / 16 * 8);
      mma_m16n8k16_bf16(sum[n], left, right, sum[n]);
      mma_m16n8k16_bf16(sum[n + 1], left, right + 2, sum[n + 1]);
    }
    __syncthreads();  // nobody reads the values any more
    if (step + 1 < steps) fetch_wide<S>(value, values, a, sequence, kv_head, from + KEYS, end);
    cp_async_commit();
  }
  cp_async_wait<0>();  // where there was no step: the copies of queries must have ended before the block does
  for (int far = 1; far < KEYS / 2; far *= 2) total += __shfl_xor_sync(FULL, total, far);
  if (pair == 0) found[row] = make_float2(top, total);
  __syncthreads();
  for (int upper = 0; upper < 2; ++upper) {
    const int r = half + lane / 4 + upper * 8;
    if (r >= rows) continue;
    const size_t at = size_t(token) * a.heads + first_head + r;
    const float2 of = found[r];
    const float scale = a.splits == 1 ? with_sink(a, first_head + r, of.x, of.y) : 1.0f;
    float* parts = a.parts + (at * a.splits + blockIdx.z) * (D + 2);
    if (a.splits > 1 && part == 0 && lane % 4 == 0) parts[0] = of.x, parts[1] = of.y;
    for (int n = 0; n < NS; ++n) {
      const int c = column + n * 8 + lane % 4 * 2;
      const float x = sum[n][upper * 2] * scale, y = sum[n][upper * 2 + 1] * scale;
      if (a.splits == 1) store(out + at * D + c, pack_bf16(x, y));
      else store(parts + 2 + c, make_float2(x, y));
    }
  }
}
