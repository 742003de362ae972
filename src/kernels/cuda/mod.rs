//! CUDA kernels of our own, as C++ that two compilers take, and how they are proved without a GPU.
//!
//! **Not in use yet**: CUDA runs candle's operations composed ([`crate::candle`]). What stands here is built by tests alone.
//!
//! | file | what is in it |
//! |---|---|
//! | `rows.cu` | norms with the residual sums around them; rows picked, scaled, capped, gated |
//! | `embed.cu`, `weights.h` | rows of the embedding; how weights of f32, bf16, 8 and 4 bits lie on the device |
//! | `gemv.cu` | products of up to 8 rows, with bias, activation, gate or residual sum fused; of experts, too |
//! | `matmul.cu` | products of many rows on tensor cores, weights of 8 and 4 bits unpacked on the way; of experts, too |
//! | `rope.cu` | norms of heads, rotation, keys and values into pages |
//! | `attend.cu` | paged attention, a token at a time, any head size and type; merges of a context that was cut |
//! | `attend_tiles.cu`, `attend_wide.h` | paged attention on tensor cores, for prompts and for decoding; over latent attention's wide heads |
//! | `experts.cu` | routing, the order of visits, the sum over experts |
//! | `conv.cu`, `delta.cu`, `states.h` | what keeps states in slots: convolutions, the gated delta rule |
//! | `latent.cu` | rows of latent attention; its products for each head are those of `gemv.cu` and `matmul.cu` |
//! | `sample.cu` | what changes logits, argmax, the draw |
//! | `device.h`, `tensor.h`, `emulate/` | what two compilers need to take them alike; a launch on a CPU |
//!
//! The tests build them with the host's C++ compiler and compare each with its CPU twin, on random shapes and in three orders of threads.
//! `emulate/` runs the threads of a block as fibers that switch at barriers and warp collectives, over memory that is guarded and NaN until
//! written: it sees barriers that not all reach, reads of what nobody wrote, indices out of bounds, copies that nobody waited for. It does
//! not see races within what runs between two barriers where the order of threads does not matter to the result, nor anything of speed.
//!
//! `scripts/cuda-mutants` breaks the kernels in one place at a time and shows which of it the tests notice.

pub mod backend;
pub mod emulator;
pub mod functions;
#[cfg(test)]
mod tests;
