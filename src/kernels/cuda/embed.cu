// out[i] = table[tokens[i]] · scale, a block for a token.
#include "weights.h"

template <class T, int FORM> __global__ void embed(Matrix table, const int* tokens, float scale, T* out) {
  const size_t row = size_t(tokens[blockIdx.x]), to = size_t(blockIdx.x) * table.k;
  for (int i = threadIdx.x; i < table.k; i += blockDim.x) out[to + i] = from_float<T>(weight_at<FORM>(table, row, i) * scale);
}

template <class T> int embed_of(void* stream, int form, Matrix table, const int* tokens, float scale, void* out, int count) {
  T* to = static_cast<T*>(out);
  switch (form) {
    case FORM_F32: return launch(stream, count, 128, 0, KERNEL(embed<T, FORM_F32>), table, tokens, scale, to);
    case FORM_BF16: return launch(stream, count, 128, 0, KERNEL(embed<T, FORM_BF16>), table, tokens, scale, to);
    case FORM_INT8: return launch(stream, count, 128, 0, KERNEL(embed<T, FORM_INT8>), table, tokens, scale, to);
    default: return launch(stream, count, 128, 0, KERNEL(embed<T, FORM_INT4>), table, tokens, scale, to);
  }
}
extern "C" int wc_embed(void* stream, int dtype, int form, Matrix table, const int* tokens, float scale, void* out, int count) {
  return dtype == BF16 ? embed_of<bf16>(stream, form, table, tokens, scale, out, count) : embed_of<float>(stream, form, table, tokens, scale, out, count);
}

// out[i] += table[first + rows[i]]; `rows` null: `first` for each.
template <class T, int FORM> __global__ void embed_add(Matrix table, const int* rows, int first, T* out) {
  const size_t row = size_t(first + (rows ? rows[blockIdx.x] : 0)), to = size_t(blockIdx.x) * table.k;
  for (int i = threadIdx.x; i < table.k; i += blockDim.x) out[to + i] = from_float<T>(to_float(out[to + i]) + weight_at<FORM>(table, row, i));
}

template <class T> int embed_add_of(void* stream, int form, Matrix table, const int* rows, int first, void* out, int count) {
  T* to = static_cast<T*>(out);
  switch (form) {
    case FORM_F32: return launch(stream, count, 128, 0, KERNEL(embed_add<T, FORM_F32>), table, rows, first, to);
    case FORM_BF16: return launch(stream, count, 128, 0, KERNEL(embed_add<T, FORM_BF16>), table, rows, first, to);
    case FORM_INT8: return launch(stream, count, 128, 0, KERNEL(embed_add<T, FORM_INT8>), table, rows, first, to);
    default: return launch(stream, count, 128, 0, KERNEL(embed_add<T, FORM_INT4>), table, rows, first, to);
  }
}
extern "C" int wc_embed_add(void* stream, int dtype, int form, Matrix table, const int* rows, int first, void* out, int count) {
  return dtype == BF16 ? embed_add_of<bf16>(stream, form, table, rows, first, out, count) : embed_add_of<float>(stream, form, table, rows, first, out, count);
}
