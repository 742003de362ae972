// Paged attention for any head size up to 768 and both types, a token at a time: (kv head, token, split of the context) is a block, and all
// query heads of the kv head are done with each key that is read. LANES lanes hold a key, PIECES times 8 numbers each; a warp reads
// 32 / LANES keys at once.
#include "attend_wide.h"

constexpr int WARPS = 4;

template <class T, int LANES, int HEADS, int PIECES>
__global__ void __launch_bounds__(WARPS * WARP, 2) attend_split(const T* q, const T* keys, const T* values, Attention a, T* out, int chunks) {
  constexpr int AT_ONCE = WARPS * WARP / LANES, UNROLL = PIECES > 1 ? 1 : 2, MINE = PIECES * 8;  // keys of a block's step; of those a lane has so many
  const int kv_head = blockIdx.x / chunks, group = a.heads / a.kv_heads, token = blockIdx.y, d = a.head_dim;
  const int first_head = kv_head * group + blockIdx.x % chunks * HEADS, heads = smaller(HEADS, (kv_head + 1) * group - first_head);
  const int part = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool whole = d % 8 == 0;
  const int sequence = a.sequences[token];
  const Span seen = seen_by(a, token);
  const int share = (seen.end - seen.begin + a.splits - 1) / a.splits;
  const int begin = seen.begin + int(blockIdx.z) * share, end = smaller(seen.end, begin + share);
  // A lane's pieces lie LANES pieces apart, so that lanes read side by side.
  auto there = [&](int piece) { return greater(0, smaller(8, d - (piece * LANES + lane) * 8)); };
  auto read = [&](const T* from, float* to) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = (p * LANES + lane) * 8, mine = there(p);
      if (whole && mine > 0) load8(from + at, to + p * 8);
      else load_some(from + at, mine, to + p * 8);
    }
  };
  float query[HEADS][MINE], sum[HEADS][MINE], top[HEADS], total[HEADS];
  for (int h = 0; h < HEADS; ++h) {
    top[h] = -INFINITY, total[h] = 0;
    for (int i = 0; i < MINE; ++i) query[h][i] = sum[h][i] = 0;
    if (h < heads) read(q + size_t(token) * a.q_stride + size_t(first_head + h) * d, query[h]);
  }
  // All lanes of a warp take the same steps: the sums over lanes need all of them.
  for (int step = begin; step < end; step += AT_ONCE * UNROLL) {
    float key[UNROLL][MINE], value[UNROLL][MINE], score[UNROLL][HEADS];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int position = step + u * AT_ONCE + part;
      if (position < end) {
        const size_t slot = (slot_of(a, sequence, position) * a.kv_heads + kv_head) * d;
        read(keys + slot, key[u]), read(values + slot, value[u]);
      } else {
        for (int i = 0; i < MINE; ++i) key[u][i] = value[u][i] = 0;
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const bool valid = step + u * AT_ONCE + part < end;
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float dot = 0;
        for (int i = 0; i < MINE; ++i) dot += query[h][i] * key[u][i];
        for (int far = LANES / 2; far > 0; far /= 2) dot += __shfl_xor_sync(FULL, dot, far);
        score[u][h] = valid ? capped(dot * a.scale, a.soft_cap) : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float most = top[h];
      for (int u = 0; u < UNROLL; ++u) most = fmaxf(most, score[u][h]);
      if (most == -INFINITY) continue;  // nothing yet
      const float keep = __expf(top[h] - most);
      top[h] = most, total[h] *= keep;
      for (int i = 0; i < MINE; ++i) sum[h][i] *= keep;
      for (int u = 0; u < UNROLL; ++u) {
        const float weight = __expf(score[u][h] - most);
        total[h] += weight;
        for (int i = 0; i < MINE; ++i) sum[h][i] += weight * value[u][i];
      }
    }
  }
  // What the parts of the block have found is put together: [parts][HEADS][d + 2]
  DYNAMIC_SHARED(float, found);
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    if (h >= heads) continue;
    float* to = found + (part * HEADS + h) * (d + 2);
    if (lane == 0) to[0] = top[h], to[1] = total[h];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) store_some(to + 2 + (p * LANES + lane) * 8, there(p), sum[h] + p * 8);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * d; i += blockDim.x) {
    const int h = i / d, j = i % d;
    float most = -INFINITY, weights = 0, weighted = 0;
    for (int p = 0; p < AT_ONCE; ++p) most = fmaxf(most, found[(p * HEADS + h) * (d + 2)]);
    for (int p = 0; p < AT_ONCE; ++p) {
      const float* one = found + (p * HEADS + h) * (d + 2);
      if (one[0] == -INFINITY) continue;
      const float keep = __expf(one[0] - most);
      weights += one[1] * keep, weighted += one[2 + j] * keep;
    }
    const size_t row = size_t(token) * a.heads + first_head + h;
    if (a.splits == 1) {
      out[row * d + j] = from_float<T>(weighted * with_sink(a, first_head + h, most, weights));
    } else {
      float* to = a.parts + (row * a.splits + blockIdx.z) * (d + 2);
      if (j == 0) to[0] = most, to[1] = weights;
      to[2 + j] = weighted;
    }
  }
}

// The parts of the context of head `blockIdx.x` of token `blockIdx.y`.
template <class T> __global__ void attend_merge(Attention a, T* out) {
  const size_t row = size_t(blockIdx.y) * a.heads + blockIdx.x;
  const int d = a.head_dim;
  const float* first = a.parts + row * a.splits * (d + 2);
  float top = -INFINITY, total = 0;
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, first[size_t(s) * (d + 2)]);
  for (int s = 0; s < a.splits; ++s) total += first[size_t(s) * (d + 2) + 1] * __expf(first[size_t(s) * (d + 2)] - top);
  const float scale = with_sink(a, blockIdx.x, top, total);
  for (int j = threadIdx.x; j < d; j += blockDim.x) {
    float weighted = 0;
    for (int s = 0; s < a.splits; ++s) weighted += first[size_t(s) * (d + 2) + 2 + j] * __expf(first[size_t(s) * (d + 2)] - top);
    out[row * d + j] = from_float<T>(weighted * scale);
  }
}

template <class T, int LANES, int HEADS, int PIECES = 1>
int attend_heads(void* stream, const void* q, const void* keys, const void* values, const Attention& a, void* out, int tokens) {
  const int chunks = blocks_of(a.heads / a.kv_heads, HEADS);
  const size_t shared = size_t(WARPS * WARP / LANES) * HEADS * (a.head_dim + 2) * sizeof(float);
  return launch(stream, dim3(a.kv_heads * chunks, tokens, a.splits), WARPS * WARP, shared, KERNEL(attend_split<T, LANES, HEADS, PIECES>), static_cast<const T*>(q),
                static_cast<const T*>(keys), static_cast<const T*>(values), a, static_cast<T*>(out), chunks);
}
template <class T, int LANES>
int attend_lanes(void* stream, const void* q, const void* keys, const void* values, const Attention& a, void* out, int tokens) {
  const int group = a.heads / a.kv_heads;
  if (group == 1) return attend_heads<T, LANES, 1>(stream, q, keys, values, a, out, tokens);
  if (group == 2) return attend_heads<T, LANES, 2>(stream, q, keys, values, a, out, tokens);
  return attend_heads<T, LANES, 4>(stream, q, keys, values, a, out, tokens);
}
// Latent attention's on tensor cores.
template <class S> int attend_wide_of(void* stream, const void* q, const void* keys, const void* values, const Attention& a, void* out, int tokens) {
  const int chunks = blocks_of(a.heads / a.kv_heads, S::ROWS);
  return launch(stream, dim3(a.kv_heads * chunks, tokens, a.splits), S::THREADS, S::BYTES, KERNEL(attend_wide<S>), static_cast<const bf16*>(q),
                static_cast<const bf16*>(keys), static_cast<const bf16*>(values), a, static_cast<bf16*>(out), chunks);
}
template <class T> int attend_of(void* stream, const void* q, const void* keys, const void* values, const Attention& a, void* out, int tokens) {
  if (a.head_dim > 768) return NOT_SUPPORTED;
  const int error = sizeof(T) == 2 && a.head_dim == 576 ? attend_wide_of<Wide<576>>(stream, q, keys, values, a, out, tokens)
                    : a.head_dim <= 32    ? attend_lanes<T, 4>(stream, q, keys, values, a, out, tokens)
                    : a.head_dim <= 64  ? attend_lanes<T, 8>(stream, q, keys, values, a, out, tokens)
                    : a.head_dim <= 128 ? attend_lanes<T, 16>(stream, q, keys, values, a, out, tokens)
                    : a.head_dim <= 256 ? attend_lanes<T, 32>(stream, q, keys, values, a, out, tokens)
                                        : attend_heads<T, 32, 1, 3>(stream, q, keys, values, a, out, tokens);
  if (error || a.splits == 1) return error;
  return launch(stream, dim3(a.heads, tokens), a.head_dim <= 64 ? 64 : 128, 0, KERNEL(attend_merge<T>), a, static_cast<T*>(out));
}

extern "C" int wc_attend(void* stream, int dtype, const void* q, const void* keys, const void* values, const Attention* a, void* out, int tokens) {
  return dtype == BF16 ? attend_of<bf16>(stream, q, keys, values, *a, out, tokens) : attend_of<float>(stream, q, keys, values, *a, out, tokens);
}
extern "C" int wc_attend_merge(void* stream, int dtype, const Attention* a, void* out, int tokens) {
  const dim3 grid(a->heads, tokens);
  return dtype == BF16 ? launch(stream, grid, 128, 0, KERNEL(attend_merge<bf16>), *a, static_cast<bf16*>(out))
                       : launch(stream, grid, 128, 0, KERNEL(attend_merge<float>), *a, static_cast<float*>(out));
}
