// Paged attention on tensor cores, for bf16 and heads of 64, 128 or 256: rows of a tile are (token, query head) pairs of one kv head, so a
// key that is read serves all of them. For long prompts 64 rows in four warps; for decoding 16 rows, whose keys the warps share out.
#include "attention.h"

// QW warps along the rows, KW along the keys; KEYS keys in a tile.
template <int D_, int QW_, int KW_, int KEYS_> struct Shape {
  static constexpr int D = D_, QW = QW_, KW = KW_, KEYS = KEYS_, ROWS = 16 * QW, MINE = KEYS / KW, THREADS = QW * KW * WARP, STRIDE = D + 8;
  static constexpr int KV = KEYS * STRIDE;  // numbers of a tile of keys, or of values
  static constexpr int FOUND = KW * ROWS * (D + 2) * int(sizeof(float)), TILES = 4 * KV * int(sizeof(bf16));
  static constexpr int BYTES = ROWS * STRIDE * int(sizeof(bf16)) + (FOUND > TILES ? FOUND : TILES);
  static_assert(MINE % 16 == 0, "a product takes 16 keys");
};

// Keys or values of positions `from` … to shared memory; from `end` on they are 0, so that a weight of 0 makes 0 of them.
template <class S> __device__ __forceinline__ void fetch_keys(bf16* to, const bf16* cache, const Attention& a, int sequence, int kv_head, int from, int end) {
  for (int i = threadIdx.x; i < S::KEYS * (S::D / 8); i += S::THREADS) {
    const int key = i / (S::D / 8), column = i % (S::D / 8) * 8;
    const bool valid = from + key < end;
    const size_t at = valid ? (slot_of(a, sequence, from + key) * a.kv_heads + kv_head) * S::D + column : 0;
    cp_async_16(to + key * S::STRIDE + column, cache + at, valid);
  }
}

// `tiles`: first token of each and how many, all of one sequence. Block (kv head, tile, split of the context).
template <class S>
__global__ void __launch_bounds__(S::THREADS) attend_tiles(const bf16* q, const bf16* keys, const bf16* values, Attention a, const int2* tiles, bf16* out) {
  constexpr int D = S::D, STRIDE = S::STRIDE, ROWS = S::ROWS, NS = S::MINE / 8;
  DYNAMIC_SHARED(bf16, memory);
  SHARED(int2, seen, [ROWS]);  // the positions of each row: from the first to before the second
  const int2 tile = tiles[blockIdx.y];
  const int kv_head = blockIdx.x, group = a.heads / a.kv_heads, rows = tile.y * group, sequence = a.sequences[tile.x];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = warp / S::KW * 16, own = warp % S::KW * S::MINE;
  bf16 *query = memory, *tiles_kv = memory + ROWS * STRIDE;
  auto key_tile = [&](int step) { return tiles_kv + step % 2 * 2 * S::KV; };
  const int end_of_all = seen_by(a, tile.x + tile.y - 1).end, begin_of_all = seen_by(a, tile.x).begin;
  const int share = ((end_of_all - begin_of_all + S::KEYS - 1) / S::KEYS + a.splits - 1) / a.splits * S::KEYS;
  const int begin = begin_of_all + int(blockIdx.z) * share, end = smaller(end_of_all, begin + share);
  const int steps = end > begin ? (end - begin + S::KEYS - 1) / S::KEYS : 0;
  for (int i = threadIdx.x; i < ROWS; i += S::THREADS) {
    const Span of = i < rows ? seen_by(a, tile.x + i / group) : Span{0, 0};
    seen[i] = make_int2(of.begin, of.end);
  }
  for (int i = threadIdx.x; i < ROWS * (D / 8); i += S::THREADS) {
    const int r = i / (D / 8), column = i % (D / 8) * 8;
    const bool valid = r < rows;
    const size_t at = valid ? size_t(tile.x + r / group) * a.q_stride + size_t(kv_head * group + r % group) * D + column : 0;
    cp_async_16(query + r * STRIDE + column, q + at, valid);
  }
  if (steps > 0) {
    fetch_keys<S>(key_tile(0), keys, a, sequence, kv_head, begin, end);
    fetch_keys<S>(key_tile(0) + S::KV, values, a, sequence, kv_head, begin, end);
  }
  cp_async_commit();
  float sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int step = 0; step < steps; ++step) {
    const int from = begin + step * S::KEYS;
    if (step + 1 < steps) {
      fetch_keys<S>(key_tile(step + 1), keys, a, sequence, kv_head, from + S::KEYS, end);
      fetch_keys<S>(key_tile(step + 1) + S::KV, values, a, sequence, kv_head, from + S::KEYS, end);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // queries, and this step's keys and values, are there for all
    const bf16 *key = key_tile(step), *value = key + S::KV;
    float score[NS][4] = {};
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t left[4];
      ldmatrix_x4(left, query + (row + lane % 16) * STRIDE + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < NS; n += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, key + (own + n * 8 + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
        mma_m16n8k16_bf16(score[n], left, right, score[n]);
        mma_m16n8k16_bf16(score[n + 1], left, right + 2, score[n + 1]);
      }
    }
    // A lane holds two rows; four lanes share them.
    float most[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < NS; ++n)
      for (int i = 0; i < 4; ++i) {
        const int position = from + own + n * 8 + lane % 4 * 2 + i % 2;
        const int2 of = seen[row + lane / 4 + i / 2 * 8];
        const bool hidden = position >= smaller(of.y, end) || position < of.x;
        score[n][i] = hidden ? -INFINITY : capped(score[n][i] * a.scale, a.soft_cap);
        most[i / 2] = fmaxf(most[i / 2], score[n][i]);
      }
    float keep[2];
    for (int half = 0; half < 2; ++half) {
      for (int far = 1; far <= 2; far *= 2) most[half] = fmaxf(most[half], __shfl_xor_sync(FULL, most[half], far));
      keep[half] = most[half] == -INFINITY ? 1.0f : __expf(top[half] - most[half]);
      top[half] = most[half], total[half] *= keep[half];
    }
    for (int n = 0; n < NS; ++n)
      for (int i = 0; i < 4; ++i) {
        score[n][i] = score[n][i] == -INFINITY ? 0.0f : __expf(score[n][i] - top[i / 2]);
        total[i / 2] += score[n][i];
      }
    for (int n = 0; n < D / 8; ++n)
      for (int i = 0; i < 4; ++i) sum[n][i] *= keep[i / 2];
#pragma unroll
    for (int k = 0; k < NS; k += 2) {
      const uint32_t weights[4] = {pack_bf16(score[k][0], score[k][1]), pack_bf16(score[k][2], score[k][3]), pack_bf16(score[k + 1][0], score[k + 1][1]),
                                   pack_bf16(score[k + 1][2], score[k + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, value + (own + k * 8 + lane % 16) * STRIDE + n * 8 + lane / 16 * 8);
        mma_m16n8k16_bf16(sum[n], weights, right, sum[n]);
        mma_m16n8k16_bf16(sum[n + 1], weights, right + 2, sum[n + 1]);
      }
    }
    __syncthreads();  // before the next step's fetch overwrites what others may still read
  }
  cp_async_wait<0>();  // where there was no step: the copies of queries must have ended before the block does
  // [KW][ROWS][D + 2], where keys and values were
  float* found = reinterpret_cast<float*>(tiles_kv);
  for (int half = 0; half < 2; ++half) {
    for (int far = 1; far <= 2; far *= 2) total[half] += __shfl_xor_sync(FULL, total[half], far);
    float* to = found + (warp % S::KW * ROWS + row + lane / 4 + half * 8) * (D + 2);
    if (lane % 4 == 0) to[0] = top[half], to[1] = total[half];
    for (int n = 0; n < D / 8; ++n) store(to + 2 + n * 8 + lane % 4 * 2, make_float2(sum[n][half * 2], sum[n][half * 2 + 1]));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += S::THREADS) {
    const int r = i / D, j = i % D, head = kv_head * group + r % group;
    float most = -INFINITY, all = 0, weighted = 0;
    for (int k = 0; k < S::KW; ++k) most = fmaxf(most, found[(k * ROWS + r) * (D + 2)]);
    for (int k = 0; k < S::KW; ++k) {
      const float* one = found + (k * ROWS + r) * (D + 2);
      if (one[0] == -INFINITY) continue;
      const float keep = __expf(one[0] - most);
      all += one[1] * keep, weighted += one[2 + j] * keep;
    }
    const size_t at = size_t(tile.x + r / group) * a.heads + head;
    if (a.splits == 1) {
      out[at * D + j] = from_float<bf16>(weighted * with_sink(a, head, most, all));
    } else {
      float* to = a.parts + (at * a.splits + blockIdx.z) * (D + 2);
      if (j == 0) to[0] = most, to[1] = all;
      to[2 + j] = weighted;
    }
  }
}

template <class S>
int tiles_of(void* stream, const void* q, const void* keys, const void* values, const Attention& a, const int2* tiles, int count, void* out) {
  return launch(stream, dim3(a.kv_heads, count, a.splits), S::THREADS, S::BYTES, KERNEL(attend_tiles<S>), static_cast<const bf16*>(q),
                static_cast<const bf16*>(keys), static_cast<const bf16*>(values), a, tiles, static_cast<bf16*>(out));
}

// A tile holds at most 64 rows, or 16 where `few`; a row is one query head of one token. Parts are put together by wc_attend_merge.
extern "C" int wc_attend_tiles(void* stream, const void* q, const void* keys, const void* values, const Attention* a, const int2* tiles, int count, int few,
                               void* out) {
  if (a->head_dim == 64) return few ? tiles_of<Shape<64, 1, 4, 64>>(stream, q, keys, values, *a, tiles, count, out) : tiles_of<Shape<64, 4, 1, 64>>(stream, q, keys, values, *a, tiles, count, out);
  if (a->head_dim == 128) return few ? tiles_of<Shape<128, 1, 4, 64>>(stream, q, keys, values, *a, tiles, count, out) : tiles_of<Shape<128, 4, 1, 64>>(stream, q, keys, values, *a, tiles, count, out);
  if (a->head_dim == 256) return few ? tiles_of<Shape<256, 1, 2, 32>>(stream, q, keys, values, *a, tiles, count, out) : tiles_of<Shape<256, 4, 1, 16>>(stream, q, keys, values, *a, tiles, count, out);
  return NOT_SUPPORTED;
}
