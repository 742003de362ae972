// Operations on rows: norms with what surrounds them, and the small ones. A row is one block's, or one warp's where rows are short.
#include "common.h"

// ---- norms
// One pass over memory for what ends a branch and begins the next one:
//   v = x; with a first norm v = norm(v)
//   with a residual: residual += factor · v, v = residual
//   with an output: out = norm(v), or v itself without a second norm
struct NormOf {
  const float* weight;  // null: there is no such norm
  const float* bias;    // of a layer norm, or null
  float epsilon;
  int is_layer;
};

constexpr int MAX_ROW = 24 * 1024;  // numbers of a row, which lie in shared memory as f32

__device__ __forceinline__ void normalize(float* row, int width, const NormOf& norm, float* partial) {
  float mean = 0;
  if (norm.is_layer) {
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i];
    mean = block_sum(sum, partial) / float(width);
    __syncthreads();  // `partial` is written again
  }
  float squares = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
  const float scale = rsqrtf(block_sum(squares, partial) / float(width) + norm.epsilon);
  // Each thread reads and writes numbers of its own here and wherever a row is walked through: no barrier is needed in between.
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const float y = (row[i] - mean) * scale * norm.weight[i];
    row[i] = norm.bias ? y + norm.bias[i] : y;
  }
}

template <class T>
__global__ void __launch_bounds__(1024) norm_rows(const T* x, NormOf first, T* residual, float factor, NormOf second, T* out, int width) {
  DYNAMIC_SHARED(float, row);
  SHARED(float, partial, [WARP]);
  const size_t at = size_t(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = to_float(x[at + i]);
  if (first.weight) {
    normalize(row, width, first, partial);
    __syncthreads();  // `partial` is written again
  }
  if (residual)
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const T sum = from_float<T>(to_float(residual[at + i]) + factor * row[i]);
      residual[at + i] = sum;
      row[i] = to_float(sum);
    }
  if (second.weight) normalize(row, width, second, partial);
  if (out)
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[at + i] = from_float<T>(row[i]);
}

// Rows whose width is a multiple of 8 · 32 · n and no more than 8 numbers a thread: registers hold the row, loads are of 16 bytes. RMS only.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) rms_norm_wide(const T* x, T* residual, float factor, const float* weight, float epsilon, T* out, int width) {
  SHARED(float, partial, [WARP]);
  const size_t at = size_t(blockIdx.x) * width;
  const int mine = threadIdx.x * 8;
  float v[8] = {}, sum = 0;
  if (mine < width) {
    load8(x + at + mine, v);
    if (residual) {
      float before[8];
      load8(residual + at + mine, before);
      for (int i = 0; i < 8; ++i) v[i] = to_float(from_float<T>(before[i] + factor * v[i]));
      store8(residual + at + mine, v);
    }
    for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
  }
  const float scale = rsqrtf(block_sum(sum, partial) / float(width) + epsilon);
  if (mine < width) {
    float w[8];
    load8(weight + mine, w);
    for (int i = 0; i < 8; ++i) v[i] *= scale * w[i];
    store8(out + at + mine, v);
  }
}

template <class T>
int norm_of(void* stream, const void* x, NormOf first, void* residual, float factor, NormOf second, void* out, int rows, int width) {
  const T* from = static_cast<const T*>(x);
  T *sum = static_cast<T*>(residual), *to = static_cast<T*>(out);
  if (width % 8 == 0 && width <= 8 * 1024 && !first.weight && second.weight && !second.is_layer && to) {
    auto run = [&](auto kernel, int threads) { return launch(stream, rows, threads, 0, kernel, from, sum, factor, second.weight, second.epsilon, to, width); };
    if (width <= 8 * 128) return run(KERNEL(rms_norm_wide<T, 128>), 128);
    if (width <= 8 * 512) return run(KERNEL(rms_norm_wide<T, 512>), 512);
    return run(KERNEL(rms_norm_wide<T, 1024>), 1024);
  }
  if (width > MAX_ROW) return NOT_SUPPORTED;
  const int threads = width <= 512 ? 64 : width <= 4096 ? 256 : 1024;
  return launch(stream, rows, threads, width * sizeof(float), KERNEL(norm_rows<T>), from, first, sum, factor, second, to, width);
}

extern "C" int wc_norm(void* stream, int dtype, const void* x, NormOf first, void* residual, float factor, NormOf second, void* out, int rows, int width) {
  return dtype == BF16 ? norm_of<bf16>(stream, x, first, residual, factor, second, out, rows, width)
                       : norm_of<float>(stream, x, first, residual, factor, second, out, rows, width);
}

// ---- small ones: a block for a row of the output
template <class T> __global__ void pick_rows(const T* x, const int* rows, T* out, int width) {
  const size_t from = size_t(rows ? rows[blockIdx.x] : int(blockIdx.x)) * width, to = size_t(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) out[to + i] = x[from + i];
}
// The mean of rows `spans[i][0]` to `spans[i][1]`, the last one not among them.
template <class T> __global__ void mean_rows(const T* x, const int* spans, T* out, int width) {
  const int begin = spans[2 * blockIdx.x], end = spans[2 * blockIdx.x + 1];
  const float share = 1.0f / float(end - begin);
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = 0;
    for (int row = begin; row < end; ++row) sum += to_float(x[size_t(row) * width + i]);
    out[size_t(blockIdx.x) * width + i] = from_float<T>(sum * share);
  }
}
template <class T> __global__ void scale_and_cap(T* x, size_t count, float scale, float cap) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) x[i] = from_float<T>(capped(to_float(x[i]) * scale, cap));
}
// A gate for each `part` numbers that lie side by side.
template <class T> __global__ void gate_rows(const T* gates, T* x, int width, int part) {
  const size_t at = size_t(blockIdx.x) * width, first = size_t(blockIdx.x) * (width / part);
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const float factor = 1.0f / (1.0f + __expf(-to_float(gates[first + i / part])));
    x[at + i] = from_float<T>(to_float(x[at + i]) * factor);
  }
}

// `rows` null: all of them in order.
extern "C" int wc_pick(void* stream, int dtype, const void* x, const int* rows, void* out, int count, int width) {
  return dtype == BF16 ? launch(stream, count, 256, 0, KERNEL(pick_rows<bf16>), static_cast<const bf16*>(x), rows, static_cast<bf16*>(out), width)
                       : launch(stream, count, 256, 0, KERNEL(pick_rows<float>), static_cast<const float*>(x), rows, static_cast<float*>(out), width);
}
extern "C" int wc_mean(void* stream, int dtype, const void* x, const int* spans, void* out, int count, int width) {
  return dtype == BF16 ? launch(stream, count, 256, 0, KERNEL(mean_rows<bf16>), static_cast<const bf16*>(x), spans, static_cast<bf16*>(out), width)
                       : launch(stream, count, 256, 0, KERNEL(mean_rows<float>), static_cast<const float*>(x), spans, static_cast<float*>(out), width);
}
// `cap` 0: none.
extern "C" int wc_scale_and_cap(void* stream, int dtype, void* x, size_t count, float scale, float cap) {
  const dim3 grid(unsigned((count + 255) / 256));
  return dtype == BF16 ? launch(stream, grid, 256, 0, KERNEL(scale_and_cap<bf16>), static_cast<bf16*>(x), count, scale, cap)
                       : launch(stream, grid, 256, 0, KERNEL(scale_and_cap<float>), static_cast<float*>(x), count, scale, cap);
}
extern "C" int wc_gate_rows(void* stream, int dtype, const void* gates, void* x, int rows, int width, int part) {
  return dtype == BF16 ? launch(stream, rows, 256, 0, KERNEL(gate_rows<bf16>), static_cast<const bf16*>(gates), static_cast<bf16*>(x), width, part)
                       : launch(stream, rows, 256, 0, KERNEL(gate_rows<float>), static_cast<const float*>(gates), static_cast<float*>(x), width, part);
}
