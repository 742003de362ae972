// The types and intrinsics of cuda_bf16.h, cuda_fp16.h and vector_types.h that kernels use, for the CPU.
// Included by cuda.h.
#pragma once

#define VECTOR2(T, name, align) \
  struct alignas(align) name { T x, y; }; \
  inline name make_##name(T x, T y) { return {x, y}; }
#define VECTOR4(T, name) \
  struct alignas(16) name { T x, y, z, w; }; \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR2(float, float2, 8)
VECTOR2(int, int2, 8)
VECTOR2(unsigned, uint2, 8)
VECTOR4(float, float4)
VECTOR4(int, int4)
VECTOR4(unsigned, uint4)
#undef VECTOR2
#undef VECTOR4

// A compiler may turn a load through another type into anything: these copy the bits.
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }

// bf16 and half, rounded to nearest even; every NaN becomes 0x7FFF, as on the device.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
using half = __half;
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
using half2 = __half2;

inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
  const unsigned u = __float_as_uint(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  return {uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline __half __float2half(float f) {
  unsigned u = __float_as_uint(f);
  const unsigned sign = u >> 16 & 0x8000;
  u &= 0x7FFFFFFF;
  if (u > 0x7F800000) return {0x7FFF};
  if (u >= 0x477FF000) return {uint16_t(sign | 0x7C00)};  // 65520 and more: infinity
  if (u < 0x38800000)  // subnormal: one unit is 2^-24, as it is of a float just above 0.5
    return {uint16_t(sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3F000000))};
  return {uint16_t(sign | ((u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13))};
}
inline float __half2float(__half h) {
  const unsigned sign = unsigned(h.bits & 0x8000) << 16, u = unsigned(h.bits & 0x7FFF) << 13;
  if (u >= 0x0F800000) return __uint_as_float(sign | (u + 0x70000000));  // infinity and NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(u) * 0x1p112f));
}
#define PAIRS(T, T2, to_float, from_float, from_floats, from_float2, to_float2)                        \
  inline T2 from_floats(float a, float b) { return {from_float(a), from_float(b)}; }                   \
  inline T2 from_float2(float2 v) { return from_floats(v.x, v.y); }                                    \
  inline float2 to_float2(T2 v) { return {to_float(v.x), to_float(v.y)}; }                             \
  inline float __low2float(T2 v) { return to_float(v.x); }                                             \
  inline float __high2float(T2 v) { return to_float(v.y); }
PAIRS(__nv_bfloat16, __nv_bfloat162, __bfloat162float, __float2bfloat16, __floats2bfloat162_rn, __float22bfloat162_rn, __bfloat1622float2)
PAIRS(__half, __half2, __half2float, __float2half, __floats2half2_rn, __float22half2_rn, __half22float2)
#undef PAIRS
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __float2bfloat16(f); }

// Approximate on the device (about 2 ulp, and worse for __expf far from 0), nearly exact here.
// Macros, because glibc declares some of these names itself.
namespace emulate {
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float divide(float x, float y) { return std::fabs(y) > 0x1p126f && std::isfinite(y) ? 0.0f * x : x / y; }
}
#define rsqrtf(x) emulate::rsqrt(x)
#define __expf(x) std::exp(float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __fdividef(x, y) emulate::divide(x, y)
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
// Rounded on its own each, on the device too.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
