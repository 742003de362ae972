// CUDA on a CPU, for tests: what device.h stands for where the compiler is not nvcc. A launch runs on the calling thread, block after
// block; the threads of a block are fibers that run until they meet a barrier or a warp collective. All state is thread_local, so several
// OS threads may launch at the same time.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

// __shared__ alone works, but is neither poisoned nor guarded: use SHARED. No __noinline__ here:
// the C++ library itself uses that name inside attributes.
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define KERNEL(...) emulate::name_kernel(#__VA_ARGS__, __VA_ARGS__)
#define SHARED(type, name, ...)           \
  using name##_type = type __VA_ARGS__;   \
  static const char name##_key = 0;       \
  name##_type& name = *static_cast<name##_type*>(emulate::static_shared(&name##_key, #name, sizeof(name##_type)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulate::block.dynamic_shared)
#define REQUIRE(condition, text) ((condition) ? void() : emulate::fail("%s", text))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#include "block.h"

// ---- launch: 0, or 1 and a text
inline const char* launch_error() { return emulate::error.c_str(); }
template <class F> struct NamedKernel { const char* name; F* function; };
namespace emulate {
template <class F> NamedKernel<F> name_kernel(const char* name, F& kernel) { return {name, &kernel}; }
}
template <class... P, class... A>
int launch(void*, dim3 grid, dim3 block, size_t shared_bytes, NamedKernel<void(P...)> kernel, A... args) {
  auto call = [&] { kernel.function(static_cast<P>(args)...); };
  auto enter = [](void* closure) { (*static_cast<decltype(call)*>(closure))(); };
  return emulate::run(kernel.name, grid, block, shared_bytes, enter, &call);
}

// ---- barriers and warp collectives. The line of the call tells one barrier from another.
#define LINE int line = __builtin_LINE()
inline void __syncthreads(LINE) { emulate::wait(emulate::AT_BARRIER, "__syncthreads", 0, line); }
inline void __syncwarp(unsigned mask = ~0u, LINE) { emulate::exchange("__syncwarp", mask, "", 0, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
unsigned __activemask() = delete;  // what it returns is never something to rely on: pass the mask

namespace emulate {
template <class T> T read_lane(const Packet* from, int lane, unsigned mask) {
  static_assert(sizeof(T) <= sizeof(Packet), "");
  if (!(mask >> lane & 1)) fail("shuffle reads lane %d, which mask %08x lacks", lane, mask);
  T value;
  memcpy(&value, from + lane, sizeof value);
  return value;
}
inline int lane_id() { return int(block.current % 32); }
}
#define SHUFFLE(name, argument, source)                                                          \
  template <class T> T name(unsigned mask, T value, int argument, int width = 32, LINE) {        \
    const auto* from = emulate::exchange(#name, mask, &value, sizeof value, line);             \
    const int lane = emulate::lane_id(), first = lane & -width, last = first + width - 1;      \
    (void)first, (void)last;                                                                     \
    return emulate::read_lane<T>(from, source, mask);                                          \
  }
SHUFFLE(__shfl_sync, lane_wanted, first + (lane_wanted & (width - 1)))
SHUFFLE(__shfl_up_sync, delta, lane - delta < first ? lane : lane - delta)
SHUFFLE(__shfl_down_sync, delta, lane + delta > last ? lane : lane + delta)
SHUFFLE(__shfl_xor_sync, bits, (lane ^ bits) > last ? lane : lane ^ bits)
#undef SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, LINE) {
  const auto* from = emulate::exchange("__ballot_sync", mask, &predicate, sizeof predicate, line);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= unsigned((mask >> i & 1) && int(from[i].word[0])) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, LINE) { return __ballot_sync(mask, predicate, line) == mask; }

#define REDUCE(name, expression)                                                                 \
  template <class T> T name(unsigned mask, T value, LINE) {                                      \
    static_assert(sizeof(T) == 4 && T(1) / T(2) == T(0), "int or unsigned");                     \
    const auto* from = emulate::exchange(#name, mask, &value, sizeof value, line);             \
    bool some = false;                                                                           \
    T a = 0;                                                                                     \
    for (int i = 0; i < 32; ++i) {                                                               \
      if (!(mask >> i & 1)) continue;                                                            \
      const T b = emulate::read_lane<T>(from, i, mask);                                        \
      a = some ? T(expression) : b, some = true;                                                 \
    }                                                                                            \
    return a;                                                                                    \
  }
REDUCE(__reduce_add_sync, unsigned(a) + unsigned(b))
REDUCE(__reduce_min_sync, a < b ? a : b)
REDUCE(__reduce_max_sync, a > b ? a : b)
REDUCE(__reduce_or_sync, a | b)
#undef REDUCE

// ---- atomics: one launch is one OS thread, so plain code does
template <class T> T atomicExch(T* p, T v) { const T old = *p; *p = v; return old; }
template <class T> T atomicAdd(T* p, T v) { return atomicExch(p, T(*p + v)); }
template <class T> T atomicMax(T* p, T v) { return atomicExch(p, *p > v ? *p : v); }
template <class T> T atomicMin(T* p, T v) { return atomicExch(p, *p < v ? *p : v); }
template <class T> T atomicOr(T* p, T v) { return atomicExch(p, T(*p | v)); }
template <class T> T atomicCAS(T* p, T expected, T v) { return atomicExch(p, *p == expected ? v : *p); }
template <class T> T __ldg(const T* p) { return *p; }

#include "types.h"
