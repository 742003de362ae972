// Latent attention's rows of queries, key and value, as wc_rope_and_store wants them (crate::LatentSpec). The products around them are wc_gemv
// and wc_matmul with columns of heads.
#include "common.h"

struct Latent {
  int heads, nope_dim, rope_dim, rank;
  float epsilon;
};

// A block for a part of a token's row: a query, the key or the value. All have the rotated components first.
template <class T> __global__ void latent_rows(const T* q, const T* absorbed, const T* latent, Latent l, const float* norm, T* out) {
  SHARED(float, partial, [WARP]);
  const size_t token = blockIdx.x;
  const int part = blockIdx.y, d = l.rope_dim + l.rank;
  T* to = out + (token * (l.heads + 2) + part) * d;
  if (part < l.heads) {
    const T *rotated = q + (token * l.heads + part) * (l.nope_dim + l.rope_dim) + l.nope_dim, *rest = absorbed + (token * l.heads + part) * l.rank;
    for (int i = threadIdx.x; i < d; i += blockDim.x) to[i] = i < l.rope_dim ? rotated[i] : rest[i - l.rope_dim];
    return;  // the whole block at once
  }
  const T* vector = latent + token * d;
  float squares = 0;
  for (int i = threadIdx.x; i < l.rank; i += blockDim.x) squares += to_float(vector[i]) * to_float(vector[i]);
  const float scale = rsqrtf(block_sum(squares, partial) / float(l.rank) + l.epsilon);
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    const int at = i - l.rope_dim;
    to[i] = at < 0 ? vector[l.rank + i] : from_float<T>(to_float(vector[at]) * scale * norm[at]);
  }
}

template <class T>
int latent_of(void* stream, const void* q, const void* absorbed, const void* latent, const Latent& l, const float* norm, void* out, int tokens) {
  return launch(stream, dim3(tokens, l.heads + 2), l.rank + l.rope_dim > 64 ? 128 : 32, 0, KERNEL(latent_rows<T>), static_cast<const T*>(q),
                static_cast<const T*>(absorbed), static_cast<const T*>(latent), l, norm, static_cast<T*>(out));
}
extern "C" int wc_latent_rows(void* stream, int dtype, const void* q, const void* absorbed, const void* latent, const Latent* l, const float* norm, void* out,
                              int tokens) {
  return dtype == BF16 ? latent_of<bf16>(stream, q, absorbed, latent, *l, norm, out, tokens) : latent_of<float>(stream, q, absorbed, latent, *l, norm, out, tokens);
}
