// Tensor-core and asynchronous-copy instructions (sm_80 and newer), as PTX and as plain C++.
// Layouts: PTX manual, "Matrix Fragments for mma.m16n8k16" and "ldmatrix". Included by device.h.
#pragma once

#ifdef __CUDACC__
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// d (16x8) = a (16x16, row major) * b (16x8, column major) + c
__device__ __forceinline__ void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes to shared memory; zeros, and no read, where `valid` is false.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most N groups of this thread are under way. Others see the bytes after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

#else
namespace emulate {
inline float bf16_at(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }
inline const Packet* exchange_rows(const char* op, const void* row, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s: misaligned row", op);
  if (!is_shared(row)) fail("%s: the row is not in shared memory", op);
  return exchange(op, ~0u, &row, sizeof row, line);
}
inline const uint16_t* row_of(const Packet* from, int lane) {
  const uint16_t* row;
  memcpy(&row, from + lane, sizeof row);
  return row;
}
}

inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4], LINE) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* from = emulate::exchange("mma_m16n8k16_bf16", ~0u, mine, sizeof mine, line);
  const int lane = emulate::lane_id();
  float row[2][16], column[2][16];  // rows lane/4 and lane/4 + 8 of a, columns lane%4*2 and the next of b
  for (int t = 0; t < 4; ++t) {     // the lane that holds elements t*2, t*2+1 and t*2+8, t*2+9
    uint32_t r[6], left[6], right[6];
    memcpy(r, from + lane / 4 * 4 + t, sizeof r);
    memcpy(left, from + lane % 4 * 8 + t, sizeof left);
    memcpy(right, from + lane % 4 * 8 + 4 + t, sizeof right);
    for (int i = 0; i < 2; ++i)
      for (int upper = 0; upper < 2; ++upper) {
        const int k = t * 2 + i + upper * 8;
        row[0][k] = emulate::bf16_at(r[upper * 2], i), row[1][k] = emulate::bf16_at(r[upper * 2 + 1], i);
        column[0][k] = emulate::bf16_at(left[4 + upper], i), column[1][k] = emulate::bf16_at(right[4 + upper], i);
      }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
    d[i] = c[i] + sum;
  }
}
inline void ldmatrix_x4(uint32_t r[4], const void* row, LINE) {
  const auto* from = emulate::exchange_rows("ldmatrix_x4", row, line);
  const int lane = emulate::lane_id();
  for (int i = 0; i < 4; ++i) memcpy(&r[i], emulate::row_of(from, i * 8 + lane / 4) + lane % 4 * 2, 4);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void* row, LINE) {
  const auto* from = emulate::exchange_rows("ldmatrix_x4_trans", row, line);
  const int lane = emulate::lane_id();
  for (int i = 0; i < 4; ++i) {
    const int first = i * 8 + lane % 4 * 2;
    r[i] = emulate::row_of(from, first)[lane / 4] | uint32_t(emulate::row_of(from, first + 1)[lane / 4]) << 16;
  }
}
// The bytes arrive as late as they may, at the wait; until then the place holds NaN.
inline void cp_async_16(void* to, const void* from, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) emulate::fail("cp_async_16: misaligned");
  if (!emulate::is_shared(to)) emulate::fail("cp_async_16: the target is not in shared memory");
  memset(to, 0xFF, 16);
  auto& me = emulate::block.fibers[emulate::block.current];
  me.copies.push_back({to, valid ? from : nullptr, me.group});
}
inline void cp_async_commit() { ++emulate::block.fibers[emulate::block.current].group; }
template <int N> void cp_async_wait() {
  auto& me = emulate::block.fibers[emulate::block.current];
  size_t done = 0;
  for (; done < me.copies.size() && me.copies[done].group < me.group - N; ++done) {
    const auto& copy = me.copies[done];
    if (copy.from) memcpy(copy.to, copy.from, 16); else memset(copy.to, 0, 16);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + std::ptrdiff_t(done));
}
#endif
