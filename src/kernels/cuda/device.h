// Included by every kernel. Two compilers take these files: nvcc for GPUs, and the host's C++ compiler for tests without one (emulate/).
//
// So that both read them alike:
// - `SHARED(float, name, [32])`, `SHARED(int, one, )` and `DYNAMIC_SHARED(float, name)`: poisoned and guarded when emulated
// - `launch(stream, grid, block, bytes, KERNEL(name<4>), arguments…)`; blocks of whole warps, of which all threads reach every barrier
// - `load<uint4>(p)` and `store(p, v)` for vectors, `__float_as_uint` for bits: the host's compiler takes strict aliasing at its word
// - a warp collective names its lanes and is not behind `?:` or `&&`; PTX stands in functions with a second body in C++ (tensor.h)
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KERNEL(...) __VA_ARGS__
#define SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name)                                     \
  extern __shared__ __align__(16) unsigned char cuda_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(cuda_dynamic_shared)
#define REQUIRE(condition, text)

// 0, or CUDA's error. Shared memory beyond 48 KB has to be asked for.
template <class... P, class... A>
int launch(void* stream, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), A... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}
#else
#include "emulate/cuda.h"
#endif

// Vector access to an array of another type.
template <class V> __device__ __forceinline__ V load(const void* p) {
  REQUIRE(reinterpret_cast<uintptr_t>(p) % alignof(V) == 0, "misaligned vector load");
  return *static_cast<const V*>(p);
}
template <class V> __device__ __forceinline__ void store(void* p, V v) {
  REQUIRE(reinterpret_cast<uintptr_t>(p) % alignof(V) == 0, "misaligned vector store");
  *static_cast<V*>(p) = v;
}

#include "tensor.h"
