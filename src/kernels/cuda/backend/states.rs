//! States in slots: what a step does to them, and the operations that go on from them.

use std::ffi::{c_int, c_void};

use candle_core::{Error, Result};

use super::{Buffer, Cuda, at};
use crate::cuda::emulator::{Emulator, Memory};
use crate::cuda::functions::{Conv, Delta, DeltaArguments, NULL, States};
use crate::{Batch, CausalConv, ConvKind, DeltaSpec, GatedDelta, StepStates};

/// Rows of at most so many tokens: a block had better keep a whole head of the delta rule.
const FEW_TOKENS: usize = 16;

/// States of one layer `[slots, width]`, in f32.
#[derive(Debug)]
pub struct State {
    pub memory: Memory,
    pub slots: usize,
    pub width: usize,
}

/// What a step does to states, on the device.
pub struct StatesOfStep {
    rows: usize,
    longest: usize,
    given: StepStates,
    begins: Memory,
    slots: Memory,
    goes_on: Memory,
    save_begins: Memory,
    saves: Memory,
    copies: Memory,
}

impl StatesOfStep {
    /// `None`: the model has no states.
    pub fn of(emulator: &Emulator, batch: &Batch<'_>) -> Option<Self> {
        let (rows, given) = (batch.rows, batch.states);
        if given.slots.len() != rows.len() || rows.is_empty() {
            return None;
        }
        let (mut begins, mut save_begins, mut saves) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            begins.push(row.start as u32);
            save_begins.push(saves.len() as u32);
            saves.extend(given.kept(row).iter().map(|save| [save.token, save.slot]));
        }
        begins.push(batch.tokens.len() as u32);
        save_begins.push(saves.len() as u32);
        let goes_on: Vec<u32> = rows.iter().enumerate().map(|(index, row)| u32::from(given.start(index, row).is_some())).collect();
        let copies: Vec<[u32; 2]> = given.copies.iter().map(|(from, to)| [*from, *to]).collect();
        Some(Self {
            rows: rows.len(),
            longest: rows.iter().map(|row| row.len).max().unwrap_or(0),
            given: given.clone(),
            begins: Memory::of(emulator, &begins, c"where rows begin"),
            slots: Memory::of(emulator, &given.slots, c"slots of states"),
            goes_on: Memory::of(emulator, &goes_on, c"rows that go on"),
            save_begins: Memory::of(emulator, &save_begins, c"where states that are kept begin"),
            saves: Memory::of(emulator, &saves, c"states that are kept"),
            copies: Memory::of(emulator, &copies, c"copies of states"),
        })
    }

    fn states(&self) -> States {
        States {
            begins: at(&self.begins),
            slots: at(&self.slots),
            goes_on: at(&self.goes_on),
            save_begins: at(&self.save_begins),
            saves: at(&self.saves),
        }
    }
}

impl Cuda {
    /// The step's, whose slots are checked to be among those of `state`.
    fn states(&self, state: &State) -> Result<&StatesOfStep> {
        let Some(states) = &self.step()?.states else { return Err(Error::Msg("the step names no slots of states".into())) };
        states.given.check(states.rows, state.slots)?;
        Ok(states)
    }

    pub(super) fn copy_slots(&mut self, state: &mut State) -> Result<()> {
        let states = self.states(state)?;
        let (count, copies, values) = (states.given.copies.len(), at(&states.copies), state.memory.ptr_mut());
        if count == 0 {
            return Ok(());
        }
        // SAFETY: slots were checked.
        self.launch(|functions, stream| unsafe { (functions.copy_states)(stream, values, copies, count as c_int, state.width as c_int) })
    }

    pub(super) fn convolve(&mut self, x: &Buffer, conv: &CausalConv<Memory>, state: &mut State, out: &mut Buffer) -> Result<()> {
        let (spec, t) = (conv.spec, self.step()?.tokens.len());
        if (x.rows, x.width, state.width) != (t, spec.input_width(), spec.state_width()) || spec.kernel < 2 {
            return Err(Error::Msg(format!("[{}, {}] and states of {} for {t} tokens of {spec:?}", x.rows, x.width, state.width)));
        }
        self.resize(out, t, spec.channels);
        let states = self.states(state)?;
        let conv = Conv {
            channels: spec.channels as c_int,
            kernel: spec.kernel as c_int,
            gated: c_int::from(spec.kind == ConvKind::Gated),
            weight: at(&conv.weight),
            bias: conv.bias.as_ref().map_or(NULL, at),
        };
        let (dtype, x, values, to) = (self.dtype.code(), at(&x.memory), state.memory.ptr_mut(), out.memory.ptr_mut());
        let (of_step, rows, longest) = (states.states(), states.rows as c_int, states.longest as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.launch(|functions, stream| unsafe { (functions.causal_conv)(stream, dtype, x, &conv, &of_step, values, to, rows, longest) })
    }

    /// `rows`: queries, keys and values, gates, and what results are multiplied with.
    pub(super) fn delta_rule(&mut self, rows: [&Buffer; 3], delta: &GatedDelta<Memory>, state: &mut State, out: &mut Buffer) -> Result<()> {
        let (spec, t) = (delta.spec, self.step()?.tokens.len());
        let widths = [spec.qkv_width(), 2 * spec.value_heads, spec.value_width()];
        let is_whole = rows.map(|rows| rows.rows) == [t; 3] && rows.map(|rows| rows.width) == widths && state.width == spec.state_width();
        if !is_whole || spec.key_dim > DeltaSpec::MOST_KEY_DIM {
            let given = rows.map(|rows| (rows.rows, rows.width));
            return Err(Error::Msg(format!("rows {given:?} and states of {} for {t} tokens of {spec:?}", state.width)));
        }
        self.resize(out, t, spec.value_width());
        let states = self.states(state)?;
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
        let (state, out): (*mut c_void, _) = (state.memory.ptr_mut(), out.memory.ptr_mut());
        let arguments = DeltaArguments { qkv, gates, z, state, out, rows: states.rows as c_int, tokens: t as c_int };
        let (dtype, few, of_step) = (self.dtype.code(), c_int::from(states.longest <= FEW_TOKENS), states.states());
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.launch(|functions, stream| unsafe { (functions.gated_delta)(stream, dtype, &arguments, &on_device, &of_step, few) })
    }
}
