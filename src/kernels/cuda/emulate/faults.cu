// Kernels with one fault each, all of which the emulator must report; and what collectives and conversions must give.
#include "../common.h"

#include <cstdio>

__global__ void ends_early(int*, int n) { if (int(threadIdx.x) >= n) return; __syncthreads(); }
__global__ void other_barrier(int* p, int) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else { p[0] = 1;
    __syncthreads(); }
}
__global__ void partial_shuffle(int* p, int) { if (threadIdx.x < 20) p[threadIdx.x] = __shfl_xor_sync(FULL, 1, 16); }
__global__ void outside_mask(int* p, int) { if (threadIdx.x < 16) p[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1, 16); }
__global__ void reads_past(int* p, int n) { p[0] = p[n + threadIdx.x * 4]; }
__global__ void writes_past_by_one(int* p, int) { if (threadIdx.x == 0) reinterpret_cast<unsigned char*>(p)[37 * 4 + 1] = 1; }
__global__ void writes_before(int* p, int) { p[-1 - int(threadIdx.x)] = 1; }
__global__ void misaligned(int* p, int) { p[0] = load<int4>(p + 2).x; }
__global__ void shared_past(int* p, int n) { SHARED(int, s, [32]); s[int(threadIdx.x) + n] = 1; p[0] = s[0]; }
__global__ void dynamic_past(int* p, int) { DYNAMIC_SHARED(int, s); s[threadIdx.x] = 1; p[0] = s[0]; }
__global__ void global_ldmatrix(int* p, int) { uint32_t r[4]; ldmatrix_x4(r, p + 1); p[0] = r[0]; }
__global__ void runs_away(int* p, int depth) { volatile char big[65536]; big[depth] = 1; if (depth) runs_away(p, depth - 1); p[0] = big[depth]; }

// Launches kernel `which` on 37 numbers, on 32 threads or 64; 0 where nothing was reported.
extern "C" int emulated_fault(int which, int* p) {
  switch (which) {
    case 0: return launch(nullptr, 3, 64, 0, KERNEL(ends_early), p, 40);
    case 1: return launch(nullptr, 1, 64, 0, KERNEL(other_barrier), p, 0);
    case 2: return launch(nullptr, 1, 32, 0, KERNEL(partial_shuffle), p, 0);
    case 3: return launch(nullptr, 1, 32, 0, KERNEL(outside_mask), p, 0);
    case 4: return launch(nullptr, 1, 32, 0, KERNEL(reads_past), p, 37);
    case 5: return launch(nullptr, 1, 32, 0, KERNEL(writes_past_by_one), p, 0);
    case 6: return launch(nullptr, 1, 4, 0, KERNEL(writes_before), p, 0);
    case 7: return launch(nullptr, 1, 32, 0, KERNEL(misaligned), p, 0);
    case 8: return launch(nullptr, 1, 32, 0, KERNEL(shared_past), p, 1);
    case 9: return launch(nullptr, 1, 32, 0, KERNEL(shared_past), p, -1);
    case 10: return launch(nullptr, 1, 32, 64, KERNEL(dynamic_past), p, 0);
    case 11: return launch(nullptr, 1, 32, 0, KERNEL(global_ldmatrix), p, 0);
    default: return launch(nullptr, 1, 32, 0, KERNEL(runs_away), p, 9);
  }
}

__global__ void unwritten(float* p) { SHARED(float, s, [32]); if (threadIdx.x != 9) s[threadIdx.x] = 1; __syncthreads(); p[0] = warp_sum(s[threadIdx.x]); }
__global__ void not_waited_for(float* p) { SHARED(float, s, [32][4]); cp_async_16(s[threadIdx.x], p + threadIdx.x * 4); cp_async_commit(); __syncthreads(); p[0] = s[0][0]; }
// p[0] of 128 numbers becomes NaN.
extern "C" int emulated_unwritten(int which, float* p) {
  return which ? launch(nullptr, 1, 32, 0, KERNEL(not_waited_for), p) : launch(nullptr, 1, 32, 0, KERNEL(unwritten), p);
}

__global__ void collectives(int* bad, int) {
  const int lane = threadIdx.x % 32;
  bool ok = __shfl_sync(~0u, lane, 5) == 5 && __shfl_sync(~0u, lane, 5, 8) == (lane & 24) + 5;
  ok = ok && __shfl_up_sync(~0u, lane, 3) == (lane < 3 ? lane : lane - 3) && __shfl_down_sync(~0u, lane, 2, 16) == (lane % 16 > 13 ? lane : lane + 2);
  ok = ok && __ballot_sync(~0u, lane % 2) == 0xAAAAAAAA && __any_sync(~0u, lane == 7) && !__all_sync(~0u, lane == 7);
  ok = ok && __reduce_add_sync(~0u, lane) == 496 && __reduce_max_sync(~0u, lane - 40) == -9 && __reduce_min_sync(~0u, unsigned(lane)) == 0;
  if (lane < 16) ok = ok && __reduce_add_sync(0xFFFFu, 1) == 16;
  ok = ok && __shfl_xor_sync(~0u, double(lane), 1) == (lane ^ 1);
  SHARED(uint16_t, m, [32][8]);
  SHARED(uint16_t, t, [32][8]);
  for (int i = 0; i < 8; ++i) m[lane][i] = t[lane / 8 * 8 + i][lane % 8] = uint16_t(lane * 8 + i);
  __syncwarp();
  uint32_t a[4], b[4];  // the transposed matrix read with .trans is the matrix
  ldmatrix_x4(a, m[lane]), ldmatrix_x4_trans(b, t[lane]);
  for (int i = 0; i < 4; ++i) ok = ok && a[i] == b[i] && (a[i] & 0xFFFF) == unsigned(i * 64 + lane * 2);
  if (!ok) atomicAdd(bad, 1);
}
extern "C" int emulated_collectives(int* bad) { return launch(nullptr, 2, 64, 0, KERNEL(collectives), bad, 0); }

// The bits of a number as bf16 and half, and back.
extern "C" unsigned emulated_bf16(float x) { return __float2bfloat16(x).bits; }
extern "C" unsigned emulated_half(float x) { return __float2half(x).bits; }
extern "C" float emulated_from_half(unsigned bits) { return __half2float(__half{uint16_t(bits)}); }
