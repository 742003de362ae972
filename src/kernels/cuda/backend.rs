//! The kernels behind [`Backend`], so that what proves the CPU's operations proves these. Its memory is the emulator's.

use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;

use candle_core::{Error, Result};

use super::emulator::{Emulator, Memory};
use super::functions::{Attention, Ending, Functions, NULL, NormOf, Preparation, Product, Rows};
use crate::{
    Activation, AttentionSpec, AttentionWeights, Backend, Batch, BatchRow, CausalConv, Columns, Epilogue, Experts, GatedDelta, HeadColumns,
    KvShape, LatentSpec, Linear, MatrixSource, Norm, NormExtent, NormKind, Pairing, RowVisitor, TableRow, WeightFormat,
};

mod experts;
mod latent;
mod states;
mod weights;

pub use states::State;
use states::StatesOfStep;
pub use weights::{Dtype, Weight};

/// Which kernels are taken where several would do, and how finely contexts are cut.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    pub splits: usize,
    /// More rows than this go to tensor cores.
    pub gemv_rows: usize,
    pub large_tiles: bool,
    /// Attention by tensor cores where it can be.
    pub attention_tiles: bool,
}

impl Default for Choices {
    fn default() -> Self {
        Self { splits: 1, gemv_rows: 8, large_tiles: false, attention_tiles: true }
    }
}

#[derive(Debug)]
pub struct Buffer {
    pub memory: Memory,
    pub rows: usize,
    pub width: usize,
}

#[derive(Debug)]
pub struct KvCache {
    pub keys: Memory,
    pub values: Memory,
    pub shape: KvShape,
}

/// The step at hand, on the device.
struct Step {
    tokens: Vec<u32>,
    ids: Memory,
    positions: Memory,
    highest_position: u32,
    /// None: of all tokens the first type.
    types: Option<Memory>,
    highest_type: u32,
    slots: Memory,
    highest_slot: u32,
    sequences: Memory,
    visible: Memory,
    contexts: Memory,
    tables: Memory,
    max_blocks: usize,
    rows: Vec<BatchRow>,
    states: Option<StatesOfStep>,
    /// Of each rope table: cosines, sines, pairs.
    angles: Vec<(Memory, Memory, usize)>,
}

pub struct Cuda {
    pub emulator: &'static Emulator,
    pub dtype: Dtype,
    pub choices: Choices,
    step: Option<Step>,
}

const NO_NORM: NormOf = NormOf { weight: NULL, bias: NULL, epsilon: 0.0, is_layer: 0 };
const NO_STREAM: *mut c_void = std::ptr::null_mut();

fn norm_of(norm: &Norm<Memory>) -> NormOf {
    let bias = norm.bias.as_ref().map_or(NULL, Memory::ptr);
    NormOf { weight: norm.weight.ptr(), bias, epsilon: norm.eps, is_layer: c_int::from(norm.kind == NormKind::Layer) }
}

/// The address of a memory, for reading.
fn at(memory: &Memory) -> *const c_void {
    memory.ptr()
}

fn ending(epilogue: Epilogue) -> Ending {
    let code = |activation: Activation| match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Relu2 => 2,
        Activation::ClampedSwiglu => 3,
        Activation::Gelu => 4,
        Activation::Tanh => 5,
    };
    match epilogue {
        Epilogue::Store => Ending { ending: 0, activation: 0, factor: 1.0 },
        Epilogue::Add(factor) => Ending { ending: 1, activation: 0, factor },
        Epilogue::Activate(activation) => Ending { ending: 2, activation: code(activation), factor: 1.0 },
        Epilogue::Gated(activation) => Ending { ending: 3, activation: code(activation), factor: 1.0 },
    }
}

impl Cuda {
    pub fn new(emulator: &'static Emulator, dtype: Dtype) -> Self {
        Self { emulator, dtype, choices: Choices::default(), step: None }
    }

    fn memory(&self, numbers: usize, name: &CStr) -> Memory {
        Memory::new(self.emulator, numbers * self.dtype.bytes(), name)
    }

    fn launch(&self, call: impl FnOnce(&Functions, *mut c_void) -> c_int) -> Result<()> {
        self.emulator.check(call(&self.emulator.functions, NO_STREAM))
    }

    fn step(&self) -> Result<&Step> {
        self.step.as_ref().ok_or_else(|| Error::Msg("no step has begun".into()))
    }

    fn resize(&self, buffer: &mut Buffer, rows: usize, width: usize) {
        // Of exactly these numbers and anew: what is beyond them is guarded, and what no kernel writes is NaN.
        *buffer = Buffer { memory: self.memory(rows * width, c"rows"), rows, width };
    }

    /// One product, by the kernel for so many rows.
    pub fn product(&self, product: &Product, form: c_int, out_dtype: c_int) -> Result<()> {
        let functions = &self.emulator.functions;
        let rows = &product.rows;
        // Tensor cores read whole pieces of 16 bytes.
        let aligned = rows.x_stride % 8 == 0 && rows.x_step % 8 == 0 && (product.x as usize).is_multiple_of(16);
        let tiles = aligned && self.dtype == Dtype::Bf16 && form != 0 && (form != 1 || product.w.k % 8 == 0);
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.emulator.check(unsafe {
            if tiles && product.rows.count as usize > self.choices.gemv_rows {
                (functions.matmul)(NO_STREAM, out_dtype, form, c_int::from(self.choices.large_tiles), product)
            } else {
                (functions.gemv)(NO_STREAM, self.dtype.code(), out_dtype, form, product)
            }
        })
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        sinks: Option<&Memory>,
        q_stride: usize,
        parts: &Memory,
        shape: KvShape,
    ) -> Result<Attention> {
        let step = self.step()?;
        Ok(Attention {
            heads: spec.heads as c_int,
            kv_heads: spec.kv_heads as c_int,
            head_dim: spec.head_dim as c_int,
            q_stride: q_stride as c_int,
            scale: spec.scale,
            soft_cap: spec.soft_cap.unwrap_or(0.0),
            causal: c_int::from(spec.causal),
            // Twice as much as any context: a sum with it must not overflow.
            window: spec.window.map_or(0, |window| window.min(1 << 30) as c_int),
            sinks: sinks.map_or(NULL, Memory::ptr),
            block_size: shape.block_size as c_int,
            max_blocks: step.max_blocks as c_int,
            tables: step.tables.ptr(),
            sequences: step.sequences.ptr(),
            visible: step.visible.ptr(),
            contexts: step.contexts.ptr(),
            splits: self.choices.splits as c_int,
            parts: parts.ptr_mut(),
        })
    }

    /// Attention on tensor cores: rows of many tokens in tiles of 64, the others in tiles of 16 where a group fits.
    fn attend_tiles(&self, qkv: &Buffer, group: usize, a: &Attention, cache: &KvCache, out: &Buffer) -> Result<()> {
        let rows = &self.step()?.rows;
        let functions = &self.emulator.functions;
        for few in [true, false] {
            let per_tile = if few { 16 } else { 64 } / group;
            let is_few = |row: &BatchRow| group <= 16 && row.len <= 16 / group;
            let tiles: Vec<[i32; 2]> = rows
                .iter()
                .filter(|row| is_few(row) == few)
                .flat_map(|row| {
                    (0..row.len).step_by(per_tile.max(1)).map(move |at| [(row.start + at) as i32, per_tile.min(row.len - at) as i32])
                })
                .collect();
            if tiles.is_empty() {
                continue;
            }
            let memory = Memory::of(self.emulator, &tiles, c"tiles");
            // SAFETY: pointers and sizes of memory that outlives the launch.
            self.emulator.check(unsafe {
                let (q, keys, values) = (qkv.memory.ptr(), cache.keys.ptr(), cache.values.ptr());
                (functions.attend_tiles)(
                    NO_STREAM,
                    q,
                    keys,
                    values,
                    a,
                    memory.ptr(),
                    tiles.len() as c_int,
                    c_int::from(few),
                    out.memory.ptr_mut(),
                )
            })?;
        }
        Ok(())
    }
}

impl Backend for Cuda {
    type Buffer = Buffer;
    type Weight = Weight;
    type Vector = Memory;
    type KvCache = KvCache;
    type State = State;

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { memory: self.memory(rows * width, c"rows"), rows, width })
    }

    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, columns: Columns) -> Result<Weight> {
        let plain = if self.dtype == Dtype::F32 && !source.is_bf16() { WeightFormat::F32 } else { WeightFormat::Bf16 };
        Weight::load(self.emulator, source, format.unwrap_or(plain), columns)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Memory> {
        Ok(Memory::of(self.emulator, &values, c"vector"))
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache> {
        let numbers = shape.blocks * shape.block_size * shape.kv_heads * shape.head_dim;
        Ok(KvCache { keys: self.memory(numbers, c"keys"), values: self.memory(numbers, c"values"), shape })
    }

    fn state(&self, slots: usize, width: usize) -> Result<State> {
        Ok(State { memory: Memory::of(self.emulator, &vec![0f32; slots * width], c"states"), slots, width })
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<()> {
        let max_blocks = batch.rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
        let (mut tables, mut sequences, mut visible) = (vec![], vec![], vec![]);
        for (index, row) in batch.rows.iter().enumerate() {
            tables.extend((0..max_blocks).map(|i| *row.blocks.get(i).unwrap_or(&u32::MAX)));
            sequences.extend(std::iter::repeat_n(index as u32, row.len));
            visible.extend((row.context - row.len + 1..=row.context).map(|seen| seen as u32));
        }
        let of = |values: &[u32], name| Memory::of(self.emulator, values, name);
        let highest = |values: &[u32]| values.iter().copied().max().unwrap_or(0);
        let positions = of(batch.positions, c"positions");
        let t = batch.tokens.len();
        let mut angles = Vec::new();
        for table in batch.ropes {
            let pairs = table.frequencies.len();
            let frequencies = Memory::of(self.emulator, &table.frequencies, c"frequencies");
            let (cosines, sines) =
                (Memory::new(self.emulator, t * pairs * 4, c"cosines"), Memory::new(self.emulator, t * pairs * 4, c"sines"));
            // SAFETY: [t, pairs] each, which outlive the launch.
            self.emulator.check(unsafe {
                let (cos, sin) = (cosines.ptr_mut(), sines.ptr_mut());
                (self.emulator.functions.angles)(
                    NO_STREAM,
                    positions.ptr(),
                    frequencies.ptr(),
                    table.factor,
                    cos,
                    sin,
                    t as c_int,
                    pairs as c_int,
                )
            })?;
            angles.push((cosines, sines, pairs));
        }
        self.step = Some(Step {
            tokens: batch.tokens.to_vec(),
            ids: of(batch.tokens, c"tokens"),
            positions,
            highest_position: highest(batch.positions),
            types: (!batch.types.is_empty()).then(|| of(batch.types, c"types")),
            highest_type: highest(batch.types),
            slots: of(batch.slots, c"slots"),
            highest_slot: highest(batch.slots),
            sequences: of(&sequences, c"sequences"),
            visible: of(&visible, c"visible"),
            contexts: of(&batch.rows.iter().map(|row| row.context as u32).collect::<Vec<_>>(), c"contexts"),
            tables: of(&tables, c"tables"),
            max_blocks,
            rows: batch.rows.to_vec(),
            states: StatesOfStep::of(self.emulator, batch),
            angles,
        });
        Ok(())
    }

    fn end(&mut self) {
        self.step = None;
    }

    fn embed(&mut self, table: &Weight, scale: f32, out: &mut Buffer) -> Result<()> {
        let step = self.step()?;
        if let Some(id) = step.tokens.iter().find(|id| **id as usize >= table.n) {
            return Err(Error::Msg(format!("token id {id} is outside the vocabulary of {}", table.n)));
        }
        let count = step.tokens.len();
        self.resize(out, count, table.k);
        // SAFETY: ids were checked; `out` holds as many rows.
        self.emulator.check(unsafe {
            let (ids, out) = (self.step()?.ids.ptr(), out.memory.ptr_mut());
            (self.emulator.functions.embed)(NO_STREAM, self.dtype.code(), table.form(), table.matrix(), ids, scale, out, count as c_int)
        })
    }

    fn embed_add(&mut self, table: &Weight, row: TableRow, out: &mut Buffer) -> Result<()> {
        let step = self.step()?;
        let (rows, highest, first) = match row {
            TableRow::Position(first) => (step.positions.ptr(), step.highest_position, first),
            TableRow::Type => (step.types.as_ref().map_or(NULL, Memory::ptr), step.highest_type, 0),
        };
        if first + highest as usize >= table.n {
            return Err(Error::Msg(format!("{row:?} of a token is row {} of a table of {}", first + highest as usize, table.n)));
        }
        let (count, to) = (step.tokens.len(), out.memory.ptr_mut());
        if (out.rows, out.width) != (count, table.k) {
            return Err(Error::Msg(format!("rows of {} numbers cannot be added to [{}, {}]", table.k, out.rows, out.width)));
        }
        let (dtype, first, count) = (self.dtype.code(), first as c_int, count as c_int);
        // SAFETY: rows of the table were checked; `out` holds one for each token.
        self.emulator
            .check(unsafe { (self.emulator.functions.embed_add)(NO_STREAM, dtype, table.form(), table.matrix(), rows, first, to, count) })
    }

    fn norm(&mut self, x: &Buffer, norm: &Norm<Memory>, out: &mut Buffer) -> Result<()> {
        self.resize(out, x.rows, x.width);
        self.norms(x, NO_NORM, None, 0.0, norm_of(norm), Some(out))
    }

    fn norm_add(&mut self, x: &Buffer, norm: &Norm<Memory>, factor: f32, out: &mut Buffer) -> Result<()> {
        self.norms(x, norm_of(norm), Some(out), factor, NO_NORM, None)
    }

    fn linear(&mut self, x: &Buffer, linear: &Linear<Weight, Memory>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let w = &linear.weight;
        let is_gated = matches!(epilogue, Epilogue::Gated(_));
        if x.width != w.k || is_gated != (w.columns == Columns::Gated) {
            return Err(Error::Msg(format!("rows of {} numbers for a matrix [{}, {}] that ends in {epilogue:?}", x.width, w.n, w.k)));
        }
        let width = if is_gated { w.n / 2 } else { w.n };
        if !matches!(epilogue, Epilogue::Add(_)) {
            self.resize(out, x.rows, width);
        }
        if (out.rows, out.width) != (x.rows, width) {
            return Err(Error::Msg(format!("[{}, {width}] cannot be added to [{}, {}]", x.rows, out.rows, out.width)));
        }
        let product = Product {
            x: x.memory.ptr(),
            w: w.matrix(),
            of_experts: NULL,
            biases: NULL,
            bias: linear.bias.as_ref().map_or(NULL, Memory::ptr),
            rows: Rows::dense(x.rows, w.k, width),
            epilogue: ending(epilogue),
            out: out.memory.ptr_mut(),
            experts: 0,
        };
        self.product(&product, w.form(), self.dtype.code())
    }

    fn rope_and_store(
        &mut self,
        qkv: &mut Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Memory>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let step = self.step()?;
        if step.highest_slot as usize >= cache.shape.blocks * cache.shape.block_size {
            return Err(Error::Msg(format!("slot {} is outside the KV cache", step.highest_slot)));
        }
        let angles = attention.rope.map(|rope| &step.angles[rope.table]);
        let preparation = Preparation {
            heads: attention.heads as c_int,
            kv_heads: attention.kv_heads as c_int,
            head_dim: attention.head_dim as c_int,
            pairs: angles.map_or(0, |(_, _, pairs)| *pairs as c_int),
            interleaved: c_int::from(attention.rope.is_some_and(|rope| rope.pairing == Pairing::Interleaved)),
            extent: attention.qk_norm.map_or(0, |norm| if norm.extent == NormExtent::Head { 1 } else { 2 }),
            after_rope: c_int::from(attention.qk_norm.is_some_and(|norm| norm.after_rope)),
            norm_epsilon: attention.qk_norm.map_or(0.0, |norm| norm.eps),
            norms_values: c_int::from(attention.value_norm.is_some()),
            value_epsilon: attention.value_norm.unwrap_or(0.0),
            growth: attention.query_growth.map_or(0.0, |growth| growth.beta),
            growth_length: attention.query_growth.map_or(1, |growth| growth.length as c_int),
        };
        let of = |memory: Option<&Memory>| memory.map_or(NULL, Memory::ptr);
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.emulator.check(unsafe {
            (self.emulator.functions.rope_and_store)(
                NO_STREAM,
                self.dtype.code(),
                qkv.memory.ptr_mut(),
                &preparation,
                of(weights.q_norm.as_ref()),
                of(weights.k_norm.as_ref()),
                of(angles.map(|(cosines, ..)| cosines)),
                of(angles.map(|(_, sines, _)| sines)),
                step.positions.ptr(),
                step.slots.ptr(),
                cache.keys.ptr_mut(),
                cache.values.ptr_mut(),
                step.tokens.len() as c_int,
            )
        })
    }

    fn attend(
        &mut self,
        qkv: &Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Memory>,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<()> {
        let (t, splits) = (qkv.rows, self.choices.splits);
        self.resize(out, t, attention.q_width());
        let parts =
            Memory::new(self.emulator, if splits > 1 { t * attention.heads * splits * (attention.head_dim + 2) * 4 } else { 0 }, c"parts");
        let a = self.attention(attention, weights.sinks.as_ref(), qkv.width, &parts, cache.shape)?;
        let group = attention.heads / attention.kv_heads;
        let functions = &self.emulator.functions;
        let (dtype, q, keys, values, to) =
            (self.dtype.code(), qkv.memory.ptr(), cache.keys.ptr(), cache.values.ptr(), out.memory.ptr_mut());
        if self.choices.attention_tiles && self.dtype == Dtype::Bf16 && group <= 64 && [64, 128, 256].contains(&attention.head_dim) {
            self.attend_tiles(qkv, group, &a, cache, out)?;
            // SAFETY: as many parts as there are.
            return if splits == 1 {
                Ok(())
            } else {
                self.emulator.check(unsafe { (functions.attend_merge)(NO_STREAM, dtype, &a, to, t as c_int) })
            };
        }
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.emulator.check(unsafe { (functions.attend)(NO_STREAM, dtype, q, keys, values, &a, to, t as c_int) })
    }

    fn copy_states(&mut self, state: &mut State) -> Result<()> {
        self.copy_slots(state)
    }

    fn causal_conv(&mut self, x: &Buffer, conv: &CausalConv<Memory>, state: &mut State, out: &mut Buffer) -> Result<()> {
        self.convolve(x, conv, state, out)
    }

    fn gated_delta(
        &mut self,
        qkv: &mut Buffer,
        gates: &mut Buffer,
        z: &Buffer,
        delta: &GatedDelta<Memory>,
        state: &mut State,
        out: &mut Buffer,
    ) -> Result<()> {
        self.delta_rule([qkv, gates, z], delta, state, out)
    }

    fn linear_heads(
        &mut self,
        x: &Buffer,
        columns: HeadColumns,
        weights: &[Linear<Weight, Memory>],
        _scratch: &mut [Buffer; 2],
        out: &mut Buffer,
    ) -> Result<()> {
        self.products_of_heads(x, columns, weights, out)
    }

    fn latent_rows(
        &mut self,
        q: &Buffer,
        absorbed: &Buffer,
        latent: &Buffer,
        spec: &LatentSpec,
        norm: &Memory,
        out: &mut Buffer,
    ) -> Result<()> {
        self.rows_of_latent([q, absorbed, latent], spec, norm, out)
    }

    fn experts(
        &mut self,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts<Weight, Memory>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) -> Result<()> {
        let (factor, adds) = match epilogue {
            Epilogue::Add(factor) => (factor, true),
            Epilogue::Store => (1.0, false),
            other => return Err(Error::Msg(format!("experts have no epilogue {other:?}"))),
        };
        if !adds {
            self.resize(out, x.rows, x.width);
        }
        self.routed(x, router, experts, factor, adds, out)
    }

    fn copy(&mut self, x: &Buffer, out: &mut Buffer) -> Result<()> {
        self.resize(out, x.rows, x.width);
        self.picked(x, NULL, out)
    }

    fn pick(&mut self, x: &Buffer, rows: &[usize], out: &mut Buffer) -> Result<()> {
        if let Some(row) = rows.iter().find(|row| **row >= x.rows) {
            return Err(Error::Msg(format!("row {row} of {}", x.rows)));
        }
        self.resize(out, rows.len(), x.width);
        let rows = Memory::of(self.emulator, &rows.iter().map(|row| *row as u32).collect::<Vec<_>>(), c"picked rows");
        self.picked(x, rows.ptr(), out)
    }

    fn mean(&mut self, x: &Buffer, spans: &[Range<usize>], out: &mut Buffer) -> Result<()> {
        if let Some(span) = spans.iter().find(|span| span.is_empty() || span.end > x.rows) {
            return Err(Error::Msg(format!("the mean of rows {span:?} of {}", x.rows)));
        }
        self.resize(out, spans.len(), x.width);
        let ends: Vec<[u32; 2]> = spans.iter().map(|span| [span.start as u32, span.end as u32]).collect();
        let ends = Memory::of(self.emulator, &ends, c"spans");
        let (count, width) = (spans.len() as c_int, x.width as c_int);
        // SAFETY: spans were checked; `out` holds a row for each.
        self.emulator.check(unsafe {
            (self.emulator.functions.mean)(NO_STREAM, self.dtype.code(), x.memory.ptr(), ends.ptr(), out.memory.ptr_mut(), count, width)
        })
    }

    fn scale_and_cap(&mut self, x: &mut Buffer, scale: f32, cap: Option<f32>) -> Result<()> {
        let (dtype, count) = (self.dtype.code(), x.rows * x.width);
        // SAFETY: as many numbers as the buffer holds.
        self.emulator.check(unsafe {
            (self.emulator.functions.scale_and_cap)(NO_STREAM, dtype, x.memory.ptr_mut(), count, scale, cap.unwrap_or(0.0))
        })
    }

    fn gate_rows(&mut self, gates: &Buffer, x: &mut Buffer) -> Result<()> {
        if gates.rows != x.rows || gates.width == 0 || !x.width.is_multiple_of(gates.width) {
            return Err(Error::Msg(format!("[{}, {}] are no gates of [{}, {}]", gates.rows, gates.width, x.rows, x.width)));
        }
        let (rows, width, part) = (x.rows as c_int, x.width as c_int, (x.width / gates.width) as c_int);
        // SAFETY: a gate for each part of each row.
        self.emulator.check(unsafe {
            (self.emulator.functions.gate_rows)(NO_STREAM, self.dtype.code(), gates.memory.ptr(), x.memory.ptr_mut(), rows, width, part)
        })
    }

    fn each_row(&mut self, x: &mut Buffer, visit: RowVisitor<'_>) -> Result<()> {
        let values = self.dtype.read(&x.memory, x.rows * x.width);
        values.chunks_exact(x.width).enumerate().for_each(|(row, values)| visit(row, &mut values.to_vec()));
        Ok(())
    }
}

impl Cuda {
    /// See `norm_rows`.
    pub fn norms(
        &self,
        x: &Buffer,
        first: NormOf,
        residual: Option<&mut Buffer>,
        factor: f32,
        second: NormOf,
        out: Option<&mut Buffer>,
    ) -> Result<()> {
        let to = |buffer: Option<&mut Buffer>| -> Result<*mut c_void> {
            match buffer {
                Some(buffer) if (buffer.rows, buffer.width) != (x.rows, x.width) => {
                    Err(Error::Msg(format!("[{}, {}] cannot be added to [{}, {}]", x.rows, x.width, buffer.rows, buffer.width)))
                }
                Some(buffer) => Ok(buffer.memory.ptr_mut()),
                None => Ok(std::ptr::null_mut()),
            }
        };
        let (residual, out) = (to(residual)?, to(out)?);
        let (dtype, rows, width) = (self.dtype.code(), x.rows as c_int, x.width as c_int);
        // SAFETY: all of one shape.
        self.emulator.check(unsafe {
            (self.emulator.functions.norm)(NO_STREAM, dtype, x.memory.ptr(), first, residual, factor, second, out, rows, width)
        })
    }

    fn picked(&self, x: &Buffer, rows: *const c_void, out: &mut Buffer) -> Result<()> {
        let (count, width) = (out.rows as c_int, out.width as c_int);
        // SAFETY: rows were checked.
        self.emulator.check(unsafe {
            (self.emulator.functions.pick)(NO_STREAM, self.dtype.code(), x.memory.ptr(), rows, out.memory.ptr_mut(), count, width)
        })
    }
}
