// What keeps a few inputs of each channel from step to step: causal convolutions of single channels; and copies of states of any kind.
// States are f32 [slots][kernel - 1][channels], oldest first.
#include "states.h"

// In order, as one copy may read what another wrote; a thread has the same numbers of every state.
template <class V> __global__ void copy_states(float* state, const int2* copies, int count, int width) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i * sizeof(V) / sizeof(float) >= size_t(width)) return;  // there is no barrier
  for (int c = 0; c < count; ++c) {
    const V v = load<V>(state + size_t(copies[c].x) * width + i * (sizeof(V) / sizeof(float)));
    store(state + size_t(copies[c].y) * width + i * (sizeof(V) / sizeof(float)), v);
  }
}

extern "C" int wc_copy_states(void* stream, float* state, const int2* copies, int count, int width) {
  if (width % 4 == 0) return launch(stream, blocks_of(width / 4, 256), 256, 0, KERNEL(copy_states<float4>), state, copies, count, width);
  return launch(stream, blocks_of(width, 256), 256, 0, KERNEL(copy_states<float>), state, copies, count, width);
}

// crate::ConvSpec
struct Conv {
  int channels, kernel;
  int gated;            // rows are b, c and x: c · conv(b · x); else silu(conv(x))
  const float* weight;  // [kernel][channels], oldest token first
  const float* bias;    // [channels], or null
};

constexpr int CHANNELS = 128, TOKENS = 32;  // of a block

// A thread has a channel and goes through some tokens of a row; the inputs that its taps look at wait in registers, K - 1 of them.
template <class T, int K> __global__ void __launch_bounds__(CHANNELS) causal_conv(const T* x, Conv conv, States states, float* state, T* out) {
  const int channels = conv.channels, channel = blockIdx.x * CHANNELS + threadIdx.x, row = blockIdx.y;
  const int begin = states.begins[row], length = states.begins[row + 1] - begin, first = blockIdx.z * TOKENS;
  if (channel >= channels || first >= length) return;  // there is no barrier
  const int width = conv.gated ? 3 * channels : channels, before = conv.kernel - 1, slot = states.slots[row];
  const size_t state_width = size_t(before) * channels;
  const float* old = states.goes_on[row] ? state + slot * state_width + channel : nullptr;
  auto of_token = [&](int i, int part) { return to_float(x[size_t(begin + i) * width + part * channels + channel]); };
  // What the convolution sees at place i of the row; before the row that is its state.
  auto input = [&](int i) {
    if (i >= 0) return conv.gated ? of_token(i, 0) * of_token(i, 2) : of_token(i, 0);
    return old && i + before >= 0 ? old[size_t(i + before) * channels] : 0.0f;
  };
  float taps[K], window[K];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const int tap = j - (K - conv.kernel);
    taps[j] = tap >= 0 ? conv.weight[size_t(tap) * channels + channel] : 0.0f;
    window[j] = j < K - 1 ? input(first + j - (K - 1)) : 0.0f;
  }
  const float bias = conv.bias ? conv.bias[channel] : 0.0f;
#pragma unroll 4
  for (int i = first; i < first + TOKENS && i < length; ++i) {
    window[K - 1] = input(i);
    float sum = bias;
#pragma unroll
    for (int j = 0; j < K; ++j) sum += taps[j] * window[j];
#pragma unroll
    for (int j = 0; j + 1 < K; ++j) window[j] = window[j + 1];
    sum = conv.gated ? sum * of_token(i, 1) : activate(SILU, sum);
    out[size_t(begin + i) * channels + channel] = from_float<T>(sum);
  }
  if (first > 0) return;
  // Of the row's blocks only this one reads the old state, so it keeps all new ones: the row's own slot last, and older columns before newer
  // ones, since what is read lies behind what is written.
  for (int own = 0; own < 2; ++own)
    for (int s = states.save_begins[row]; s < states.save_begins[row + 1]; ++s) {
      const int2 save = states.saves[s];
      if ((save.y == slot) != (own == 1)) continue;
      float* to = state + save.y * state_width + channel;
      for (int j = 0; j < before; ++j) to[size_t(j) * channels] = input(save.x + 1 - begin - before + j);
    }
}

template <class T> int conv_of(void* stream, const void* x, const Conv& conv, const States& states, float* state, void* out, int rows, int longest) {
  const dim3 grid(blocks_of(conv.channels, CHANNELS), rows, blocks_of(longest, TOKENS));
  const T* from = static_cast<const T*>(x);
  if (conv.kernel <= 4) return launch(stream, grid, CHANNELS, 0, KERNEL(causal_conv<T, 4>), from, conv, states, state, static_cast<T*>(out));
  if (conv.kernel <= 8) return launch(stream, grid, CHANNELS, 0, KERNEL(causal_conv<T, 8>), from, conv, states, state, static_cast<T*>(out));
  return NOT_SUPPORTED;
}

// `longest`: tokens of the longest row.
extern "C" int wc_causal_conv(void* stream, int dtype, const void* x, const Conv* conv, const States* states, float* state, void* out, int rows, int longest) {
  return dtype == BF16 ? conv_of<bf16>(stream, x, *conv, *states, state, out, rows, longest) : conv_of<float>(stream, x, *conv, *states, state, out, rows, longest);
}
