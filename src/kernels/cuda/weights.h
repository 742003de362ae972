// Matrices [n, k] as they lie on a device, row after row (crate::WeightFormat):
//
// | form | values | scales | units | bits a weight |
// |---|---|---|---|---|
// | f32, bf16 | [n][k] | | | 32, 16 |
// | int8 | [n][k] bytes | f16 [n][k/32] | | 8.5 |
// | int4 | [n][k/32][16] bytes, weights i and i + 16 of 32 side by side | u8 [n][k/32][2]: scale, minimum | f16 [n][k/256][2]: their units | 4.625 |
//
// A weight is `scale · q`; at 4 bits `d · scale · q − dmin · minimum`. Of a gated matrix rows 2i and 2i + 1 are gate and what it gates.
#pragma once
#include "common.h"

struct Matrix {
  const void* values;
  const void* scales;
  const void* units;
  int n, k;
};

constexpr int GROUP = 32, SUPER = 256;

__device__ __forceinline__ float scale8(const Matrix& w, size_t row, int group) {
  return __half2float(static_cast<const __half*>(w.scales)[row * (w.k / GROUP) + group]);
}
// Of a group of 32 at 4 bits: what multiplies the levels, and what is taken off.
__device__ __forceinline__ float2 scale4(const Matrix& w, size_t row, int group) {
  const unsigned pair = load<uint16_t>(static_cast<const uint8_t*>(w.scales) + (row * (w.k / GROUP) + group) * 2);
  const unsigned units = load<unsigned>(static_cast<const uint8_t*>(w.units) + (row * (w.k / SUPER) + group / (SUPER / GROUP)) * 4);
  return make_float2(half_of(units & 0xFFFF) * float(pair & 0xFF), half_of(units >> 16) * float(pair >> 8));
}
// Byte j of a word as a signed number, and as the levels of its low or high half bytes.
__device__ __forceinline__ float int8_at(unsigned word, int j) { return float(int8_t(word >> 8 * j & 0xFF)); }
__device__ __forceinline__ float int4_at(unsigned word, int j) { return float(word >> 4 * j & 0xF); }

// One weight, for gathering rows and for widths without whole vectors.
template <int FORM> __device__ __forceinline__ float weight_at(const Matrix& w, size_t row, int i) {
  if (FORM == FORM_F32) return static_cast<const float*>(w.values)[row * w.k + i];
  if (FORM == FORM_BF16) return __bfloat162float(static_cast<const bf16*>(w.values)[row * w.k + i]);
  if (FORM == FORM_INT8) return scale8(w, row, i / GROUP) * float(static_cast<const int8_t*>(w.values)[row * w.k + i]);
  const unsigned byte = static_cast<const uint8_t*>(w.values)[(row * w.k + i / GROUP * GROUP) / 2 + i % 16];
  const float2 scale = scale4(w, row, i / GROUP);
  return scale.x * float(i % GROUP < 16 ? byte & 0xF : byte >> 4) - scale.y;
}

// crate::Epilogue
enum Ending { STORE = 0, ADD = 1, ACTIVATE = 2, GATED = 3 };
struct Epilogue {
  int ending;
  int activation;
  float factor;
};

// Ends sums `a` and `b` of columns n and n + 1, n even, of a row of the output. Only `columns` of all are there.
template <class T>
__device__ __forceinline__ void finish(float a, float b, int n, int columns, const float* bias, const Epilogue& e, T* row) {
  const bool second = n + 1 < columns;
  if (e.ending == GATED) {
    // Biases stay as they are stored: those of all gates first.
    if (bias) a += bias[n / 2], b += bias[columns / 2 + n / 2];
    row[n / 2] = from_float<T>(activate(e.activation, a) * gated(e.activation, b));
    return;
  }
  if (bias) a += bias[n], b += second ? bias[n + 1] : 0.0f;
  if (e.ending == ADD) a = to_float(row[n]) + e.factor * a, b = second ? to_float(row[n + 1]) + e.factor * b : 0.0f;
  if (e.ending == ACTIVATE) a = activate(e.activation, a), b = activate(e.activation, b);
  row[n] = from_float<T>(a);
  if (second) row[n + 1] = from_float<T>(b);
}

// Which rows a product takes. Dense: row i gives row i of `count`. Of experts: the visits of expert `blockIdx.z`, whose numbers stand in
// `visits` from `offsets[expert]` on; visit v reads row v / per_row and writes row v. Of heads: all rows for each matrix `blockIdx.z`, which
// reads and writes columns of its own.
struct Rows {
  const int* visits;
  const int* offsets;
  int count, per_row;
  int x_stride, out_stride;  // numbers from one row to the next
  int x_step, out_step;      // from one matrix's columns to the next's
};
__device__ __forceinline__ int rows_here(const Rows& rows) {
  return rows.visits ? rows.offsets[blockIdx.z + 1] - rows.offsets[blockIdx.z] : rows.count;
}
__device__ __forceinline__ int output_row(const Rows& rows, int i) { return rows.visits ? rows.visits[rows.offsets[blockIdx.z] + i] : i; }
__device__ __forceinline__ int input_row(const Rows& rows, int i) { return rows.visits ? output_row(rows, i) / rows.per_row : i; }
template <class T> __device__ __forceinline__ const T* input_at(const Rows& rows, const T* x, int row) {
  return x + size_t(row) * rows.x_stride + size_t(blockIdx.z) * rows.x_step;
}
template <class T> __device__ __forceinline__ T* output_at(const Rows& rows, T* out, int i) {
  return out + size_t(output_row(rows, i)) * rows.out_stride + size_t(blockIdx.z) * rows.out_step;
}
