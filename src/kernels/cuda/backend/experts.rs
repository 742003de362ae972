//! Routed experts: where tokens go, the two products of each expert's rows, and the sum.

use std::ffi::{c_int, c_void};

use candle_core::{Error, Result};

use super::{Buffer, Cuda, Use, Weight, at, at_or_null, ending};
use crate::cuda::device::Allocation;
use crate::cuda::device::{Device, bytes_of};
use crate::cuda::functions::{Ending, F32, NULL, Product, Routing, Rows};
use crate::{Epilogue, Experts, Linear, RouterScore, RoutingSpec};

/// Visits of tokens to experts, on the device.
struct Visits {
    /// `[tokens · top_k]`: the experts of each token, ascending.
    #[cfg_attr(not(test), allow(dead_code))]
    picked: *const c_void,
    /// `[tokens · top_k]`: what each counts.
    weights: *const c_void,
    /// `[experts + 1]`: where those of an expert begin in `list`.
    offsets: *const c_void,
    /// `[tokens · top_k]`: their numbers, by expert.
    list: *const c_void,
}

/// A product of one step: what is read, and how.
struct Part<'a, M> {
    linears: Vec<&'a Linear<Weight<M>, M>>,
    x: *const c_void,
    /// Visits that read the same row.
    per_row: usize,
    epilogue: Ending,
    out: *mut c_void,
    out_width: usize,
    out_dtype: c_int,
}

fn routing_of(spec: &RoutingSpec) -> Routing {
    Routing {
        experts: spec.experts as c_int,
        top_k: spec.top_k as c_int,
        score: match spec.score {
            RouterScore::Softmax => 0,
            RouterScore::TopKSoftmax => 1,
            RouterScore::Sigmoid => 2,
        },
        normalizes: c_int::from(spec.normalize.is_some()),
        epsilon: spec.normalize.map_or(0.0, |normalize| normalize.epsilon),
        least: spec.normalize.map_or(0.0, |normalize| normalize.least),
        scale: spec.scale,
        groups: spec.groups.map_or(0, |groups| groups.count as c_int),
        keep: spec.groups.map_or(0, |groups| groups.keep as c_int),
        best: spec.groups.map_or(0, |groups| groups.best as c_int),
    }
}

impl<D: Device> Cuda<D> {
    fn route(&mut self, router: &Buffer<D::Memory>, spec: &RoutingSpec, choice_bias: Option<&D::Memory>) -> Result<Visits> {
        if router.width != spec.experts || spec.top_k > spec.experts {
            return Err(Error::Msg(format!("rows of {} logits for {spec:?}", router.width)));
        }
        let (t, count) = (router.rows as c_int, router.rows * spec.top_k);
        let mut ints = |which, count: usize| self.scratch(which, count * size_of::<c_int>());
        let (picked, counts) = (ints(Use::Picked, count)?, ints(Use::Counts, spec.experts)?);
        let (weights, offsets) = (ints(Use::ExpertWeights, count)?, ints(Use::Offsets, spec.experts + 1)?);
        let list = ints(Use::Visits, count)?;
        let (dtype, logits, bias, routing) = (self.dtype.code(), at(&router.memory), at_or_null(choice_bias), routing_of(spec));
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.launch(|functions, stream| unsafe {
            (functions.route)(stream, dtype, logits, bias, &routing, picked, weights, counts, offsets, list, t)
        })?;
        Ok(Visits { picked, weights, offsets, list })
    }

    /// For tests: `[tokens · top_k]`.
    #[cfg(test)]
    pub fn picked_experts(&mut self, router: &Buffer<D::Memory>, spec: &RoutingSpec, choice_bias: Option<&D::Memory>) -> Result<Vec<u32>> {
        let visits = self.route(router, spec, choice_bias)?;
        // SAFETY: the emulator's memory is the host's.
        Ok(unsafe { std::slice::from_raw_parts(visits.picked.cast(), router.rows * spec.top_k) }.to_vec())
    }

    fn product_of_experts(&mut self, visits: &Visits, tokens: usize, part: &Part<'_, D::Memory>) -> Result<()> {
        let matrices: Vec<_> = part.linears.iter().map(|linear| linear.weight.matrix()).collect();
        let biases: Vec<_> = part.linears.iter().map(|linear| at_or_null(linear.bias.as_ref())).collect();
        let Some(first) = part.linears.first() else { return Err(Error::Msg("a layer without experts".into())) };
        let key = matrices[0].values as usize;
        let of_experts = self.table(key, bytes_of(&matrices), c"matrices")?.0;
        let biases = self.table(key + 1, bytes_of(&biases), c"biases")?.0;
        let product = Product {
            x: part.x,
            w: first.weight.matrix(),
            of_experts,
            biases,
            bias: NULL,
            rows: Rows {
                visits: visits.list,
                offsets: visits.offsets,
                count: tokens as c_int,
                per_row: part.per_row as c_int,
                x_stride: first.weight.k as c_int,
                out_stride: part.out_width as c_int,
                x_step: 0,
                out_step: 0,
            },
            epilogue: part.epilogue,
            out: part.out,
            experts: matrices.len() as c_int,
        };
        self.product(&product, first.weight.form(), part.out_dtype)
    }

    /// `out = (adds ? out : 0) + factor · Σ weight · expert(x)`
    pub(super) fn routed(
        &mut self,
        x: &Buffer<D::Memory>,
        router: &Buffer<D::Memory>,
        experts: &Experts<Weight<D::Memory>, D::Memory>,
        factor: f32,
        adds: bool,
        out: &Buffer<D::Memory>,
    ) -> Result<()> {
        let (t, top_k) = (x.rows, experts.routing.top_k);
        let visits = self.route(router, &experts.routing, experts.choice_bias.as_ref())?;
        let intermediate = experts.experts.first().map_or(0, |expert| expert.down.weight.k);
        let gated = self.scratch(Use::Gated, t * top_k * intermediate * self.dtype.bytes())?;
        let results = self.scratch(Use::ExpertResults, t * top_k * x.width * size_of::<f32>())?;
        let gate_up = Part {
            linears: experts.experts.iter().map(|expert| &expert.gate_up).collect(),
            x: at(&x.memory),
            per_row: top_k,
            epilogue: ending(Epilogue::Gated(experts.activation)),
            out: gated,
            out_width: intermediate,
            out_dtype: self.dtype.code(),
        };
        self.product_of_experts(&visits, t, &gate_up)?;
        let down = Part {
            linears: experts.experts.iter().map(|expert| &expert.down).collect(),
            x: gated,
            per_row: 1,
            epilogue: ending(Epilogue::Store),
            out: results,
            out_width: x.width,
            out_dtype: F32,
        };
        self.product_of_experts(&visits, t, &down)?;
        let (dtype, out, adds) = (self.dtype.code(), out.memory.address(), c_int::from(adds));
        let (t, top_k, width) = (t as c_int, top_k as c_int, x.width as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.launch(|functions, stream| unsafe {
            (functions.combine)(stream, dtype, results, visits.weights, out, t, top_k, width, factor, adds)
        })
    }
}
