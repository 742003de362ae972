// From logits to tokens, a block for a row: what changes logits, the greatest of them, and the draw. The same token as src/models/sample.rs
// draws: the same order of operations, ties and random numbers (-0 counts as 0). Nothing is sorted: thresholds are found by the digits of the logits, and
// sums run over whole numbers, so that they do not depend on the order of threads. The two can differ only where the random number falls
// within about 1e-6 of the border between two tokens, since the CPU adds in floating point.
#include "common.h"

constexpr int THREADS = 1024, BINS = 256, NONE = -1;
using u64 = unsigned long long;

// Row `row` of logits [rows][vocab] in f32.
struct Logits {
  float* values;
  int vocab;
};

// A number to be changed, in the order in which kinds are applied; of a row, `begin` of each kind, and the end of the last.
enum Kind { SUPPRESS = 0, BIAS = 1, REPETITION = 2, PENALTY = 3, KINDS = 4 };
struct Change {
  int id;
  float value;
};
struct Changes {
  const Change* all;
  const int* begin;           // [rows][KINDS + 1]
  const unsigned* allowed;    // [rows][(vocab + 31) / 32] bits, or null
  const int* has_allowed;     // [rows]: the row has such bits
  const int* unassigned;      // ids without a token
  int unassigned_count;
};

// Ids of one kind in a row are distinct. `failed[row]` becomes 1 where a logit is NaN.
__global__ void __launch_bounds__(THREADS) adjust(Logits logits, Changes changes, int* failed) {
  const int row = blockIdx.x;
  float* z = logits.values + size_t(row) * logits.vocab;
  SHARED(int, is_nan, );
  if (threadIdx.x == 0) is_nan = 0;
  __syncthreads();
  const unsigned* bits = changes.has_allowed && changes.has_allowed[row] ? changes.allowed + size_t(row) * ((logits.vocab + 31) / 32) : nullptr;
  for (int i = threadIdx.x; i < logits.vocab; i += blockDim.x) {
    if (z[i] != z[i]) is_nan = 1;
    if (bits && !(bits[i / 32] >> i % 32 & 1)) z[i] = -INFINITY;
  }
  __syncthreads();
  if (threadIdx.x == 0) failed[row] = is_nan;
  for (int i = threadIdx.x; i < changes.unassigned_count; i += blockDim.x) z[changes.unassigned[i]] = -INFINITY;
  for (int kind = 0; kind < KINDS; ++kind) {
    __syncthreads();  // an id may be changed by several kinds
    const int* begin = changes.begin + size_t(row) * (KINDS + 1) + kind;
    for (int i = begin[0] + int(threadIdx.x); i < begin[1]; i += blockDim.x) {
      const Change change = changes.all[i];
      if (change.id >= logits.vocab) continue;
      float& logit = z[change.id];
      if (kind == SUPPRESS) logit = -INFINITY;
      if (kind == BIAS) logit += change.value;
      if (kind == REPETITION) logit = logit > 0 ? logit / change.value : logit * change.value;
      if (kind == PENALTY) logit -= change.value;
    }
  }
}

// ---- the greatest logit and the lowest id that has it, in every thread
// Unsigned numbers that order as floats do.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }
__device__ __forceinline__ u64 most(u64 a, u64 b) { return a > b ? a : b; }

// ordered(value) << 32 | ~id. `partial` has a place for each warp, and is free again after the next barrier.
__device__ __forceinline__ u64 greatest(const float* z, int vocab, u64* partial) {
  u64 best = 0;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) best = most(best, u64(ordered(z[i])) << 32 | ~unsigned(i));
  for (int far = WARP / 2; far > 0; far /= 2) best = most(best, __shfl_xor_sync(FULL, best, far));
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = best;
  __syncthreads();
  best = 0;
  for (int w = 0; w < int(blockDim.x) / WARP; ++w) best = most(best, partial[w]);
  return best;
}

// Of a row that holds something not finite: NONE. `stride` numbers from row to row, of which `width` count.
__global__ void __launch_bounds__(THREADS) argmax(const float* logits, int stride, int width, const int* masked, int masked_count, int* out) {
  SHARED(u64, partial, [WARP]);
  SHARED(int, is_odd, );
  const float* z = logits + size_t(blockIdx.x) * stride;
  if (threadIdx.x == 0) is_odd = 0;
  __syncthreads();
  u64 best = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    if (!(fabsf(z[i]) < INFINITY)) is_odd = 1;
    bool counts = true;
    for (int m = 0; m < masked_count; ++m) counts = counts && masked[m] != i;
    if (counts) best = most(best, u64(ordered(z[i])) << 32 | ~unsigned(i));
  }
  for (int far = WARP / 2; far > 0; far /= 2) best = most(best, __shfl_xor_sync(FULL, best, far));
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < int(blockDim.x) / WARP; ++w) best = most(best, partial[w]);
    out[blockIdx.x] = is_odd || best == 0 ? NONE : int(~unsigned(best));
  }
}

// ---- the draw
struct Sampling {
  u64 seed, index;
  float inverse_temperature;  // 0: greedy
  float min_p;                // 0: off
  float top_p;                // 1: off
  int top_k;                  // 0: off
};

// kernels/cpu/elementwise.rs `exp`, operation by operation: nothing is contracted.
__device__ __forceinline__ float exp_as_cpu(float x) {
  const float round = 12582912.0f;
  x = fminf(fmaxf(x, -87.33654f), 88.37626f);
  const float rounded = __fadd_rn(__fmul_rn(x, 1.44269504f), round), n = __fsub_rn(rounded, round);
  const float r = __fadd_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, 2.1219444e-4f));
  float p = 1.9875691e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  const float value = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  return __fmul_rn(value, __uint_as_float((__float_as_uint(rounded) << 23) + 0x3F800000u));
}
// kernels/cpu/softmax.rs `weight`
__device__ __forceinline__ float weight_of(float x) { return x > -87.0f ? exp_as_cpu(x) : 0.0f; }
// A weight, at most 1, in units of 2^-40: 2^24 of them add up without a carry.
__device__ __forceinline__ u64 whole(float weight) { return u64(weight * 1099511627776.0f); }

// src/models/sample.rs `uniform`
__device__ __forceinline__ u64 mix(u64 z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}
__device__ __forceinline__ double uniform(u64 seed, u64 index) {
  return double(mix(mix(seed + 0x9E3779B97F4A7C15ull) ^ index * 0x9E3779B97F4A7C15ull) >> 11) / 9007199254740992.0;
}

__device__ __forceinline__ u64 block_total(u64 v, u64* partial) {
  for (int far = WARP / 2; far > 0; far /= 2) v += __shfl_xor_sync(FULL, v, far);
  __syncthreads();  // what was there has been read
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < int(blockDim.x) / WARP; ++w) v += partial[w];
  return v;
}

// The first id at which the running sum of `value` passes `target`, which is below the sum of all.
template <class F> __device__ int search(int vocab, u64 target, u64* partial, F value) {
  int low = 0, high = vocab;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  while (high - low > WARP) {
    const int part = (high - low + warps - 1) / warps;
    u64 sum = 0;
    for (int i = low + warp * part + lane; i < low + (warp + 1) * part && i < high; i += WARP) sum += value(i);
    for (int far = WARP / 2; far > 0; far /= 2) sum += __shfl_xor_sync(FULL, sum, far);
    __syncthreads();  // what was there has been read
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    int found = 0;
    while (found < warps - 1 && partial[found] <= target) target -= partial[found++];
    low += found * part;
    high = low + part < high ? low + part : high;
  }
  for (; low < high - 1; ++low) {
    const u64 here = value(low);
    if (here > target) break;
    target -= here;
  }
  return low;
}

// The greatest key of which, together with all greater ones, `amount` reaches `target`; and what the greater ones amount to. A key's digits
// are found from the highest on; `bins` holds what each digit amounts to. `extra` amounts to `extra_amount` more, beside what is in the row.
template <class F>
__device__ unsigned threshold(const float* z, int vocab, u64 target, unsigned extra, u64 extra_amount, u64* bins, unsigned* digit_found, u64* above_found, u64& above, F amount) {
  unsigned prefix = 0;
  above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();  // what was there has been read
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    const unsigned known = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
      const unsigned key = ordered(z[i]);
      if ((key & known) != prefix) continue;
      const u64 here = amount(z[i], key);
      if (here) atomicAdd(&bins[key >> shift & 0xFF], here);
    }
    if (threadIdx.x == 0 && extra_amount && (extra & known) == prefix) atomicAdd(&bins[extra >> shift & 0xFF], extra_amount);
    __syncthreads();
    if (threadIdx.x == 0) {
      // The last digit that amounts to anything takes what never reaches the target.
      unsigned digit = 0;
      u64 greater = above;
      for (int d = BINS - 1; d >= 0; --d) {
        if (!bins[d]) continue;
        digit = d;
        above = greater;
        if (greater + bins[d] >= target) break;
        greater += bins[d];
      }
      *digit_found = digit, *above_found = above;
    }
    __syncthreads();
    prefix |= *digit_found << shift;
    above = *above_found;
  }
  return prefix;
}

__global__ void __launch_bounds__(THREADS, 1) sample(Logits logits, const Sampling* samplings, const int* failed, int* out) {
  SHARED(u64, bins, [BINS]);
  SHARED(u64, partial, [WARP]);
  SHARED(unsigned, digit, );
  SHARED(u64, passed, );
  const float* z = logits.values + size_t(blockIdx.x) * logits.vocab;
  const int vocab = logits.vocab;
  const Sampling s = samplings[blockIdx.x];
  const u64 best = greatest(z, vocab, partial);
  const float max = unordered(unsigned(best >> 32));
  if (failed[blockIdx.x] || !(fabsf(max) < INFINITY) || s.inverse_temperature == 0.0f) {  // the whole block at once
    const bool greedy = !failed[blockIdx.x] && fabsf(max) < INFINITY;
    if (threadIdx.x == 0) out[blockIdx.x] = greedy ? int(~unsigned(best)) : NONE;
    return;
  }
  const bool limited = s.top_k > 0 && s.top_k < vocab, filters = limited || s.min_p > 0.0f || s.top_p < 1.0f;
  const float least = s.min_p > 0.0f ? s.min_p : 1.17549435e-38f;
  auto weight = [&](float logit) { return weight_of(__fmul_rn(__fsub_rn(logit, max), s.inverse_temperature)); };
  auto allowed = [&](float logit) {
    const float w = weight(logit);
    return !filters || w >= least || logit == max;
  };
  // Kept are keys above `border`, and of those equal to it the first `ties`.
  unsigned border = 0;
  u64 ties = 0;
  if (limited) {
    u64 above;
    border = threshold(z, vocab, u64(s.top_k), 0, 0, bins, &digit, &passed, above, [](float, unsigned) { return u64(1); });
    ties = u64(s.top_k) - above;
  }
  auto mass = [&](float logit, unsigned key) { return key > border && allowed(logit) ? whole(weight(logit)) : u64(0); };
  if (s.top_p < 1.0f) {
    const float edge = unordered(border);
    const u64 at_border = ties && allowed(edge) ? ties * whole(weight(edge)) : 0;
    u64 sum = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += mass(z[i], ordered(z[i]));
    const u64 total = block_total(sum, partial) + at_border;
    const double target = double(s.top_p) * double(total);
    u64 above;
    const u64 wanted = u64(target) + (double(u64(target)) < target);
    const unsigned cut = threshold(z, vocab, wanted, border, at_border, bins, &digit, &passed, above, mass);
    const u64 each = whole(weight(unordered(cut)));
    u64 needed = each && wanted > above ? (wanted - above + each - 1) / each : 1;
    if (cut == border && limited && needed > ties) needed = ties;
    border = cut, ties = needed;
  }
  const bool bordered = limited || s.top_p < 1.0f;
  // The last id that is kept of those at the border.
  int last = vocab;
  if (bordered) {
    u64 mine = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) mine += ordered(z[i]) == border;
    const u64 all = block_total(mine, partial);
    if (ties < all) last = search(vocab, ties - 1, partial, [&](int i) { return u64(ordered(z[i]) == border); });
  }
  auto chance = [&](int i) {
    const unsigned key = ordered(z[i]);
    const bool kept = !bordered || key > border || (key == border && i <= last);
    return kept && allowed(z[i]) ? whole(weight(z[i])) : u64(0);
  };
  u64 sum = 0;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += chance(i);
  const u64 total = block_total(sum, partial);
  u64 target = u64(uniform(s.seed, s.index) * double(total));
  if (target >= total) target = total - 1;
  const int token = search(vocab, target, partial, chance);
  if (threadIdx.x == 0) out[blockIdx.x] = token;
}

static int threads_for(int vocab) { return vocab >= 8 * THREADS ? THREADS : 256; }

extern "C" int wc_adjust(void* stream, Logits logits, const Changes* changes, int* failed, int rows) {
  return launch(stream, rows, threads_for(logits.vocab), 0, KERNEL(adjust), logits, *changes, failed);
}
extern "C" int wc_argmax(void* stream, const float* logits, int stride, int width, const int* masked, int masked_count, int* out, int rows) {
  return launch(stream, rows, threads_for(width), 0, KERNEL(argmax), logits, stride, width, masked, masked_count, out);
}
extern "C" int wc_sample(void* stream, Logits logits, const Sampling* samplings, const int* failed, int* out, int rows) {
  return launch(stream, rows, threads_for(logits.vocab), 0, KERNEL(sample), logits, samplings, failed, out);
}
