//! What latent attention has around attention proper: products for each head with a matrix of its own, and rows of queries, key and value.

use super::{Buffer, Pool, PtrMut, by_rows, elementwise, matmul, packed::Packed};
use crate::{Epilogue, HeadColumns, LatentSpec, Linear};

/// Copies `width` columns of each row of `x` from column `from` on to the columns of `out` from `to` on.
fn copy_columns(x: &Buffer, from: usize, width: usize, out: &mut Buffer, to: usize) {
    let columns = out.width;
    for (x, out) in x.values().chunks_exact(x.width).zip(out.values_mut().chunks_exact_mut(columns)) {
        out[to..to + width].copy_from_slice(&x[from..from + width]);
    }
}

/// See [`Backend::linear_heads`](crate::Backend::linear_heads). The buffers have their sizes.
pub(super) fn linear_heads(
    pool: &mut Pool,
    x: &Buffer,
    columns: HeadColumns,
    weights: &[Linear<Packed, Vec<f32>>],
    matmul_scratch: &mut matmul::Scratch,
    [input, result]: &mut [Buffer; 2],
    out: &mut Buffer,
) {
    for (head, linear) in weights.iter().enumerate() {
        let w = &linear.weight;
        copy_columns(x, columns.first + head * columns.stride, w.k, input, 0);
        matmul::matmul(pool, input.values(), w, linear.bias.as_deref(), Epilogue::Store, matmul_scratch, result.values_mut());
        copy_columns(result, 0, w.n, out, head * w.n);
    }
}

/// See [`Backend::latent_rows`](crate::Backend::latent_rows). The buffers have their sizes.
pub(super) fn latent_rows(pool: &mut Pool, [q, absorbed, latent]: [&Buffer; 3], spec: &LatentSpec, norm: &[f32], out: &mut Buffer) {
    let LatentSpec { heads, nope_dim, rope_dim, rank, eps } = *spec;
    let (width, target) = (out.width, PtrMut(out.values.as_mut_ptr()));
    by_rows(pool, q.rows, width, &|row| {
        let of = |buffer: &'_ Buffer| row * buffer.width..(row + 1) * buffer.width;
        let (q, absorbed, latent) = (&q.values[of(q)], &absorbed.values[of(absorbed)], &latent.values[of(latent)]);
        // SAFETY: a row of this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(target.ptr().add(row * width), width) };
        let mut parts = out.chunks_exact_mut(rope_dim + rank);
        let queries = q.chunks_exact(nope_dim + rope_dim).zip(absorbed.chunks_exact(rank));
        for (part, (q, absorbed)) in parts.by_ref().take(heads).zip(queries) {
            part[..rope_dim].copy_from_slice(&q[nope_dim..]);
            part[rope_dim..].copy_from_slice(absorbed);
        }
        let (vector, rotated) = latent.split_at(rank);
        // The key, and the same as value: of what attention makes of values, the rotated components are left out.
        for part in parts {
            part[..rope_dim].copy_from_slice(rotated);
            elementwise::rms_norm(vector, norm, eps, &mut part[rope_dim..]);
        }
    });
}
