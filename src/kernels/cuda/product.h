// What a product of rows and a matrix takes; crate::cuda::Product in Rust.
#pragma once
#include "weights.h"

struct Product {
  const void* x;
  Matrix w;
  const Matrix* of_experts;     // on the device; null: `w`
  const float* const* biases;   // of experts, or null
  const float* bias;
  Rows rows;
  Epilogue epilogue;
  void* out;
  int experts;                  // 0: `w`
};
