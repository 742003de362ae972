// Routed experts: which tokens go where, in an order that depends on nothing but the router's numbers, and the sum over a token's experts.
// The products in between are wc_gemv and wc_matmul with the experts' rows.
#include "common.h"

// crate::RoutingSpec
enum Score { SOFTMAX = 0, TOP_K_SOFTMAX = 1, SIGMOID = 2 };
struct Routing {
  int experts, top_k, score;
  int normalizes;
  float epsilon, least, scale;
  int groups, keep, best;  // crate::ExpertGroups; 0: none
};
constexpr int MAX_TOP_K = 32, MAX_EXPERTS = 1024, MAX_GROUPS = 64;

__device__ __forceinline__ bool better(float a, int i, float b, int j) { return a > b || (a == b && i < j); }

// Closes the experts of all groups but the best ones: nothing is chosen whose choice is -infinity. A lane has a group.
__device__ __forceinline__ void close_groups(float* choices, float* worths, const Routing& r, int lane) {
  const int size = r.experts / r.groups;
  for (int group = lane; group < r.groups; group += WARP) {
    float sum = 0, last = INFINITY;
    int last_at = -1;
    for (int n = 0; n < r.best; ++n) {
      float best = -INFINITY;
      int at = MAX_EXPERTS;
      for (int i = 0; i < size; ++i) {
        const int e = group * size + (i + lane) % size;  // each lane begins elsewhere, so that they meet in no bank
        if (better(last, last_at, choices[e], e) && better(choices[e], e, best, at)) best = choices[e], at = e;
      }
      sum += best, last = best, last_at = at;
    }
    worths[group] = sum;
  }
  __syncwarp();
  for (int group = lane; group < r.groups; group += WARP) {
    int ahead = 0;
    for (int other = 0; other < r.groups; ++other) ahead += other != group && better(worths[other], other, worths[group], group);
    if (ahead < r.keep) continue;
    for (int i = 0; i < size; ++i) choices[group * size + (i + lane) % size] = -INFINITY;
  }
  __syncwarp();
}

// A warp for a token: its experts [top_k] ascending, and their weights. The best is looked for top_k times.
template <class T> __global__ void route(const T* logits, const float* choice_bias, Routing r, int* picked, float* weights, int tokens) {
  SHARED(float, choices, [4][MAX_EXPERTS]);
  SHARED(float, worths, [4][MAX_GROUPS]);
  SHARED(int, chosen, [4][MAX_TOP_K]);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.x * 4 + warp;
  if (token >= tokens) return;  // there is no barrier of the block
  const T* row = logits + size_t(token) * r.experts;
  float most = -INFINITY, total = 0;
  for (int e = lane; e < r.experts; e += WARP) most = fmaxf(most, to_float(row[e]));
  for (int far = WARP / 2; far > 0; far /= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, far));
  for (int e = lane; e < r.experts; e += WARP) total += expf(to_float(row[e]) - most);
  total = warp_sum(total);
  auto score = [&](int e) {
    const float x = to_float(row[e]);
    return r.score == SOFTMAX ? expf(x - most) / total : r.score == SIGMOID ? 1.0f / (1.0f + expf(-x)) : x;
  };
  for (int e = lane; e < r.experts; e += WARP) choices[warp][e] = score(e) + (choice_bias ? choice_bias[e] : 0.0f);
  __syncwarp();
  if (r.groups > 0) close_groups(choices[warp], worths[warp], r, lane);
  for (int k = 0; k < r.top_k; ++k) {
    float best = -INFINITY;
    int at = MAX_EXPERTS;
    for (int e = lane; e < r.experts; e += WARP)
      if (better(choices[warp][e], e, best, at)) best = choices[warp][e], at = e;
    for (int far = WARP / 2; far > 0; far /= 2) {
      const float other = __shfl_xor_sync(FULL, best, far);
      const int place = __shfl_xor_sync(FULL, at, far);
      if (better(other, place, best, at)) best = other, at = place;
    }
    // Where nothing is left that compares (NaN), the expert is the lowest one not yet taken.
    if (at == MAX_EXPERTS) at = k;
    if (lane == 0) chosen[warp][k] = at, choices[warp][at] = -INFINITY;
    __syncwarp();
  }
  // Ascending, as the sum runs: each takes the place of how many are lower.
  int mine = 0, place = 0;
  if (lane < r.top_k) {
    mine = chosen[warp][lane];
    for (int k = 0; k < r.top_k; ++k) place += chosen[warp][k] < mine || (chosen[warp][k] == mine && k < lane);
  }
  float weight = lane < r.top_k ? score(mine) : -INFINITY;
  if (r.score == TOP_K_SOFTMAX) {
    float greatest = weight;
    for (int far = WARP / 2; far > 0; far /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(FULL, greatest, far));
    weight = expf(weight - greatest);
    weight /= warp_sum(weight);
  }
  const float sum = warp_sum(lane < r.top_k ? weight : 0.0f);
  if (r.normalizes) weight /= fmaxf(sum + r.epsilon, r.least);
  if (lane < r.top_k) {
    picked[size_t(token) * r.top_k + place] = mine;
    weights[size_t(token) * r.top_k + place] = weight * r.scale;
  }
}

constexpr int SCAN = 256;

// How many visits each expert has: block e counts its own.
__global__ void __launch_bounds__(SCAN) count_visits(const int* picked, int visits, int* counts) {
  SHARED(float, partial, [WARP]);
  float mine = 0;  // whole numbers below 2^24 are exact
  for (int i = threadIdx.x; i < visits; i += SCAN) mine += picked[i] == int(blockIdx.x);
  const float all = block_sum(mine, partial);
  if (threadIdx.x == 0) counts[blockIdx.x] = int(all);
}

// Block e: where its visits begin, and their numbers in ascending order.
__global__ void __launch_bounds__(SCAN) list_visits(const int* picked, int visits, const int* counts, int* offsets, int* list) {
  SHARED(float, partial, [WARP]);
  SHARED(int, of_warps, [SCAN / WARP]);
  const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float before = 0;
  for (int e = threadIdx.x; e < expert; e += SCAN) before += float(counts[e]);
  int at = int(block_sum(before, partial));
  if (threadIdx.x == 0) {
    offsets[expert] = at;
    if (expert == int(gridDim.x) - 1) offsets[expert + 1] = at + counts[expert];
  }
  for (int from = 0; from < visits; from += SCAN) {
    const int i = from + threadIdx.x;
    const bool mine = i < visits && picked[i] == expert;
    const unsigned ballot = __ballot_sync(FULL, mine);
    if (lane == 0) of_warps[warp] = __popc(ballot);
    __syncthreads();
    int lower = 0, all = 0;
    for (int w = 0; w < SCAN / WARP; ++w) {
      lower += w < warp ? of_warps[w] : 0;
      all += of_warps[w];
    }
    if (mine) list[at + lower + __popc(ballot & ((1u << lane) - 1))] = i;
    at += all;
    __syncthreads();  // `of_warps` is written again
  }
}

// out = (adds ? out : 0) + factor · Σ weight · result over the token's experts, ascending.
template <class T> __global__ void combine(const float* results, const float* weights, T* out, int top_k, int width, float factor, int adds) {
  const size_t token = blockIdx.x;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < top_k; ++k) sum += weights[token * top_k + k] * results[(token * top_k + k) * width + i];
    out[token * width + i] = from_float<T>((adds ? to_float(out[token * width + i]) : 0.0f) + factor * sum);
  }
}

// `picked`, `weights`, `list` [tokens · top_k], `counts` [experts], `offsets` [experts + 1].
extern "C" int wc_route(void* stream, int dtype, const void* logits, const float* choice_bias, const Routing* r, int* picked, float* weights, int* counts,
                        int* offsets, int* list, int tokens) {
  if (r->experts > MAX_EXPERTS || r->top_k > MAX_TOP_K || r->top_k > r->experts || tokens * r->top_k >= 1 << 24) return NOT_SUPPORTED;
  if (r->groups > 0 && (r->groups > MAX_GROUPS || r->experts % r->groups || r->best > r->experts / r->groups || r->keep * (r->experts / r->groups) < r->top_k)) return NOT_SUPPORTED;
  const int error = dtype == BF16 ? launch(stream, blocks_of(tokens, 4), 128, 0, KERNEL(route<bf16>), static_cast<const bf16*>(logits), choice_bias, *r, picked, weights, tokens)
                                  : launch(stream, blocks_of(tokens, 4), 128, 0, KERNEL(route<float>), static_cast<const float*>(logits), choice_bias, *r, picked, weights, tokens);
  if (error) return error;
  const int counted = launch(stream, r->experts, SCAN, 0, KERNEL(count_visits), picked, tokens * r->top_k, counts);
  return counted ? counted : launch(stream, r->experts, SCAN, 0, KERNEL(list_visits), picked, tokens * r->top_k, counts, offsets, list);
}
extern "C" int wc_combine(void* stream, int dtype, const float* results, const float* weights, void* out, int tokens, int top_k, int width, float factor, int adds) {
  return dtype == BF16 ? launch(stream, tokens, 256, 0, KERNEL(combine<bf16>), results, weights, static_cast<bf16*>(out), top_k, width, factor, adds)
                       : launch(stream, tokens, 256, 0, KERNEL(combine<float>), results, weights, static_cast<float*>(out), top_k, width, factor, adds);
}
