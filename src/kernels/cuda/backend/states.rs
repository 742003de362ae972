//! States in slots: what a step does to them, and the operations that go on from them.

use std::ffi::c_int;

use candle_core::{Error, Result};

use super::step::Step;
use super::{Buffer, Cuda, at, at_or_null};
use crate::cuda::device::{Allocation, Device, Input, Place};
use crate::cuda::functions::{Conv, Delta, DeltaArguments, States};
use crate::{Batch, CausalConv, ConvKind, DeltaSpec, GatedDelta};

/// Rows of at most so many tokens: a block had better keep a whole head of the delta rule.
const FEW_TOKENS: usize = 16;

/// States of one layer `[slots, width]`, in f32.
#[derive(Debug)]
pub struct State<M> {
    pub memory: M,
    pub slots: usize,
    pub width: usize,
}

/// What a step does to states; see `states.h`. All empty for models without states.
#[derive(Default)]
pub struct ListsOfStates {
    begins: Vec<u32>,
    slots: Vec<u32>,
    goes_on: Vec<u32>,
    save_begins: Vec<u32>,
    saves: Vec<u32>,
    copies: Vec<u32>,
}

/// Where they lie on the device.
pub struct PlacesOfStates {
    pub begins: Place,
    pub slots: Place,
    pub goes_on: Place,
    pub save_begins: Place,
    pub saves: Place,
    pub copies: Place,
}

impl ListsOfStates {
    pub fn read(&mut self, batch: &Batch<'_>) {
        let Self { begins, slots, goes_on, save_begins, saves, copies } = self;
        [&mut *begins, slots, goes_on, save_begins, saves, copies].into_iter().for_each(Vec::clear);
        let (rows, states) = (batch.rows, batch.states);
        if states.slots.len() != rows.len() {
            return;
        }
        for (index, row) in rows.iter().enumerate() {
            begins.push(row.start as u32);
            save_begins.push(saves.len() as u32 / 2);
            saves.extend(states.kept(row).iter().flat_map(|save| [save.token, save.slot]));
            goes_on.push(u32::from(states.start(index, row).is_some()));
        }
        begins.push(batch.tokens.len() as u32);
        save_begins.push(saves.len() as u32 / 2);
        slots.extend_from_slice(&states.slots);
        copies.extend(states.copies.iter().flat_map(|(from, to)| [*from, *to]));
    }

    /// In the order of [`PlacesOfStates`]. A step of `most` tokens has as many rows at most, keeps a state of each, and copies one for each.
    pub fn inputs(&self, most: usize) -> [Input<'_>; 6] {
        let input = |name, values, most| Input { name, values, most };
        [
            input(c"where rows begin", &self.begins, most + 1),
            input(c"slots of states", &self.slots, most),
            input(c"rows that go on", &self.goes_on, most),
            input(c"where states that are kept begin", &self.save_begins, most + 1),
            input(c"states that are kept", &self.saves, 2 * most),
            input(c"copies of states", &self.copies, 2 * most),
        ]
    }
}

impl<D: Device> Cuda<D> {
    pub(super) fn empty_state(&self, slots: usize, width: usize) -> Result<State<D::Memory>> {
        let memory = self.noted(self.device.allocate(slots * width * size_of::<f32>(), c"states"))?;
        self.noted(self.device.zero(&memory))?;
        Ok(State { memory, slots, width })
    }

    /// The step's, whose slots are checked to be among those of `state`; and the tokens of its longest row.
    fn states(&self, state: &State<D::Memory>) -> Result<(States, usize)> {
        let Step { rows, states, places, .. } = self.step()?;
        states.check(rows.len(), state.slots)?;
        let PlacesOfStates { begins, slots, goes_on, save_begins, saves, .. } = places.states;
        let states = States { begins: begins.0, slots: slots.0, goes_on: goes_on.0, save_begins: save_begins.0, saves: saves.0 };
        Ok((states, rows.iter().map(|row| row.len).max().unwrap_or(0)))
    }

    pub(super) fn copy_slots(&mut self, state: &mut State<D::Memory>) -> Result<()> {
        self.states(state)?;
        let step = self.step()?;
        let (count, copies, values) = (step.states.copies.len(), step.places.states.copies.0, state.memory.address());
        if count == 0 {
            return Ok(());
        }
        // SAFETY: slots were checked.
        self.launch(|functions, stream| unsafe { (functions.copy_states)(stream, values, copies, count as c_int, state.width as c_int) })
    }

    pub(super) fn convolve(
        &mut self,
        x: &Buffer<D::Memory>,
        conv: &CausalConv<D::Memory>,
        state: &mut State<D::Memory>,
        out: &mut Buffer<D::Memory>,
    ) -> Result<()> {
        let (spec, t) = (conv.spec, self.step()?.tokens);
        if (x.rows, x.width, state.width) != (t, spec.input_width(), spec.state_width()) || spec.kernel < 2 {
            return Err(Error::Msg(format!("[{}, {}] and states of {} for {t} tokens of {spec:?}", x.rows, x.width, state.width)));
        }
        self.resize(out, t, spec.channels)?;
        let (states, longest) = self.states(state)?;
        let conv = Conv {
            channels: spec.channels as c_int,
            kernel: spec.kernel as c_int,
            gated: c_int::from(spec.kind == ConvKind::Gated),
            weight: at(&conv.weight),
            bias: at_or_null(conv.bias.as_ref()),
        };
        let (dtype, x, values, to) = (self.dtype.code(), at(&x.memory), state.memory.address(), out.memory.address());
        let (rows, longest) = (self.step()?.rows.len() as c_int, longest as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.launch(|functions, stream| unsafe { (functions.causal_conv)(stream, dtype, x, &conv, &states, values, to, rows, longest) })
    }

    /// `rows`: queries, keys and values, gates, and what results are multiplied with.
    pub(super) fn delta_rule(
        &mut self,
        rows: [&Buffer<D::Memory>; 3],
        delta: &GatedDelta<D::Memory>,
        state: &mut State<D::Memory>,
        out: &mut Buffer<D::Memory>,
    ) -> Result<()> {
        let (spec, t) = (delta.spec, self.step()?.tokens);
        let widths = [spec.qkv_width(), 2 * spec.value_heads, spec.value_width()];
        let is_whole = rows.map(|rows| rows.rows) == [t; 3] && rows.map(|rows| rows.width) == widths && state.width == spec.state_width();
        if !is_whole || spec.key_dim > DeltaSpec::MOST_KEY_DIM {
            let given = rows.map(|rows| (rows.rows, rows.width));
            return Err(Error::Msg(format!("rows {given:?} and states of {} for {t} tokens of {spec:?}", state.width)));
        }
        self.resize(out, t, spec.value_width())?;
        let (states, longest) = self.states(state)?;
        let on_device = Delta {
            key_heads: spec.key_heads as c_int,
            value_heads: spec.value_heads as c_int,
            key_dim: spec.key_dim as c_int,
            value_dim: spec.value_dim as c_int,
            epsilon: spec.eps,
            decay: at(&delta.decay),
            decay_bias: at(&delta.decay_bias),
            norm: at(&delta.norm),
        };
        let [qkv, gates, z] = rows.map(|rows| at(&rows.memory));
        let (state, out, count) = (state.memory.address(), out.memory.address(), self.step()?.rows.len() as c_int);
        let arguments = DeltaArguments { qkv, gates, z, state, out, rows: count, tokens: t as c_int };
        let (dtype, few) = (self.dtype.code(), c_int::from(longest <= FEW_TOKENS));
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.launch(|functions, stream| unsafe { (functions.gated_delta)(stream, dtype, &arguments, &on_device, &states, few) })
    }
}
