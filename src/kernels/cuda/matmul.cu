// Products of many rows on tensor cores: y = epilogue(x · Wᵀ + b), x in bf16, sums in f32. Tiles of x and W come through shared memory,
// STAGES of them in flight; weights of 8 and 4 bits become bf16 on the way there. mma.sync reaches about two thirds of a Hopper's
// rate: products of plain bf16 matrices at prefill sizes are better left to cuBLASLt there.
#include "product.h"

constexpr int DEPTH = 32, STRIDE = DEPTH + 8, STAGES = 3;  // 8 more in a row, so that ldmatrix meets no bank twice

// How large a block's tile is, and a warp's.
template <int M_, int N_, int WARP_M_, int WARP_N_> struct Tile {
  static constexpr int M = M_, N = N_, WARP_M = WARP_M_, WARP_N = WARP_N_;
  static constexpr int WARPS_N = N / WARP_N, THREADS = M / WARP_M * WARPS_N * WARP;
  static constexpr int BYTES = STAGES * (M + N) * STRIDE * int(sizeof(bf16));
};
using Large = Tile<128, 128, 64, 32>;
using Small = Tile<64, 64, 32, 32>;

// Rows `from` … of x, columns k … of its width, to a stage. What is not there becomes 0.
template <class Size> __device__ __forceinline__ void fetch_x(bf16* to, const bf16* x, const Rows& rows, const int* row_of, int k, int width) {
  for (int i = threadIdx.x; i < Size::M * (DEPTH / 8); i += Size::THREADS) {
    const int r = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
    const bool valid = row_of[r] >= 0 && k + column < width;
    cp_async_16(to + r * STRIDE + column, valid ? input_at(rows, x, row_of[r]) + k + column : x, valid);
  }
}

template <class Size> __device__ __forceinline__ void fetch_bf16(bf16* to, const Matrix& w, int row, int k) {
  const bf16* from = static_cast<const bf16*>(w.values);
  for (int i = threadIdx.x; i < Size::N * (DEPTH / 8); i += Size::THREADS) {
    const int r = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
    const bool valid = row + r < w.n && k + column < w.k;
    cp_async_16(to + r * STRIDE + column, valid ? from + size_t(row + r) * w.k + k + column : from, valid);
  }
}

// Weights of 8 or 4 bits: the thread's 16 bytes wait in registers while the block computes, and are unpacked afterwards.
template <class Size, int FORM> struct Packed {
  static constexpr int SIZE = FORM == FORM_INT8 ? 16 : 32, PIECES = DEPTH / SIZE, MINE = (Size::N * PIECES + Size::THREADS - 1) / Size::THREADS;
  uint4 bits[MINE];
  float2 scale[MINE];

  __device__ __forceinline__ void fetch(const Matrix& w, int row, int k) {
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      const int i = threadIdx.x + j * Size::THREADS, r = row + i / PIECES, at = k + i % PIECES * SIZE;
      bits[j] = make_uint4(0, 0, 0, 0), scale[j] = make_float2(0, 0);
      if (i >= Size::N * PIECES || r >= w.n || at >= w.k) continue;
      bits[j] = load<uint4>(static_cast<const char*>(w.values) + (size_t(r) * w.k + at) / (FORM == FORM_INT8 ? 1 : 2));
      scale[j] = FORM == FORM_INT8 ? make_float2(scale8(w, r, at / GROUP), 0) : scale4(w, r, at / GROUP);
    }
  }
  __device__ __forceinline__ void unpack(bf16* to) const {
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      const int i = threadIdx.x + j * Size::THREADS;
      if (i >= Size::N * PIECES) continue;
      const unsigned words[4] = {bits[j].x, bits[j].y, bits[j].z, bits[j].w};
      bf16* row = to + i / PIECES * STRIDE + i % PIECES * SIZE;
#pragma unroll
      for (int part = 0; part < SIZE / 8; ++part) {
        float v[8];
        for (int l = 0; l < 8; ++l) {
          const unsigned word = words[part % 2 * 2 + l / 4];
          v[l] = FORM == FORM_INT8 ? int8_at(word, l % 4) * scale[j].x : int4_at(word, l % 4 * 2 + part / 2) * scale[j].x - scale[j].y;
        }
        store8(row + part * 8, v);
      }
    }
  }
};

template <class Out, int FORM, class Size>
__global__ void __launch_bounds__(Size::THREADS) matmul(const bf16* x, Matrix dense, const Matrix* of_experts, const float* const* biases, const float* bias,
                                                        Rows rows, Epilogue epilogue, Out* out) {
  DYNAMIC_SHARED(bf16, tiles);
  SHARED(int, row_of, [Size::M]);
  const Matrix w = of_experts ? of_experts[blockIdx.z] : dense;
  const float* added = biases ? biases[blockIdx.z] : bias;
  const int from = blockIdx.x * Size::M, column = blockIdx.y * Size::N, count = rows_here(rows) - from;
  if (count <= 0) return;  // the whole block at once
  for (int i = threadIdx.x; i < Size::M; i += Size::THREADS) row_of[i] = i < count ? input_row(rows, from + i) : -1;
  __syncthreads();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_row = warp / Size::WARPS_N * Size::WARP_M, warp_column = warp % Size::WARPS_N * Size::WARP_N;
  auto x_tile = [&](int step) { return tiles + step % STAGES * Size::M * STRIDE; };
  auto w_tile = [&](int step) { return tiles + STAGES * Size::M * STRIDE + step % STAGES * Size::N * STRIDE; };
  constexpr bool PACKED = FORM == FORM_INT8 || FORM == FORM_INT4;
  Packed<Size, PACKED ? FORM : FORM_INT8> packed;
  const int steps = (w.k + DEPTH - 1) / DEPTH;
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) {
      fetch_x<Size>(x_tile(step), x, rows, row_of, step * DEPTH, w.k);
      if (PACKED) packed.fetch(w, column, step * DEPTH), packed.unpack(w_tile(step));
      else fetch_bf16<Size>(w_tile(step), w, column, step * DEPTH);
    }
    cp_async_commit();
  }
  constexpr int MS = Size::WARP_M / 16, NS = Size::WARP_N / 8;
  float sum[MS][NS][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // what each has fetched is there for all, and nobody reads the stage that is filled next
    const int next = step + STAGES - 1;
    if (next < steps) {
      fetch_x<Size>(x_tile(next), x, rows, row_of, next * DEPTH, w.k);
      if (PACKED) packed.fetch(w, column, next * DEPTH);
      else fetch_bf16<Size>(w_tile(next), w, column, next * DEPTH);
    }
    cp_async_commit();
    const bf16 *left_tile = x_tile(step), *right_tile = w_tile(step);
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t left[MS][4], right[NS / 2][4];
      for (int m = 0; m < MS; ++m)  // matrices: upper left, lower left, upper right, lower right
        ldmatrix_x4(left[m], left_tile + (warp_row + m * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
      for (int n = 0; n < NS / 2; ++n)  // matrices: columns 0-7 (k, k + 8), columns 8-15 (k, k + 8)
        ldmatrix_x4(right[n], right_tile + (warp_column + n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
      for (int m = 0; m < MS; ++m)
        for (int n = 0; n < NS; ++n) mma_m16n8k16_bf16(sum[m][n], left[m], &right[n / 2][n % 2 * 2], sum[m][n]);
    }
    if (PACKED && next < steps) packed.unpack(w_tile(next));
  }
#pragma unroll
  for (int m = 0; m < MS; ++m)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int r = warp_row + m * 16 + lane / 4 + half_row * 8;
      if (r >= count) continue;
      Out* row = output_at(rows, out, from + r);
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        const int at = column + warp_column + n * 8 + lane % 4 * 2;
        if (at < w.n) finish(sum[m][n][half_row * 2], sum[m][n][half_row * 2 + 1], at, w.n, added, epilogue, row);
      }
    }
}

template <class Out, int FORM, class Size> int matmul_of(void* stream, const Product& p) {
  const dim3 grid(blocks_of(p.rows.count, Size::M), blocks_of(p.w.n, Size::N), p.experts ? p.experts : 1);
  return launch(stream, grid, Size::THREADS, Size::BYTES, KERNEL(matmul<Out, FORM, Size>), static_cast<const bf16*>(p.x), p.w, p.of_experts, p.biases, p.bias,
                p.rows, p.epilogue, static_cast<Out*>(p.out));
}
template <class Out, int FORM> int matmul_size(void* stream, bool large, const Product& p) {
  return large ? matmul_of<Out, FORM, Large>(stream, p) : matmul_of<Out, FORM, Small>(stream, p);
}
template <class Out> int matmul_form(void* stream, int form, bool large, const Product& p) {
  switch (form) {
    case FORM_BF16: return p.w.k % 8 ? NOT_SUPPORTED : matmul_size<Out, FORM_BF16>(stream, large, p);
    case FORM_INT8: return matmul_size<Out, FORM_INT8>(stream, large, p);
    case FORM_INT4: return matmul_size<Out, FORM_INT4>(stream, large, p);
    default: return NOT_SUPPORTED;
  }
}

// x is bf16, and its rows begin at multiples of 16 bytes; the width of a bf16 matrix is a multiple of 8. `large`: tiles of 128 × 128 instead of 64 × 64.
extern "C" int wc_matmul(void* stream, int out_dtype, int form, int large, const Product* p) {
  if (p->rows.x_stride % 8 || p->rows.x_step % 8 || reinterpret_cast<uintptr_t>(p->x) % 16) return NOT_SUPPORTED;
  return out_dtype == F32 ? matmul_form<float>(stream, form, large, *p) : matmul_form<bf16>(stream, form, large, *p);
}
