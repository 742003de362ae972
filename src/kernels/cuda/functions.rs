//! The entry points of the kernels, `wc_*` in the `.cu` files, and the structures they take: the same fields in the same order there.

use std::ffi::{c_int, c_void};

/// What is given where there is nothing.
pub const NULL: *const c_void = std::ptr::null();

/// `Dtype`
pub const F32: c_int = 0;
pub const BF16: c_int = 1;

/// `Matrix`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub values: *const c_void,
    pub scales: *const c_void,
    pub units: *const c_void,
    pub n: c_int,
    pub k: c_int,
}

/// `NormOf`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NormOf {
    pub weight: *const c_void,
    pub bias: *const c_void,
    pub epsilon: f32,
    pub is_layer: c_int,
}

/// `Epilogue`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    pub ending: c_int,
    pub activation: c_int,
    pub factor: f32,
}

/// `Rows`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub visits: *const c_void,
    pub offsets: *const c_void,
    pub count: c_int,
    pub per_row: c_int,
    pub x_stride: c_int,
    pub out_stride: c_int,
    pub x_step: c_int,
    pub out_step: c_int,
}

impl Rows {
    /// All of `count` rows of so many numbers, to rows of so many.
    pub fn dense(count: usize, x_stride: usize, out_stride: usize) -> Self {
        let (count, x_stride, out_stride) = (count as c_int, x_stride as c_int, out_stride as c_int);
        Self { visits: NULL, offsets: NULL, count, per_row: 1, x_stride, out_stride, x_step: 0, out_step: 0 }
    }
}

/// `Product`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub x: *const c_void,
    pub w: Matrix,
    pub of_experts: *const c_void,
    pub biases: *const c_void,
    pub bias: *const c_void,
    pub rows: Rows,
    pub epilogue: Ending,
    pub out: *mut c_void,
    pub experts: c_int,
}

/// `Preparation`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Preparation {
    pub heads: c_int,
    pub kv_heads: c_int,
    pub head_dim: c_int,
    pub pairs: c_int,
    pub interleaved: c_int,
    pub extent: c_int,
    pub after_rope: c_int,
    pub norm_epsilon: f32,
    pub norms_values: c_int,
    pub value_epsilon: f32,
    pub growth: f32,
    pub growth_length: c_int,
}

/// `Attention`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    pub heads: c_int,
    pub kv_heads: c_int,
    pub head_dim: c_int,
    pub q_stride: c_int,
    pub scale: f32,
    pub soft_cap: f32,
    pub causal: c_int,
    pub window: c_int,
    pub sinks: *const c_void,
    pub block_size: c_int,
    pub max_blocks: c_int,
    pub tables: *const c_void,
    pub sequences: *const c_void,
    pub visible: *const c_void,
    pub contexts: *const c_void,
    pub splits: c_int,
    pub parts: *mut c_void,
}

/// `Routing`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Routing {
    pub experts: c_int,
    pub top_k: c_int,
    pub score: c_int,
    pub normalizes: c_int,
    pub epsilon: f32,
    pub least: f32,
    pub scale: f32,
    pub groups: c_int,
    pub keep: c_int,
    pub best: c_int,
}

/// `States`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct States {
    pub begins: *const c_void,
    pub slots: *const c_void,
    pub goes_on: *const c_void,
    pub save_begins: *const c_void,
    pub saves: *const c_void,
}

/// `Conv`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Conv {
    pub channels: c_int,
    pub kernel: c_int,
    pub gated: c_int,
    pub weight: *const c_void,
    pub bias: *const c_void,
}

/// `Delta`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Delta {
    pub key_heads: c_int,
    pub value_heads: c_int,
    pub key_dim: c_int,
    pub value_dim: c_int,
    pub epsilon: f32,
    pub decay: *const c_void,
    pub decay_bias: *const c_void,
    pub norm: *const c_void,
}

/// `DeltaArguments`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeltaArguments {
    pub qkv: *const c_void,
    pub gates: *const c_void,
    pub z: *const c_void,
    pub state: *mut c_void,
    pub out: *mut c_void,
    pub rows: c_int,
    pub tokens: c_int,
}

/// `Latent`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Latent {
    pub heads: c_int,
    pub nope_dim: c_int,
    pub rope_dim: c_int,
    pub rank: c_int,
    pub epsilon: f32,
}

/// `Logits`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Logits {
    pub values: *mut c_void,
    pub vocab: c_int,
}

/// `Changes`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Changes {
    pub all: *const c_void,
    pub begin: *const c_void,
    pub allowed: *const c_void,
    pub has_allowed: *const c_void,
    pub unassigned: *const c_void,
    pub unassigned_count: c_int,
}

/// `Sampling`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    pub seed: u64,
    pub index: u64,
    pub inverse_temperature: f32,
    pub min_p: f32,
    pub top_p: f32,
    pub top_k: c_int,
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// Each returns 0, or an error. The first argument of all is the stream.
        #[allow(clippy::type_complexity)]
        #[derive(Clone, Copy)]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn(*mut c_void, $($type),*) -> c_int,)*
        }

        impl Functions {
            /// Those that the build has linked; see `build.rs`.
            #[cfg(feature = "cuda")]
            pub fn linked() -> Self {
                unsafe extern "C" {
                    $(#[link_name = concat!("wc_", stringify!($name))] fn $name(stream: *mut c_void, $($argument: $type),*) -> c_int;)*
                }
                Self { $($name,)* }
            }

            #[cfg(test)]
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// The same with one that computes nothing and says whether that went well.
            #[cfg(test)]
            pub fn without(mut self, name: &str, goes_well: bool) -> Self {
                $(if name == stringify!($name) {
                    unsafe extern "C" fn nothing(_: *mut c_void, $(_: $type),*) -> c_int {
                        0
                    }
                    unsafe extern "C" fn fault(_: *mut c_void, $(_: $type),*) -> c_int {
                        700
                    }
                    self.$name = if goes_well { nothing } else { fault };
                })*
                self
            }

            /// `symbol` finds a function by its name.
            ///
            /// # Safety
            /// What it finds must be the kernels' own functions.
            #[cfg(any(test, feature = "emulator"))]
            #[allow(clippy::missing_transmute_annotations)]
            pub unsafe fn load<E>(symbol: impl Fn(&str) -> Result<*mut c_void, E>) -> Result<Self, E> {
                // SAFETY: the caller's promise; the signatures are those of the sources.
                Ok(Self { $($name: unsafe { std::mem::transmute::<*mut c_void, _>(symbol(concat!("wc_", stringify!($name)))?) },)* })
            }
        }
    };
}

functions! {
    embed(dtype: c_int, form: c_int, table: Matrix, tokens: *const c_void, scale: f32, out: *mut c_void, count: c_int);
    embed_add(dtype: c_int, form: c_int, table: Matrix, rows: *const c_void, first: c_int, out: *mut c_void, count: c_int);
    norm(dtype: c_int, x: *const c_void, first: NormOf, residual: *mut c_void, factor: f32, second: NormOf, out: *mut c_void, rows: c_int, width: c_int);
    pick(dtype: c_int, x: *const c_void, rows: *const c_void, out: *mut c_void, count: c_int, width: c_int);
    mean(dtype: c_int, x: *const c_void, spans: *const c_void, out: *mut c_void, count: c_int, width: c_int);
    scale_and_cap(dtype: c_int, x: *mut c_void, count: usize, scale: f32, cap: f32);
    gate_rows(dtype: c_int, gates: *const c_void, x: *mut c_void, rows: c_int, width: c_int, part: c_int);
    gemv(dtype: c_int, out_dtype: c_int, form: c_int, product: *const Product);
    matmul(out_dtype: c_int, form: c_int, large: c_int, product: *const Product);
    angles(positions: *const c_void, frequencies: *const c_void, factor: f32, cosines: *mut c_void, sines: *mut c_void, tokens: c_int, pairs: c_int);
    rope_and_store(dtype: c_int, qkv: *mut c_void, p: *const Preparation, q_weight: *const c_void, k_weight: *const c_void, cosines: *const c_void,
        sines: *const c_void, positions: *const c_void, slots: *const c_void, keys: *mut c_void, values: *mut c_void, tokens: c_int);
    attend(dtype: c_int, q: *const c_void, keys: *const c_void, values: *const c_void, a: *const Attention, out: *mut c_void, tokens: c_int);
    attend_tiles(q: *const c_void, keys: *const c_void, values: *const c_void, a: *const Attention, tiles: *const c_void, count: c_int, few: c_int,
        out: *mut c_void);
    attend_merge(dtype: c_int, a: *const Attention, out: *mut c_void, tokens: c_int);
    route(dtype: c_int, logits: *const c_void, choice_bias: *const c_void, r: *const Routing, picked: *mut c_void, weights: *mut c_void,
        counts: *mut c_void, offsets: *mut c_void, list: *mut c_void, tokens: c_int);
    copy_states(state: *mut c_void, copies: *const c_void, count: c_int, width: c_int);
    causal_conv(dtype: c_int, x: *const c_void, conv: *const Conv, states: *const States, state: *mut c_void, out: *mut c_void, rows: c_int, longest: c_int);
    gated_delta(dtype: c_int, arguments: *const DeltaArguments, delta: *const Delta, states: *const States, few: c_int);
    latent_rows(dtype: c_int, q: *const c_void, absorbed: *const c_void, latent: *const c_void, spec: *const Latent, norm: *const c_void,
        out: *mut c_void, tokens: c_int);
    combine(dtype: c_int, results: *const c_void, weights: *const c_void, out: *mut c_void, tokens: c_int, top_k: c_int, width: c_int, factor: f32, adds: c_int);
    adjust(logits: Logits, changes: *const Changes, failed: *mut c_void, rows: c_int);
    argmax(logits: *const c_void, stride: c_int, width: c_int, masked: *const c_void, masked_count: c_int, out: *mut c_void, rows: c_int);
    sample(logits: Logits, samplings: *const c_void, failed: *const c_void, out: *mut c_void, rows: c_int);
}
