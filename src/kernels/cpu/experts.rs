//! Routed experts: the tokens of each expert are gathered, go through its network together, and are added to their rows again.
//!
//! Experts are taken in ascending order, so a token's sum runs over its own experts in that order, whatever other tokens are in the step.

use candle_core::{Error, Result};

use super::matmul::{self, matmul};
use super::packed::Packed;
use super::pool::Pool;
use super::{Buffer, prefault};
use crate::{Epilogue, ExpertLimits, Experts, Linear};

/// One token's visit to one expert.
#[derive(Debug, Clone, Copy)]
struct Visit {
    expert: u32,
    token: u32,
    weight: f32,
}

/// What experts need beside their operands, made once.
#[derive(Debug, Default)]
pub struct Scratch {
    limits: Option<ExpertLimits>,
    visits: Vec<Visit>,
    /// The experts of one token.
    picked: Vec<(usize, f32)>,
    /// Rows of one expert's tokens, `[tokens, hidden]`; its results take their place.
    rows: Vec<f32>,
    /// `[tokens, intermediate]`
    gated: Vec<f32>,
}

impl Scratch {
    pub fn new(max_tokens: usize, limits: Option<ExpertLimits>) -> Self {
        let Some(most) = limits else { return Self::default() };
        Self {
            limits,
            visits: Vec::with_capacity(max_tokens * most.top_k),
            picked: Vec::with_capacity(most.top_k + 1),
            rows: vec![0.0; max_tokens * most.hidden],
            gated: vec![0.0; max_tokens * most.intermediate],
        }
    }

    /// Bytes of one that is made for this; `None`: more than can be counted.
    pub fn bytes(max_tokens: usize, limits: Option<ExpertLimits>) -> Option<usize> {
        let Some(most) = limits else { return Some(0) };
        let per_token = most.top_k * size_of::<Visit>() + 4 * (most.hidden + most.intermediate);
        max_tokens.checked_mul(per_token)?.checked_add((most.top_k + 1) * size_of::<(usize, f32)>())
    }

    /// Of what [`Scratch::bytes`] counts, the lists.
    #[cfg(test)]
    pub fn list_bytes(&self) -> usize {
        self.visits.capacity() * size_of::<Visit>() + self.picked.capacity() * size_of::<(usize, f32)>()
    }

    pub fn memory(&mut self) -> [&mut [u8]; 2] {
        [prefault::bytes_of(&mut self.rows), prefault::bytes_of(&mut self.gated)]
    }

    /// `out += factor · Σ weight · expert(x)`
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        pool: &mut Pool,
        scratch: &mut matmul::Scratch,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts<Packed, Vec<f32>>,
        factor: f32,
        out: &mut Buffer,
    ) -> Result<()> {
        let routing = &experts.routing;
        if router.width != routing.experts || router.rows != x.rows || (out.rows, out.width) != (x.rows, x.width) {
            return Err(Error::Msg(format!("router logits [{}, {}] for {} rows", router.rows, router.width, x.rows)));
        }
        self.visits.clear();
        for (token, logits) in router.values().chunks_exact(router.width).enumerate() {
            routing.route(logits, experts.choice_bias.as_deref(), &mut self.picked);
            let visit = |(expert, weight): &(usize, f32)| Visit { expert: *expert as u32, token: token as u32, weight: *weight };
            self.visits.extend(self.picked.iter().map(visit));
        }
        self.visits.sort_unstable_by_key(|visit| (visit.expert, visit.token));
        let (width, mut from) = (x.width, 0);
        while let Some(first) = self.visits.get(from) {
            let count = self.visits[from..].iter().take_while(|visit| visit.expert == first.expert).count();
            let visits = &self.visits[from..from + count];
            let expert = &experts.experts[first.expert as usize];
            let (Linear { weight: gate_up, bias: gate_bias }, Linear { weight: down, bias: down_bias }) = (&expert.gate_up, &expert.down);
            let intermediate = down.k;
            if self.limits.is_none_or(|most| width > most.hidden || intermediate > most.intermediate) {
                return Err(Error::Msg("experts larger than there is room for".into()));
            }
            let rows = &mut self.rows[..count * width];
            for (visit, row) in visits.iter().zip(rows.chunks_exact_mut(width)) {
                row.copy_from_slice(&x.values[visit.token as usize * width..][..width]);
            }
            let gated = &mut self.gated[..count * intermediate];
            matmul(pool, rows, gate_up, gate_bias.as_deref(), Epilogue::Gated(experts.activation), scratch, gated);
            matmul(pool, gated, down, down_bias.as_deref(), Epilogue::Store, scratch, rows);
            for (visit, row) in visits.iter().zip(rows.chunks_exact(width)) {
                let weight = visit.weight * factor;
                let out = &mut out.values[visit.token as usize * width..][..width];
                out.iter_mut().zip(row).for_each(|(out, row)| *out += weight * row);
            }
            from += count;
        }
        Ok(())
    }
}
