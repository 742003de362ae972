// What CUDA calls its errors. Not part of the emulator, which has none of them.
#include <cuda_runtime.h>

extern "C" const char* wc_error_name(int code) { return cudaGetErrorName(cudaError_t(code)); }
