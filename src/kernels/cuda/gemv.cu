// Products of few rows: y = epilogue(x · Wᵀ + b) for up to 8 rows at once, bound by reading W. A warp makes two columns of the output, which
// for a gated matrix are a gate and what it gates; its lanes share the width in pieces of 16 bytes, and x stays in the first-level cache.
#include "product.h"

constexpr int WARPS = 4, COLUMNS = 2;

// Weights of a piece of 16 bytes (32 of f32).
template <int FORM> constexpr int PIECE = FORM == FORM_INT8 ? 16 : FORM == FORM_INT4 ? 32 : 8;

// What a lane holds of a row of W: the bytes of a piece.
template <int FORM> struct Piece {
  uint4 bits[FORM == FORM_F32 ? 2 : 1];
  float scale, minimum;
};

template <int FORM> __device__ __forceinline__ void fetch(Piece<FORM>& to, const Matrix& w, size_t row, int at) {
  constexpr int BITS = FORM == FORM_F32 ? 32 : FORM == FORM_BF16 ? 16 : FORM == FORM_INT8 ? 8 : 4;
  const char* from = static_cast<const char*>(w.values) + (row * w.k + at) / 8 * BITS;
  to.bits[0] = load<uint4>(from);
  if (FORM == FORM_F32) to.bits[FORM == FORM_F32] = load<uint4>(from + 16);
  to.scale = 1, to.minimum = 0;
  if (FORM == FORM_INT8) to.scale = scale8(w, row, at / GROUP);
  if (FORM == FORM_INT4) {
    const float2 scale = scale4(w, row, at / GROUP);
    to.scale = scale.x, to.minimum = scale.y;
  }
}

// Eight of a piece, as numbers before the scale.
template <int FORM> __device__ __forceinline__ void eight(const Piece<FORM>& from, int part, float out[8]) {
  if (FORM == FORM_F32) {
    const uint4 a = from.bits[0], b = from.bits[FORM == FORM_F32];
    const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(words[i]);
    return;
  }
  const uint4 b = from.bits[0];
  if (FORM == FORM_BF16) {
    unpack_bf16(b.x, out), unpack_bf16(b.y, out + 2), unpack_bf16(b.z, out + 4), unpack_bf16(b.w, out + 6);
    return;
  }
  const bool upper = part % 2;
  const unsigned words[2] = {upper ? b.z : b.x, upper ? b.w : b.y};
  for (int i = 0; i < 8; ++i) {
    if (FORM == FORM_INT8) out[i] = int8_at(words[i / 4], i % 4);
    if (FORM == FORM_INT4) out[i] = int4_at(words[i / 4], i % 4 * 2 + part / 2);
  }
}

template <class T, class Out, int FORM, int M>
__global__ void __launch_bounds__(WARPS * WARP, sizeof(T) == 4 ? 2 : M == 8 ? 3 : 0) gemv(const T* x, Matrix dense, const Matrix* of_experts, const float* const* biases, const float* bias,
                                                     Rows rows, Epilogue epilogue, int whole, Out* out) {
  constexpr int SIZE = PIECE<FORM>;
  const int lane = threadIdx.x % WARP, first = (blockIdx.x * WARPS + threadIdx.x / WARP) * COLUMNS, from = blockIdx.y * M;
  const Matrix w = of_experts ? of_experts[blockIdx.z] : dense;
  const float* added = biases ? biases[blockIdx.z] : bias;
  const int count = rows_here(rows) - from;
  // There is no barrier in this kernel: warps without work may leave.
  if (first >= w.n || count <= 0) return;
  const T* in[M];
  for (int m = 0; m < M; ++m) in[m] = input_at(rows, x, input_row(rows, from + (m < count ? m : 0)));
  const bool two = first + 1 < w.n;
  float sum[COLUMNS][M] = {};
  if (whole) {
#pragma unroll 2
    for (int at = lane * SIZE; at < w.k; at += WARP * SIZE) {
      Piece<FORM> pieces[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) fetch<FORM>(pieces[c], w, first + (two ? c : 0), at);
      float dots[COLUMNS][M] = {}, all[M] = {};
#pragma unroll
      for (int part = 0; part < SIZE / 8; ++part) {
        float weights[COLUMNS][8];
        for (int c = 0; c < COLUMNS; ++c) eight<FORM>(pieces[c], part, weights[c]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float v[8];
          load8(in[m] + at + part * 8, v);
          for (int i = 0; i < 8; ++i) {
            for (int c = 0; c < COLUMNS; ++c) dots[c][m] += weights[c][i] * v[i];
            if (FORM == FORM_INT4) all[m] += v[i];
          }
        }
      }
      for (int c = 0; c < COLUMNS; ++c)
        for (int m = 0; m < M; ++m) sum[c][m] += pieces[c].scale * dots[c][m] - (FORM == FORM_INT4 ? pieces[c].minimum * all[m] : 0.0f);
    }
  } else {
    for (int i = lane; i < w.k; i += WARP)
      for (int c = 0; c < COLUMNS; ++c) {
        const float weight = weight_at<FORM>(w, first + (two ? c : 0), i);
        for (int m = 0; m < M; ++m) sum[c][m] += weight * to_float(in[m][i]);
      }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const float a = warp_sum(sum[0][m]), b = warp_sum(sum[1][m]);
    if (lane != m || m >= count) continue;
    finish(a, b, first, w.n, added, epilogue, output_at(rows, out, from + m));
  }
}

template <class T, class Out, int FORM> int gemv_of(void* stream, const Product& p) {
  const int m = p.rows.count > 4 ? 8 : p.rows.count > 2 ? 4 : p.rows.count;
  const dim3 grid(blocks_of(p.w.n, WARPS * COLUMNS), blocks_of(p.rows.count, m), p.experts ? p.experts : 1);
  // Pieces of 16 bytes, of which rows consist and at which they begin.
  const int whole = p.w.k % PIECE<FORM> == 0 && p.rows.x_stride % 8 == 0 && p.rows.x_step % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  auto run = [&](auto kernel) {
    return launch(stream, grid, WARPS * WARP, 0, kernel, static_cast<const T*>(p.x), p.w, p.of_experts, p.biases, p.bias, p.rows, p.epilogue, whole,
                  static_cast<Out*>(p.out));
  };
  switch (m) {
    case 1: return run(KERNEL(gemv<T, Out, FORM, 1>));
    case 2: return run(KERNEL(gemv<T, Out, FORM, 2>));
    case 4: return run(KERNEL(gemv<T, Out, FORM, 4>));
    default: return run(KERNEL(gemv<T, Out, FORM, 8>));
  }
}
template <class T, class Out> int gemv_form(void* stream, int form, const Product& p) {
  switch (form) {
    case FORM_F32: return gemv_of<T, Out, FORM_F32>(stream, p);
    case FORM_BF16: return gemv_of<T, Out, FORM_BF16>(stream, p);
    case FORM_INT8: return gemv_of<T, Out, FORM_INT8>(stream, p);
    default: return gemv_of<T, Out, FORM_INT4>(stream, p);
  }
}

// `out_dtype`: that of x, or f32.
extern "C" int wc_gemv(void* stream, int dtype, int out_dtype, int form, const Product* p) {
  if (dtype == F32) return out_dtype == F32 ? gemv_form<float, float>(stream, form, *p) : NOT_SUPPORTED;
  return out_dtype == F32 ? gemv_form<bf16, float>(stream, form, *p) : gemv_form<bf16, bf16>(stream, form, *p);
}
