// What several kernels use: numbers of either type, sums over warps and blocks, activations.
#pragma once
#include "device.h"

using bf16 = __nv_bfloat16;
constexpr unsigned FULL = 0xFFFFFFFF;
constexpr int WARP = 32;

// The types of activations and of the KV cache, and the forms of weights; the same numbers in Rust.
enum Dtype { F32 = 0, BF16 = 1 };
enum Form { FORM_F32 = 0, FORM_BF16 = 1, FORM_INT8 = 2, FORM_INT4 = 3 };
// A launch that has no kernel for what it was asked: the host checks first, so this is a fault of the program.
constexpr int NOT_SUPPORTED = -1;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

__device__ __forceinline__ void unpack_bf16(unsigned pair, float* out) {
  out[0] = __uint_as_float(pair << 16), out[1] = __uint_as_float(pair & 0xFFFF0000);
}
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
__device__ __forceinline__ float half_of(unsigned bits) {
  const uint16_t low = uint16_t(bits);
  __half value;
  memcpy(&value, &low, 2);
  return __half2float(value);
}

// Eight numbers from 16 or 32 aligned bytes.
__device__ __forceinline__ void load8(const float* p, float out[8]) {
  const float4 a = load<float4>(p), b = load<float4>(p + 4);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
__device__ __forceinline__ void load8(const bf16* p, float out[8]) {
  const uint4 v = load<uint4>(p);
  unpack_bf16(v.x, out), unpack_bf16(v.y, out + 2), unpack_bf16(v.z, out + 4), unpack_bf16(v.w, out + 6);
}
__device__ __forceinline__ void store8(float* p, const float in[8]) {
  store(p, make_float4(in[0], in[1], in[2], in[3]));
  store(p + 4, make_float4(in[4], in[5], in[6], in[7]));
}
__device__ __forceinline__ void store8(bf16* p, const float in[8]) {
  store(p, make_uint4(pack_bf16(in[0], in[1]), pack_bf16(in[2], in[3]), pack_bf16(in[4], in[5]), pack_bf16(in[6], in[7])));
}
// Eight numbers of which the first `count` are there; the others are 0 and neither read nor written.
template <class T> __device__ __forceinline__ void load_some(const T* p, int count, float out[8]) {
  for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(p[i]) : 0.0f;
}
template <class T> __device__ __forceinline__ void store_some(T* p, int count, const float in[8]) {
  for (int i = 0; i < 8; ++i)
    if (i < count) p[i] = from_float<T>(in[i]);
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(FULL, v, step);
  return v;
}

// The sum over a block of whole warps, in every thread. `partial` has a place for each warp, and is free again after the next barrier.
__device__ __forceinline__ float block_sum(float v, float* partial) {
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = v;
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  return warp_sum(lane < int(blockDim.x) / WARP ? partial[lane] : 0.0f);
}

// crate::Activation, in its order.
enum Activation { SILU = 0, GELU_TANH = 1, RELU2 = 2, CLAMPED_SWIGLU = 3, GELU = 4, TANH = 5 };
constexpr float SWIGLU_LIMIT = 7.0f, SWIGLU_ALPHA = 1.702f;
__device__ __forceinline__ float activate(int activation, float x) {
  if (activation == SILU) return x / (1.0f + __expf(-x));
  if (activation == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
  if (activation == GELU) return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
  if (activation == TANH) return tanhf(x);
  if (activation == CLAMPED_SWIGLU) {
    x = x > SWIGLU_LIMIT ? SWIGLU_LIMIT : x;  // not fminf, which would make a number of NaN
    return x / (1.0f + __expf(-SWIGLU_ALPHA * x));
  }
  return x > 0.0f ? x * x : 0.0f;
}
// What an activated gate multiplies.
__device__ __forceinline__ float gated(int activation, float x) {
  if (activation != CLAMPED_SWIGLU) return x;
  return (x > SWIGLU_LIMIT ? SWIGLU_LIMIT : x < -SWIGLU_LIMIT ? -SWIGLU_LIMIT : x) + 1.0f;
}

__device__ __forceinline__ float capped(float x, float cap) { return cap > 0.0f ? cap * tanhf(x / cap) : x; }

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int greater(int a, int b) { return a > b ? a : b; }

inline int blocks_of(int n, int size) { return (n + size - 1) / size; }
