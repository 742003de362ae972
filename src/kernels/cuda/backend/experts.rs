//! Routed experts: where tokens go, the two products of each expert's rows, and the sum.

use std::ffi::{c_int, c_void};

use candle_core::{Error, Result};

use super::{Buffer, Cuda, NO_STREAM, Weight, ending};
use crate::cuda::emulator::Memory;
use crate::cuda::functions::{Ending, F32, NULL, Product, Routing, Rows};
use crate::{Epilogue, Experts, Linear, RouterScore, RoutingSpec};

/// Visits of tokens to experts, on the device.
struct Visits {
    /// `[tokens · top_k]`: the experts of each token, ascending.
    picked: Memory,
    /// `[tokens · top_k]`: what each counts.
    weights: Memory,
    /// `[experts + 1]`: where those of an expert begin in `list`.
    offsets: Memory,
    /// `[tokens · top_k]`: their numbers, by expert.
    list: Memory,
}

/// A product of one step: what is read, and how.
struct Part<'a> {
    linears: Vec<&'a Linear<Weight, Memory>>,
    x: *const c_void,
    /// Visits that read the same row.
    per_row: usize,
    epilogue: Ending,
    out: &'a Memory,
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

impl Cuda {
    fn route(&self, router: &Buffer, spec: &RoutingSpec, choice_bias: Option<&Memory>) -> Result<Visits> {
        let ints = |count: usize, name| Memory::new(self.emulator, count * 4, name);
        let (t, count) = (router.rows, router.rows * spec.top_k);
        let counts = ints(spec.experts, c"counts");
        let visits = Visits {
            picked: ints(count, c"picked"),
            weights: ints(count, c"weights of experts"),
            offsets: ints(spec.experts + 1, c"offsets"),
            list: ints(count, c"visits"),
        };
        let (dtype, logits, bias) = (self.dtype.code(), router.memory.ptr(), choice_bias.map_or(NULL, Memory::ptr));
        let (weights, offsets, list) = (visits.weights.ptr_mut(), visits.offsets.ptr_mut(), visits.list.ptr_mut());
        let (picked, counts, routing, t) = (visits.picked.ptr_mut(), counts.ptr_mut(), routing_of(spec), t as c_int);
        let route = self.emulator.functions.route;
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.emulator.check(unsafe { route(NO_STREAM, dtype, logits, bias, &routing, picked, weights, counts, offsets, list, t) })?;
        Ok(visits)
    }

    /// For tests: `[tokens · top_k]`.
    pub fn picked_experts(&self, router: &Buffer, spec: &RoutingSpec, choice_bias: Option<&Memory>) -> Result<Vec<u32>> {
        Ok(self.route(router, spec, choice_bias)?.picked.read(router.rows * spec.top_k))
    }

    fn product_of_experts(&self, visits: &Visits, tokens: usize, part: &Part<'_>) -> Result<()> {
        let matrices: Vec<_> = part.linears.iter().map(|linear| linear.weight.matrix()).collect();
        let biases: Vec<_> = part.linears.iter().map(|linear| linear.bias.as_ref().map_or(NULL, Memory::ptr)).collect();
        let Some(first) = part.linears.first() else { return Err(Error::Msg("a layer without experts".into())) };
        let (table, of_biases) = (Memory::of(self.emulator, &matrices, c"matrices"), Memory::of(self.emulator, &biases, c"biases"));
        let product = Product {
            x: part.x,
            w: first.weight.matrix(),
            of_experts: table.ptr(),
            biases: of_biases.ptr(),
            bias: NULL,
            rows: Rows {
                visits: visits.list.ptr(),
                offsets: visits.offsets.ptr(),
                count: tokens as c_int,
                per_row: part.per_row as c_int,
                x_stride: first.weight.k as c_int,
                out_stride: part.out_width as c_int,
                x_step: 0,
                out_step: 0,
            },
            epilogue: part.epilogue,
            out: part.out.ptr_mut(),
            experts: matrices.len() as c_int,
        };
        self.product(&product, first.weight.form(), part.out_dtype)
    }

    /// `out = (adds ? out : 0) + factor · Σ weight · expert(x)`
    pub(super) fn routed(
        &self,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts<Weight, Memory>,
        factor: f32,
        adds: bool,
        out: &Buffer,
    ) -> Result<()> {
        let (t, top_k) = (x.rows, experts.routing.top_k);
        let visits = self.route(router, &experts.routing, experts.choice_bias.as_ref())?;
        let intermediate = experts.experts.first().map_or(0, |expert| expert.down.weight.k);
        let gated = self.memory(t * top_k * intermediate, c"gated");
        let results = Memory::new(self.emulator, t * top_k * x.width * 4, c"results of experts");
        let gate_up = Part {
            linears: experts.experts.iter().map(|expert| &expert.gate_up).collect(),
            x: x.memory.ptr(),
            per_row: top_k,
            epilogue: ending(Epilogue::Gated(experts.activation)),
            out: &gated,
            out_width: intermediate,
            out_dtype: self.dtype.code(),
        };
        self.product_of_experts(&visits, t, &gate_up)?;
        let down = Part {
            linears: experts.experts.iter().map(|expert| &expert.down).collect(),
            x: gated.ptr(),
            per_row: 1,
            epilogue: ending(Epilogue::Store),
            out: &results,
            out_width: x.width,
            out_dtype: F32,
        };
        self.product_of_experts(&visits, t, &down)?;
        let (dtype, results, weights, out) = (self.dtype.code(), results.ptr(), visits.weights.ptr(), out.memory.ptr_mut());
        let (combine, t, top_k, width) = (self.emulator.functions.combine, t as c_int, top_k as c_int, x.width as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.emulator.check(unsafe { combine(NO_STREAM, dtype, results, weights, out, t, top_k, width, factor, c_int::from(adds)) })
    }
}
