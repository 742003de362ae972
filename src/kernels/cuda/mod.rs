//! CUDA kernels of our own, as C++ that two compilers take, and how they are proved without a GPU.
//!
//! What a GPU computes with, where the model needs nothing of [`MISSING`] and [`Cuda::self_check`] finds all kernels right; else candle's operations
//! do ([`crate::candle`]). **Proved on the emulator, never run on a GPU**: of `gpu.rs` nothing but its compilation is known.
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
//! | `backend.rs`, `backend/` | the host side: what is launched for an operation of [`crate::Backend`], and from what memory |
//! | `device.rs` | what the host side needs of a device: `gpu.rs` is one, `emulator.rs` another for tests |
//! | `check.rs` | what a device is asked at the start: every kernel on a few numbers |
//! | `../build.rs` | nvcc's part: machine code for each architecture in one library |
//! | `device.h`, `tensor.h`, `emulate/` | what two compilers need to take them alike; a launch on a CPU |
//!
//! The tests build them with the host's C++ compiler and compare each with its CPU twin, on random shapes and in three orders of threads.
//! `emulate/` runs the threads of a block as fibers that switch at barriers and warp collectives, over memory that is guarded and NaN until
//! written: it sees barriers that not all reach, reads of what nobody wrote, indices out of bounds, copies that nobody waited for. It does
//! not see races within what runs between two barriers where the order of threads does not matter to the result, nor anything of speed.
//!
//! `scripts/cuda-mutants` breaks the kernels in one place at a time and shows which of it the tests notice.

mod backend;
mod check;
mod device;
#[cfg(any(test, feature = "emulator"))]
#[doc(hidden)]
pub mod emulator;
mod functions;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(test)]
mod tests;

pub use backend::{Choices, Cuda, Dtype};
pub use check::Disagreement;
pub use device::Device;
#[cfg(feature = "cuda")]
pub use gpu::Gpu;

use crate::{Need, NormExtent, StepLimits};

/// What models may need that there is no kernel for yet. They run on candle's operations.
pub const MISSING: &[Need] = &[];

/// Older cards have no arithmetic of bf16.
pub const LEAST_CAPABILITY: (u32, u32) = (8, 0);

/// Bytes of shared memory that a block of threads can have on every card from [`LEAST_CAPABILITY`] on.
const SHARED_BYTES: usize = 99 << 10;

/// What about a model of these sizes is more than the kernels hold in a block of threads.
pub fn too_large(limits: &StepLimits, hidden: usize) -> Option<String> {
    let bytes = |numbers: usize| numbers * size_of::<f32>();
    let attention = limits.attention.iter().find_map(|spec| match spec {
        spec if spec.head_dim > 768 => Some(format!("heads of {} numbers are more than the CUDA kernels' 768", spec.head_dim)),
        // Only a norm over all heads needs all of them in one block.
        spec if spec.qk_norm.is_some_and(|norm| norm.extent == NormExtent::Token) && bytes(spec.qkv_width()) > SHARED_BYTES => {
            Some(format!("{} heads of {} are too many for a CUDA kernel", spec.heads, spec.head_dim))
        }
        _ => None,
    });
    let experts = limits.experts.filter(|experts| experts.top_k > 32 || experts.experts > 1024);
    let experts =
        experts.map(|experts| format!("{} of {} experts are more than the CUDA kernels' 32 of 1024", experts.top_k, experts.experts));
    let wide = (bytes(hidden) > 96 << 10).then(|| format!("rows of {hidden} numbers are too wide for a CUDA kernel"));
    attention.or(experts).or(wide)
}
