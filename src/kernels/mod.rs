//! Home of `unsafe`: one function per kernel, CPU and CUDA behind the same signature.
