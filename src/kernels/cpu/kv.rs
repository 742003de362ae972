//! Keys and values of a layer in memory, in the type that they are held in.
//!
//! Each head of a block has its keys, and its values, in one piece. Keys lie transposed, `[d, block_size padded to 16]`, so that a vector holds
//! one component of neighbouring positions; values are `[block_size, d]`. Where a type has scales, one for each group of components of a
//! position, those lie before the numbers: `[groups, block_size padded to 16]` of keys, `[block_size, groups]` of values.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::packed::pages;
use super::simd::Simd;
use super::{Ptr, PtrMut};
use crate::{KvDtype, KvShape};

/// Positions of a block are padded to whole vectors of the widest kind.
pub(super) const PAD: usize = 16;
/// Components of a head that share a scale, where there are scales; whole vectors of every kind.
pub(super) const GROUP: usize = 32;

/// A type that numbers are held in.
pub(super) trait Element: Copy {
    /// Numbers are multiples of the scale of their group.
    const SCALED: bool = false;

    /// # Safety
    /// The processor has the features of `S`, and the pointer is valid for as many numbers as it has lanes.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;

    /// One number, without its scale.
    fn read(self) -> f32;

    /// Rounds the numbers of one group, at most [`GROUP`]; their scale. What is not finite does not become so.
    fn round(from: &[f32], to: &mut [Self]) -> bf16;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        unsafe { S::load(p) }
    }

    fn read(self) -> f32 {
        self
    }

    fn round(from: &[f32], to: &mut [f32]) -> bf16 {
        to.copy_from_slice(from);
        bf16::ONE
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S::V {
        unsafe { S::load_bf16(p) }
    }

    fn read(self) -> f32 {
        self.to_f32()
    }

    fn round(from: &[f32], to: &mut [bf16]) -> bf16 {
        to.convert_from_f32_slice(from);
        bf16::ONE
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f16) -> S::V {
        unsafe { S::load_f16(p) }
    }

    fn read(self) -> f32 {
        self.to_f32()
    }

    /// Finite numbers beyond the greatest one become that.
    fn round(from: &[f32], to: &mut [f16]) -> bf16 {
        let most = f16::MAX.to_f32();
        let mut near = [0f32; GROUP];
        for (near, x) in near.iter_mut().zip(from) {
            *near = if x.is_finite() { x.clamp(-most, most) } else { *x };
        }
        to.convert_from_f32_slice(&near[..from.len()]);
        bf16::ONE
    }
}

impl Element for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const i8) -> S::V {
        unsafe { S::load_i8(p) }
    }

    fn read(self) -> f32 {
        self.into()
    }

    fn round(from: &[f32], to: &mut [i8]) -> bf16 {
        if from.iter().any(|x| !x.is_finite()) {
            to.fill(1);
            return bf16::NAN;
        }
        let most = from.iter().fold(0f32, |most, x| most.max(x.abs()));
        // Rounded up, so that 127 of it are no less than the greatest number.
        let mut scale = bf16::from_bits(((most / 127.0).to_bits() >> 16) as u16);
        if scale.to_f32() * 127.0 < most {
            scale = bf16::from_bits(scale.to_bits() + 1);
        }
        let inverse = if most > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        for (to, x) in to.iter_mut().zip(from) {
            *to = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
        scale
    }
}

/// Keys and values of one layer.
pub struct KvCache {
    k: memmap2::MmapMut,
    v: memmap2::MmapMut,
    pub shape: KvShape,
    pub dtype: KvDtype,
}

/// Numbers from one component of a block's keys to the next.
pub(super) fn padded(shape: KvShape) -> usize {
    shape.block_size.next_multiple_of(PAD)
}

fn held(shape: KvShape) -> KvDtype {
    shape.dtype.unwrap_or(KvDtype::F32)
}

/// Scales of each position, in one head.
pub(super) fn groups(shape: KvShape) -> usize {
    if held(shape) == KvDtype::Int8 { shape.head_dim.div_ceil(GROUP) } else { 0 }
}

/// Bytes of one head of a block of so many positions.
fn head_bytes(shape: KvShape, positions: usize) -> usize {
    let size = match held(shape) {
        KvDtype::F32 => 4,
        KvDtype::F16 | KvDtype::Bf16 => 2,
        KvDtype::Int8 => 1,
    };
    (positions * (size * shape.head_dim + size_of::<bf16>() * groups(shape))).next_multiple_of(2)
}

/// Bytes of a block of one layer.
pub fn block_bytes(shape: KvShape) -> usize {
    shape.kv_heads * (head_bytes(shape, padded(shape)) + head_bytes(shape, shape.block_size))
}

impl KvCache {
    /// Zeroed; pages are taken when they are first written, or by [`super::prefault::touch`].
    pub fn new(shape: KvShape) -> std::io::Result<Self> {
        let heads = shape.blocks * shape.kv_heads;
        let of = |positions| pages(heads * head_bytes(shape, positions));
        Ok(Self { k: of(padded(shape))?, v: of(shape.block_size)?, shape, dtype: held(shape) })
    }

    /// The memory of keys and of values.
    pub fn memory(&mut self) -> [&mut [u8]; 2] {
        [&mut self.k, &mut self.v]
    }

    /// For attention, to read.
    pub(super) fn pointers(&self) -> [Plane<Ptr<u8>>; 2] {
        let plane = |memory: &memmap2::MmapMut, positions| Plane::new(Ptr(memory.as_ptr()), self.shape, positions);
        [plane(&self.k, padded(self.shape)), plane(&self.v, self.shape.block_size)]
    }

    /// For the tasks of one kernel, each to write slots of its own.
    pub(super) fn writer(&mut self) -> Writer {
        let (shape, dtype) = (self.shape, self.dtype);
        let plane = |memory: &mut memmap2::MmapMut, positions| Plane::new(PtrMut(memory.as_mut_ptr()), shape, positions);
        Writer { k: plane(&mut self.k, padded(shape)), v: plane(&mut self.v, shape.block_size), shape, dtype }
    }

    /// A key, and a value, of one slot and head, for tests.
    pub fn read(&self, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        // SAFETY: inside the cache, which holds this type.
        unsafe {
            match self.dtype {
                KvDtype::F32 => self.read_as::<f32>(slot, head),
                KvDtype::F16 => self.read_as::<f16>(slot, head),
                KvDtype::Bf16 => self.read_as::<bf16>(slot, head),
                KvDtype::Int8 => self.read_as::<i8>(slot, head),
            }
        }
    }

    unsafe fn read_as<E: Element>(&self, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let (d, block_size, padded, groups) = (self.shape.head_dim, self.shape.block_size, padded(self.shape), groups(self.shape));
        assert!(slot < self.shape.blocks * block_size && head < self.shape.kv_heads);
        let (block, at) = ((slot / block_size) as u32, slot % block_size);
        let number = |of: Numbers<E>, index: usize, scale: usize| {
            // SAFETY: as above.
            unsafe { (*of.numbers.add(index)).read() * if E::SCALED { (*of.scales.add(scale)).to_f32() } else { 1.0 } }
        };
        let [keys, values] = self.pointers().map(|plane| plane.numbers::<E>(block, head));
        let key = (0..d).map(|i| number(keys, i * padded + at, i / GROUP * padded + at)).collect();
        (key, (0..d).map(|i| number(values, at * d + i, at * groups + i / GROUP)).collect())
    }
}

/// Keys, or values, of all blocks. `P`: a pointer to bytes.
#[derive(Clone, Copy)]
pub(super) struct Plane<P> {
    base: P,
    kv_heads: usize,
    head_bytes: usize,
    /// In one head.
    scales: usize,
}

/// Numbers of one head of a block, and the scales before them.
pub(super) struct Numbers<E> {
    pub scales: *const bf16,
    pub numbers: *const E,
}

impl<E> Clone for Numbers<E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Numbers<E> {}

impl<P> Plane<P> {
    fn new(base: P, shape: KvShape, positions: usize) -> Self {
        let head_bytes = head_bytes(shape, positions);
        Self { base, kv_heads: shape.kv_heads, head_bytes, scales: positions * groups(shape) }
    }

    fn offset(&self, block: u32, head: usize) -> usize {
        (block as usize * self.kv_heads + head) * self.head_bytes
    }
}

impl Plane<Ptr<u8>> {
    /// Where a head of a block begins. The block lies in the cache.
    #[inline(always)]
    pub fn head(&self, block: u32, head: usize) -> *const u8 {
        self.base.ptr().wrapping_add(self.offset(block, head))
    }

    /// The same as numbers of the type that the cache holds.
    #[inline(always)]
    pub fn numbers<E: Element>(&self, block: u32, head: usize) -> Numbers<E> {
        let scales = self.head(block, head).cast::<bf16>();
        Numbers { scales, numbers: scales.wrapping_add(self.scales).cast() }
    }
}

/// A cache that the tasks of one kernel write, each to slots of its own.
#[derive(Clone, Copy)]
pub(super) struct Writer {
    k: Plane<PtrMut<u8>>,
    v: Plane<PtrMut<u8>>,
    shape: KvShape,
    dtype: KvDtype,
}

impl Writer {
    /// Puts keys and values of one token, each `[kv, d]`, into their slot.
    ///
    /// # Safety
    /// The slot is inside the cache, and nobody else writes it.
    pub unsafe fn store(&self, slot: usize, k: &[f32], v: &[f32]) {
        unsafe {
            match self.dtype {
                KvDtype::F32 => self.store_as::<f32>(slot, k, v),
                KvDtype::F16 => self.store_as::<f16>(slot, k, v),
                KvDtype::Bf16 => self.store_as::<bf16>(slot, k, v),
                KvDtype::Int8 => self.store_as::<i8>(slot, k, v),
            }
        }
    }

    unsafe fn store_as<E: Element + Default>(&self, slot: usize, k: &[f32], v: &[f32]) {
        let KvShape { head_dim: d, block_size, .. } = self.shape;
        let (block, at, padded, groups) = ((slot / block_size) as u32, slot % block_size, padded(self.shape), groups(self.shape));
        let mut rounded = [E::default(); GROUP];
        for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            // SAFETY: the head's scales and numbers lie in the cache, and those of this slot are the caller's alone.
            unsafe {
                let key_scales = self.k.base.ptr().add(self.k.offset(block, head)).cast::<bf16>();
                let value_scales = self.v.base.ptr().add(self.v.offset(block, head)).cast::<bf16>();
                let keys = key_scales.add(self.k.scales).cast::<E>();
                let values = value_scales.add(self.v.scales).cast::<E>();
                for (group, (k, v)) in k.chunks(GROUP).zip(v.chunks(GROUP)).enumerate() {
                    let (from, rounded) = (group * GROUP, &mut rounded[..k.len()]);
                    let scale = E::round(k, rounded);
                    for (i, key) in rounded.iter().enumerate() {
                        *keys.add((from + i) * padded + at) = *key;
                    }
                    if E::SCALED {
                        *key_scales.add(group * padded + at) = scale;
                    }
                    let scale = E::round(v, rounded);
                    std::ptr::copy_nonoverlapping(rounded.as_ptr(), values.add(at * d + from), rounded.len());
                    if E::SCALED {
                        *value_scales.add(at * groups + group) = scale;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::cpu::{attention, pool::Pool};
    use crate::testing::plain_attention;
    use crate::twin_tests::random;
    use crate::{AttentionSpec, BatchRow};

    const SHAPE: KvShape = KvShape { blocks: 3, block_size: 5, kv_heads: 2, head_dim: 40, dtype: None };

    fn stored(dtype: KvDtype, k: &[f32], v: &[f32]) -> Vec<(Vec<f32>, Vec<f32>)> {
        let mut cache = KvCache::new(KvShape { dtype: Some(dtype), ..SHAPE }).unwrap();
        // Neighbours hold something else.
        let other = vec![3.0; k.len()];
        for slot in (0..15).filter(|slot| *slot != 7).chain([7]) {
            let (k, v) = if slot == 7 { (k, v) } else { (&other[..], &other[..]) };
            unsafe { cache.writer().store(slot, k, v) };
        }
        (0..2).map(|head| cache.read(7, head)).collect()
    }

    proptest! {
        /// What is read is what was written, as near as the type comes to it, and beside it nothing changes.
        #[test]
        fn numbers_come_back(numbers in prop::collection::vec(-4.0f32..4.0, 160), size in 1e-6f32..1e4) {
            let (k, v) = numbers.split_at(80);
            let scaled = |x: &[f32]| x.iter().map(|x| x * size).collect::<Vec<_>>();
            let (k, v) = (scaled(k), scaled(v));
            for (dtype, relative, of_group) in [
                (KvDtype::F32, 0.0, 0.0), (KvDtype::F16, 2f32.powi(-11), 0.0), (KvDtype::Bf16, 2f32.powi(-8), 0.0),
                // Half a step, and a step is a 127th of the greatest number and at most 2^-7 of itself more.
                (KvDtype::Int8, 0.0, 0.5 / 127.0 * (1.0 + 2f32.powi(-7)) + 1e-6),
            ] {
                for (head, (key, value)) in stored(dtype, &k, &v).into_iter().enumerate() {
                    for (got, want) in [(key, &k), (value, &v)] {
                        let want = &want[head * 40..(head + 1) * 40];
                        for (got, want) in got.chunks(GROUP).zip(want.chunks(GROUP)) {
                            let most = want.iter().fold(0f32, |most, x| most.max(x.abs()));
                            for (got, want) in got.iter().zip(want) {
                                // Below the least normal number of f16 the steps have one size.
                                let error = want.abs() * relative + of_group * most + if dtype == KvDtype::F16 { 6e-8 } else { 0.0 };
                                prop_assert!((got - want).abs() <= error, "{dtype:?}: {got} for {want}");
                            }
                        }
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Attention over narrow numbers gives the bits of attention over the same numbers in f32, on any number of threads, in one step and alone.
        #[test]
        fn attention_reads_what_is_held(
            context in 1usize..700, len in 1usize..20, kv_heads in 1usize..3, group in 1usize..14,
            d in prop::sample::select(vec![4usize, 10, 32, 64, 72, 128]), block_size in prop::sample::select(vec![1usize, 16, 20, 32, 64]),
            dtype in prop::sample::select(vec![KvDtype::F16, KvDtype::Bf16, KvDtype::Int8]), threads in 1usize..4,
            window in prop::option::of(1usize..400), mut seed in any::<u64>(),
        ) {
            let (len, blocks) = (len.min(context), context.div_ceil(block_size));
            let spec = AttentionSpec { window, ..plain_attention(kv_heads * group, kv_heads, d) };
            let shape = KvShape { dtype: Some(dtype), ..spec.kv_shape(blocks, block_size) };
            let (mut narrow, mut wide) = (KvCache::new(shape).unwrap(), KvCache::new(KvShape { dtype: None, ..shape }).unwrap());
            for slot in 0..blocks * block_size {
                let mut numbers = || random(spec.kv_width(), &mut seed);
                unsafe { narrow.writer().store(slot, &numbers(), &numbers()) };
                let (keys, values): (Vec<_>, Vec<_>) = (0..kv_heads).map(|head| narrow.read(slot, head)).unzip();
                unsafe { wide.writer().store(slot, &keys.concat(), &values.concat()) };
            }
            let table = Arc::new((0..blocks as u32).rev().collect::<Vec<_>>());
            let q = random(len * spec.q_width(), &mut seed);
            let attended = |cache: &KvCache, threads: usize, tokens: std::ops::Range<usize>| {
                let mut pool = Pool::new(threads).unwrap();
                let row = BatchRow { start: 0, len: tokens.len(), context: context - len + tokens.end, blocks: table.clone() };
                let mut scratch = attention::Scratch::new(len, threads, &[spec], block_size);
                let (q, mut out) = (&q[tokens.start * spec.q_width()..tokens.end * spec.q_width()], vec![0.0; tokens.len() * spec.q_width()]);
                attention::paged(&mut pool, q, spec.q_width(), &spec, None, cache, &[row], &mut scratch, &mut out);
                out
            };
            let expected = attended(&wide, 1, 0..len);
            prop_assert_eq!(&attended(&narrow, threads, 0..len), &expected);
            let alone: Vec<f32> = (0..len).flat_map(|token| attended(&narrow, threads, token..token + 1)).collect();
            prop_assert_eq!(&alone, &expected);
        }
    }

    #[test]
    fn extremes() {
        let mut k = vec![0.0; 80];
        (k[0], k[1], k[40]) = (1e9, -1e30, 1e38);
        let v = vec![0.0; 80];
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            let heads = stored(dtype, &k, &v);
            assert!(heads.iter().all(|(key, value)| key.iter().chain(value).all(|x| x.is_finite())), "{dtype:?}: {heads:?}");
            assert!(heads[0].1.iter().all(|x| *x == 0.0), "{dtype:?}");
        }
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            k[3] = wrong;
            for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
                assert!(!stored(dtype, &k, &v)[0].0[3].is_finite(), "{dtype:?}: {wrong}");
            }
        }
    }

    /// A block of the shape of ERNIE-4.5-0.3B.
    #[test]
    fn a_block_takes_as_much_as_its_type() {
        let bytes = |dtype| block_bytes(KvShape { blocks: 1, block_size: 32, kv_heads: 2, head_dim: 128, dtype });
        assert_eq!(bytes(None), 2 * 2 * 32 * 128 * 4);
        let all = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].map(|dtype| bytes(Some(dtype)));
        assert_eq!(all, [65536, 32768, 32768, 16384 + 2 * 2 * 32 * 4 * 2]);
    }
}
