//! Normalisation, activation and rotation of single rows.
//!
//! Functions over [`Simd`] are unsafe because of the processor's features alone, which `dispatch!` has checked; all memory they use is in slices.

use super::simd::{Simd, dispatch};
use crate::{Activation, Pairing};

/// `out = x · (mean(x²) + eps)^-½ · w`, all of one width.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    dispatch!(rms_norm_row::<>(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]));
}

#[inline(always)]
unsafe fn rms_norm_row<S: Simd>(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: reads whole vectors inside x only.
    let mean = unsafe { sum_of_squares::<S>(x) } / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * scale * w;
    }
}

#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: reads whole vectors inside x only.
    unsafe {
        let whole = x.len() - x.len() % S::LANES;
        let mut acc = S::zero();
        let mut i = 0;
        while i < whole {
            let v = S::load(x.as_ptr().add(i));
            acc = S::mul_add(v, v, acc);
            i += S::LANES;
        }
        S::sum(acc) + x[whole..].iter().map(|v| v * v).sum::<f32>()
    }
}

/// The sum of a long slice, read as fast as one thread can: for measuring memory.
pub fn sum(values: &[f32]) -> f32 {
    let mut out = 0.0;
    let target = &mut out;
    dispatch!(sum_all::<>(values: &[f32], target: &mut f32));
    out
}

#[inline(always)]
unsafe fn sum_all<S: Simd>(values: &[f32], target: &mut f32) {
    const STREAMS: usize = 8;
    const AHEAD: usize = 1024;
    // SAFETY: reads whole vectors inside the slice; a prefetch may name any address.
    unsafe {
        let (one, mut acc) = (S::splat(1.0), [S::zero(); STREAMS]);
        let step = STREAMS * S::LANES;
        let whole = values.len() - values.len() % step;
        let mut i = 0;
        while i < whole {
            for c in 0..STREAMS {
                let p = values.as_ptr().add(i + c * S::LANES);
                S::prefetch(p.wrapping_add(AHEAD));
                acc[c] = S::mul_add(S::load(p), one, acc[c]);
            }
            i += step;
        }
        *target = acc.into_iter().map(|acc| S::sum(acc)).sum::<f32>() + values[whole..].iter().sum::<f32>();
    }
}

/// e^x to about 1e-7 relative, written so that the compiler vectorises loops over it: 2^n · polynomial of the rest (Cephes' coefficients).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: a number added to it is rounded to an integer, which its low bits then hold
    let x = x.clamp(-87.336_54, 88.376_26);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    value * f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

/// Hyperbolic tangent to about 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Beyond 9 it is 1 in f32; near 0 the difference below would lose digits, and the series does not.
    let e = exp(2.0 * x.clamp(-9.1, 9.1));
    let far = 1.0 - 2.0 / (e + 1.0);
    let square = x * x;
    let near = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0)))));
    if square < 0.0625 { near } else { far }
}

/// Replaces numbers by their activation.
#[inline(always)]
pub fn activate(activation: Activation, x: &mut [f32]) {
    match activation {
        Activation::Silu => x.iter_mut().for_each(|x| *x /= 1.0 + exp(-*x)),
        Activation::GeluTanh => x.iter_mut().for_each(|x| {
            let inner = 0.797_884_6 * (*x + 0.044_715 * *x * *x * *x);
            *x = 0.5 * *x * (1.0 + tanh(inner));
        }),
        Activation::Relu2 => x.iter_mut().for_each(|x| *x = if *x > 0.0 { *x * *x } else { 0.0 }),
        Activation::ClampedSwiglu => x.iter_mut().for_each(|x| {
            // NOTE: not `min`, which would make a number of NaN.
            let gate = if *x > Activation::SWIGLU_LIMIT { Activation::SWIGLU_LIMIT } else { *x };
            *x = gate / (1.0 + exp(-Activation::SWIGLU_ALPHA * gate));
        }),
    }
}

/// `gates = activation(gates) · ups`, as a call.
#[inline(never)]
pub fn gate_row(activation: Activation, gates: &mut [f32], ups: &mut [f32]) {
    activate_row(activation, gates);
    if activation == Activation::ClampedSwiglu {
        ups.iter_mut().for_each(|up| *up = up.clamp(-Activation::SWIGLU_LIMIT, Activation::SWIGLU_LIMIT) + 1.0);
    }
    gates.iter_mut().zip(ups).for_each(|(gate, up)| *gate *= *up);
}

/// [`activate`] as a call: the matrix kernels are compiled hundreds of times, and would each hold a copy of what few models need.
#[inline(never)]
pub fn activate_row(activation: Activation, x: &mut [f32]) {
    dispatch!(activate_all::<>(activation: Activation, x: &mut [f32]));
}

#[inline(always)]
unsafe fn activate_all<S: Simd>(activation: Activation, x: &mut [f32]) {
    activate(activation, x);
}

/// `out = (x − mean(x)) · (variance(x) + eps)^-½ · w + bias`, all of one width.
pub fn layer_norm(x: &[f32], w: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    dispatch!(layer_norm_row::<>(x: &[f32], w: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]));
}

#[inline(always)]
unsafe fn layer_norm_row<S: Simd>(x: &[f32], w: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let width = x.len() as f64;
    let mean = (x.iter().map(|x| f64::from(*x)).sum::<f64>() / width) as f32;
    let variance = (x.iter().map(|x| f64::from(x - mean).powi(2)).sum::<f64>() / width) as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = (x - mean) * scale * w;
    }
    if let Some(bias) = bias {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
}

/// `x = x · (mean(x²) + eps)^-½ · w` in place, without `w` only the first two.
pub fn rms_norm_in_place(x: &mut [f32], w: Option<&[f32]>, eps: f32) {
    dispatch!(rms_norm_row_in_place::<>(x: &mut [f32], w: Option<&[f32]>, eps: f32));
}

#[inline(always)]
unsafe fn rms_norm_row_in_place<S: Simd>(x: &mut [f32], w: Option<&[f32]>, eps: f32) {
    // SAFETY: reads whole vectors inside x only.
    let mean = unsafe { sum_of_squares::<S>(x) } / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    match w {
        Some(w) => x.iter_mut().zip(w).for_each(|(x, w)| *x = *x * scale * w),
        None => x.iter_mut().for_each(|x| *x *= scale),
    }
}

/// Rotates the heads of one row, `d` numbers each, by the angles of its position: one for each pair. What is left of a head stays.
pub fn rope_row(heads: &mut [f32], d: usize, pairing: Pairing, cos: &[f32], sin: &[f32]) {
    dispatch!(rope_heads::<>(heads: &mut [f32], d: usize, pairing: Pairing, cos: &[f32], sin: &[f32]));
}

#[inline(always)]
unsafe fn rope_heads<S: Simd>(heads: &mut [f32], d: usize, pairing: Pairing, cos: &[f32], sin: &[f32]) {
    heads.chunks_exact_mut(d).for_each(|head| rope_head(&mut head[..2 * cos.len()], pairing, cos, sin));
}

#[inline(always)]
fn rope_head(head: &mut [f32], pairing: Pairing, cos: &[f32], sin: &[f32]) {
    match pairing {
        Pairing::Interleaved => {
            for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (pair[0], pair[1]);
                pair[0] = a * cos - b * sin;
                pair[1] = b * cos + a * sin;
            }
        }
        Pairing::Half => {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_of_the_spec() {
        let mut out = [0f32; 4];
        rms_norm(&[1.0, -2.0, 3.0, 4.0], &[1.0, 0.5, 2.0, 1.0], 1e-5, &mut out);
        for (got, want) in out.iter().zip([0.365_148_1, -0.365_148_1, 2.190_889, 1.460_593]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn rope_of_the_spec() {
        let inv_freq = [1.0f32, 500_000f32.powf(-0.5)];
        let cases = [
            (1.0, Pairing::Interleaved, [-1.142_639_7, 1.922_075_6, 2.994_340_2, 4.004_238_6]),
            (3.0, Pairing::Interleaved, [-1.272_232_5, -1.838_865, 2.983_002_5, 4.012_692]),
            (1.0, Pairing::Half, [-1.984_110_7, 1.994_341_1, 2.462_378, 4.002_824_4]),
            (3.0, Pairing::Half, [-1.413_353, 1.983_012, -2.828_857, 4.008_449]),
        ];
        for (position, pairing, want) in cases {
            let cos = inv_freq.map(|f| (position * f).cos());
            let sin = inv_freq.map(|f| (position * f).sin());
            let mut out = [1.0, 2.0, 3.0, 4.0];
            rope_row(&mut out, 4, pairing, &cos, &sin);
            for (got, want) in out.iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "{pairing:?} {position}: {got} {want}");
            }
        }
    }

    #[test]
    fn sums_are_whole() {
        for n in [0, 1, 127, 128, 1000, 4099] {
            assert_eq!(sum(&vec![1.0; n]), n as f32);
        }
    }

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8_700..8_800 {
            let x = i as f32 / 100.0 + 0.003;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 3e-7, "exp({x}) = {got}, not {want}");
        }
        assert!(exp(-1e9) < 1e-37 && exp(-1e9) >= 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn activations_are_close_everywhere() {
        for i in -1_200..1_200 {
            let x = i as f32 / 100.0 + 0.003;
            let wide = f64::from(x);
            let of = |activation| {
                let mut values = [x];
                activate(activation, &mut values);
                f64::from(values[0])
            };
            assert!((f64::from(tanh(x)) - wide.tanh()).abs() < 4e-7, "tanh({x}) = {}", tanh(x));
            let gelu = 0.5 * wide * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3))).tanh());
            assert!((of(Activation::GeluTanh) - gelu).abs() < 1e-6 * (1.0 + gelu.abs()), "gelu({x})");
            let silu = wide / (1.0 + (-wide).exp());
            assert!((of(Activation::Silu) - silu).abs() < 1e-6 * (1.0 + silu.abs()), "silu({x})");
        }
        let mut values = [-2.0, 0.0, 3.0];
        activate(Activation::Relu2, &mut values);
        assert_eq!(values, [0.0, 0.0, 9.0]);
    }

    #[test]
    fn norms_of_rows() {
        let mut out = [0f32; 4];
        layer_norm(&[1.0, -2.0, 3.0, 4.0], &[1.0, 0.5, 2.0, 1.0], Some(&[0.0, 1.0, 0.0, 0.0]), 1e-5, &mut out);
        // Mean 1.5, variance 5.25.
        for (got, want) in out.iter().zip([-0.218_217_7, 0.236_237_9, 1.309_306_2, 1.091_088_5]) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
        let mut partly = [1.0, 2.0, 3.0, 4.0];
        rope_row(&mut partly, 4, Pairing::Half, &[0.0], &[1.0]);
        assert_eq!(partly, [-2.0, 1.0, 3.0, 4.0], "components beyond the angles stay");
    }
}
