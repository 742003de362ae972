// What both attention kernels read: crate::AttentionSpec's part of it, the paged cache and the tokens of the step.
#pragma once
#include "common.h"

struct Attention {
  int heads, kv_heads, head_dim;
  int q_stride;  // numbers from one token's queries to the next's
  float scale;
  float soft_cap;      // 0: none
  int causal;          // a token sees nothing after it
  int window;          // a token sees itself and so many less one before it, not causal as many after it; 0: all
  const float* sinks;  // [heads], or null
  int block_size;
  int max_blocks;         // of a row of `tables`
  const int* tables;      // [sequences][max_blocks]
  const int* sequences;   // [t]: the row of each token
  const int* visible;     // [t]: cached tokens up to it, itself among them
  const int* contexts;    // [sequences]: cached tokens of each
  int splits;             // parts the context is cut into
  float* parts;           // [t · heads][splits][head_dim + 2]: greatest score, sum of weights, weighted values; unused with 1
};

// The cached positions that a token sees: crate::AttentionSpec::visible.
struct Span {
  int begin, end;
};
__device__ __forceinline__ Span seen_by(const Attention& a, int token) {
  const int own = a.visible[token], begin = a.window > 0 ? greater(0, own - a.window) : 0;
  if (a.causal) return {begin, own};
  const int context = a.contexts[a.sequences[token]];
  return {begin, a.window > 0 ? smaller(context, own - 1 + a.window) : context};
}

// Where token `position` of a sequence lies, in rows of [kv_heads][head_dim].
__device__ __forceinline__ size_t slot_of(const Attention& a, int sequence, int position) {
  return size_t(a.tables[size_t(sequence) * a.max_blocks + position / a.block_size]) * a.block_size + position % a.block_size;
}

// The sink of a head joins a softmax whose greatest score is `top` and whose weights sum to `total`; what weights are to be multiplied with.
__device__ __forceinline__ float with_sink(const Attention& a, int head, float top, float total) {
  if (!a.sinks) return 1.0f / total;
  const float most = fmaxf(top, a.sinks[head]), keep = __expf(top - most);
  return keep / (total * keep + __expf(a.sinks[head] - most));
}
