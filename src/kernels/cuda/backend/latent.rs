//! What latent attention has around attention proper: products for each head with a matrix of its own, and rows of queries, key and value.

use std::ffi::c_int;

use candle_core::{Error, Result};

use super::{Buffer, Cuda, Weight, at, at_or_null, ending};
use crate::cuda::device::{Allocation, Device, bytes_of};
use crate::cuda::functions::{Latent, NULL, Product, Rows};
use crate::{Epilogue, HeadColumns, LatentSpec, Linear};

impl<D: Device> Cuda<D> {
    /// All heads in one launch: each matrix reads and writes columns of its own.
    pub(super) fn products_of_heads(
        &mut self,
        x: &Buffer<D::Memory>,
        columns: HeadColumns,
        weights: &[Linear<Weight<D::Memory>, D::Memory>],
        out: &mut Buffer<D::Memory>,
    ) -> Result<()> {
        let Some(first) = weights.first().map(|linear| &linear.weight) else { return Err(Error::Msg("no heads".into())) };
        let (n, k) = (first.n, first.k);
        let end = columns.first + (weights.len() - 1) * columns.stride + k;
        if end > x.width || weights.iter().any(|linear| (linear.weight.n, linear.weight.k, linear.weight.format) != (n, k, first.format)) {
            return Err(Error::Msg(format!("rows of {} numbers for {} heads of {k} at {columns:?}", x.width, weights.len())));
        }
        self.resize(out, x.rows, weights.len() * n)?;
        let matrices: Vec<_> = weights.iter().map(|linear| linear.weight.matrix()).collect();
        let biases: Vec<_> = weights.iter().map(|linear| at_or_null(linear.bias.as_ref())).collect();
        let key = matrices[0].values as usize;
        let of_experts = self.table(key, bytes_of(&matrices), c"matrices")?.0;
        let biases = self.table(key + 1, bytes_of(&biases), c"biases")?.0;
        let product = Product {
            x: at(&x.memory).wrapping_byte_add(columns.first * self.dtype.bytes()),
            w: first.matrix(),
            of_experts,
            biases,
            bias: NULL,
            rows: Rows {
                visits: NULL,
                offsets: NULL,
                count: x.rows as c_int,
                per_row: 1,
                x_stride: x.width as c_int,
                out_stride: out.width as c_int,
                x_step: columns.stride as c_int,
                out_step: n as c_int,
            },
            epilogue: ending(Epilogue::Store),
            out: out.memory.address(),
            experts: weights.len() as c_int,
        };
        self.product(&product, first.form(), self.dtype.code())
    }

    pub(super) fn rows_of_latent(
        &mut self,
        [q, absorbed, latent]: [&Buffer<D::Memory>; 3],
        spec: &LatentSpec,
        norm: &D::Memory,
        out: &mut Buffer<D::Memory>,
    ) -> Result<()> {
        let given = ([q.width, absorbed.width, latent.width], [absorbed.rows, latent.rows], norm.bytes());
        let widths = [spec.heads * (spec.nope_dim + spec.rope_dim), spec.heads * spec.rank, spec.head_dim()];
        if given != (widths, [q.rows; 2], spec.rank * 4) {
            return Err(Error::Msg(format!("rows of {given:?} numbers for {} rows of {spec:?}", q.rows)));
        }
        self.resize(out, q.rows, (spec.heads + 2) * spec.head_dim())?;
        let on_device = Latent {
            heads: spec.heads as c_int,
            nope_dim: spec.nope_dim as c_int,
            rope_dim: spec.rope_dim as c_int,
            rank: spec.rank as c_int,
            epsilon: spec.eps,
        };
        let [q_at, absorbed, latent] = [q, absorbed, latent].map(|rows| at(&rows.memory));
        let (dtype, norm, to, tokens) = (self.dtype.code(), at(norm), out.memory.address(), q.rows as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.launch(|functions, stream| unsafe {
            (functions.latent_rows)(stream, dtype, q_at, absorbed, latent, &on_device, norm, to, tokens)
        })
    }
}
