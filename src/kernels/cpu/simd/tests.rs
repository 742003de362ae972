//! Every level that this processor has, each operation against plain arithmetic on single numbers, to the bit; only the order of a sum
//! over sixteen lanes is the instruction's own.

use super::*;

fn bits(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 32) as u32
}

/// Of many magnitudes, now and then 0 or -0.
fn number(state: &mut u64) -> f32 {
    let (bits, exponent) = (bits(state), bits(state) % 40);
    if exponent == 0 { f32::from_bits(bits & 0x8000_0000) } else { (bits as i32 as f32) * 2f32.powi(exponent as i32 - 50) }
}

fn lanes_of<S: Simd>(v: S::V) -> Vec<f32> {
    let mut values = vec![0f32; S::LANES];
    unsafe { S::store(values.as_mut_ptr(), v) };
    values
}

fn bytes_of<S: Simd>(x: &S::I) -> &[u8] {
    assert_eq!(size_of::<S::I>(), 4 * S::LANES);
    // SAFETY: integers and vectors of them have no padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(x).cast(), size_of::<S::I>()) }
}

/// The vector begins one byte past an aligned address: no level may want more.
fn unaligned<T: Copy, R>(values: &[T], f: impl FnOnce(*const T) -> R) -> R {
    let mut buffer = vec![0u8; size_of_val(values) + 1];
    // SAFETY: the buffer has room for the values after its first byte.
    unsafe {
        std::ptr::copy_nonoverlapping(values.as_ptr().cast(), buffer.as_mut_ptr().add(1), size_of_val(values));
        f(buffer.as_ptr().add(1).cast())
    }
}

#[track_caller]
fn same<S: Simd>(got: S::V, want: impl Fn(usize) -> f32) {
    for (i, got) in lanes_of::<S>(got).into_iter().enumerate() {
        let want = want(i);
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "lane {i} of {}: {got:e} {want:e}", S::LANES);
    }
}

/// `fused`: whether `mul_add` rounds once.
#[inline(always)]
unsafe fn floats<S: Simd>(fused: bool, state: &mut u64) {
    let mut numbers = || (0..S::LANES).map(|_| number(state)).collect::<Vec<f32>>();
    let (x, y, z) = (numbers(), numbers(), numbers());
    unsafe {
        let (a, b, c) = (unaligned(&x, |p| S::load(p)), S::load(y.as_ptr()), S::load(z.as_ptr()));
        same::<S>(a, |i| x[i]);
        same::<S>(S::zero(), |_| 0.0);
        same::<S>(S::splat(x[0]), |_| x[0]);
        same::<S>(S::mul(a, b), |i| x[i] * y[i]);
        same::<S>(S::add(a, b), |i| x[i] + y[i]);
        same::<S>(S::mul_add(a, b, c), |i| if fused { x[i].mul_add(y[i], z[i]) } else { x[i] * y[i] + z[i] });
        same::<S>(S::max(a, b), |i| if x[i] > y[i] { x[i] } else { y[i] });
        assert_eq!(S::greatest(a), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let halves = || ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
        assert!(S::LANES != 8 || halves().to_bits() == S::sum(a).to_bits(), "{x:?}");
        let exact: f64 = x.iter().copied().map(f64::from).sum();
        let size: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
        assert!((f64::from(S::sum(a)) - exact).abs() <= size * 1e-6, "{x:?}");

        let pairs: Vec<bf16> = (0..2 * S::LANES).map(|_| bf16::from_f32(number(state))).collect();
        let (even, odd) = unaligned(&pairs, |p| S::load_bf16_pairs(p));
        same::<S>(even, |i| pairs[2 * i].to_f32());
        same::<S>(odd, |i| pairs[2 * i + 1].to_f32());
        let pair = [number(state), number(state)].map(bf16::from_f32);
        let word = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
        let sums = lanes_of::<S>(unaligned(&pairs, |p| S::dot_bf16(a, p, &raw const word)));
        for (i, got) in sums.into_iter().enumerate() {
            let terms = [x[i].into(), pairs[2 * i].to_f64() * pair[0].to_f64(), pairs[2 * i + 1].to_f64() * pair[1].to_f64()];
            let (exact, size) = (terms.iter().sum::<f64>(), terms.iter().map(|x| x.abs()).sum::<f64>());
            assert!((f64::from(got) - exact).abs() <= size * 2f64.powi(-22), "lane {i}: {got:e} {exact:e}");
        }
        let bytes: Vec<u8> = (0..S::LANES).map(|_| bits(state) as u8).collect();
        same::<S>(unaligned(&bytes, |p| S::load_u8(p)), |i| f32::from(bytes[i]));
        same::<S>(unaligned(&bytes, |p| S::load_i8(p.cast())), |i| f32::from(bytes[i] as i8));
        same::<S>(unaligned(&pairs, |p| S::load_bf16(p)), |i| pairs[i].to_f32());
    }
}

/// Not a number is never greater, from either side.
#[inline(always)]
unsafe fn maxima_of_nan<S: Simd>() {
    unsafe {
        same::<S>(S::max(S::splat(f32::NAN), S::splat(1.0)), |_| 1.0);
        same::<S>(S::max(S::splat(1.0), S::splat(f32::NAN)), |_| f32::NAN);
        same::<S>(S::max(S::splat(f32::NEG_INFINITY), S::splat(-1.0)), |_| -1.0);
        assert_eq!(S::greatest(S::splat(f32::NEG_INFINITY)), f32::NEG_INFINITY);
    }
}

/// Every f16: subnormal ones, infinities, and what is not a number.
#[inline(always)]
unsafe fn all_f16<S: Simd>() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for values in all.chunks_exact(S::LANES) {
        same::<S>(unsafe { unaligned(values, |p| S::load_f16(p)) }, |i| f32::from(values[i]));
    }
}

#[inline(always)]
unsafe fn integers<S: Simd>(state: &mut u64) {
    let mut bytes = |least: u8, most: u8| -> Vec<u8> {
        // The extremes more often than chance would have them.
        let pick = |state: &mut u64| match bits(state) % 4 {
            0 => least,
            1 => most,
            _ => least + (bits(state) % (u32::from(most - least) + 1)) as u8,
        };
        (0..4 * S::LANES).map(|_| pick(state)).collect()
    };
    let (nibbles, stored, any) = (bytes(0, 15), bytes(0, 255), bytes(0, 255));
    // From -127 to 127.
    let x: Vec<u8> = bytes(1, 255).into_iter().map(|byte| byte ^ 0x80).collect();
    let signed = |i: usize| i32::from(x[i] as i8);
    let dot = |lane: usize, w: &dyn Fn(usize) -> i32| (4 * lane..4 * lane + 4).map(|i| w(i) * signed(i)).sum::<i32>();
    let (start, sum) = (bits(state) as i32 >> 12, (0..4 * S::LANES).map(signed).collect::<Vec<i32>>());
    unsafe {
        let load = |bytes: &[u8]| unaligned(bytes, |p| S::load_bytes(p));
        assert_eq!(bytes_of::<S>(&load(&any)), any);
        assert_eq!(bytes_of::<S>(&S::splat_i32(start)), start.to_le_bytes().repeat(S::LANES));
        same::<S>(S::to_f32(S::splat_i32(start)), |_| start as f32);
        same::<S>(S::to_f32(load(&any)), |i| i32::from_le_bytes([0, 1, 2, 3].map(|b| any[4 * i + b])) as f32);
        let (low, high) = S::nibbles(load(&any));
        assert_eq!(bytes_of::<S>(&low), any.iter().map(|byte| byte & 15).collect::<Vec<_>>());
        assert_eq!(bytes_of::<S>(&high), any.iter().map(|byte| byte >> 4).collect::<Vec<_>>());

        let got = S::dot_nibbles(S::splat_i32(start), load(&nibbles), load(&x));
        let want = |lane: usize| start + dot(lane, &|i| i32::from(nibbles[i]));
        assert_eq!(bytes_of::<S>(&got), (0..S::LANES).flat_map(|lane| want(lane).to_le_bytes()).collect::<Vec<_>>());
        let got = S::dot_biased(S::splat_i32(start), load(&stored), load(&x));
        let want = |lane: usize| {
            let bias = if S::BIASED { 128 * sum[4 * lane..4 * lane + 4].iter().sum::<i32>() } else { 0 };
            start + dot(lane, &|i| i32::from(stored[i]) - 128) + bias
        };
        assert_eq!(bytes_of::<S>(&got), (0..S::LANES).flat_map(|lane| want(lane).to_le_bytes()).collect::<Vec<_>>());
        // Nowhere near memory of ours.
        S::prefetch(std::ptr::without_provenance::<u8>(64));
        S::prefetch_far(std::ptr::without_provenance::<u8>(usize::MAX - 4096));
    }
}

#[inline(always)]
unsafe fn everything<S: Simd>(fused: bool) {
    let mut state = 7;
    unsafe {
        for _ in 0..500 {
            floats::<S>(fused, &mut state);
            integers::<S>(&mut state);
        }
        maxima_of_nan::<S>();
        all_f16::<S>();
    }
}

/// A level by its name with its operations' check, or `None` where the processor lacks a feature of it.
type Operations = (&'static str, Option<unsafe fn()>);

/// Makes a list of [`Operations`]: each check is a function with its level's features.
macro_rules! operations {
    ($there:ident: $($name:literal = $level:ty, [$($feature:tt),*];)*) => {
        vec![$({
            $(#[target_feature(enable = $feature)])*
            unsafe fn run() {
                unsafe { everything::<$level>(true) }
            }
            ($name, ($(std::arch::$there!($feature))&&*).then_some(run as unsafe fn()))
        }),*]
    };
}

#[cfg(target_arch = "x86_64")]
fn vector_operations() -> Vec<Operations> {
    operations! { is_x86_feature_detected:
        "avx2" = x86::Avx2, ["avx2", "fma", "f16c"];
        "avx2vnni" = x86::Avx2Vnni, ["avx2", "fma", "f16c", "avxvnni"];
        "avx512" = x86::Avx512, ["avx512f", "avx512bw", "avx2", "fma", "f16c"];
        "avx512vnni" = x86::Avx512Vnni, ["avx512f", "avx512bw", "avx512vnni", "avx2", "fma", "f16c"];
        "avx512bf16" = x86::Avx512Bf16, ["avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avx2", "fma", "f16c"];
    }
}

#[cfg(target_arch = "aarch64")]
fn vector_operations() -> Vec<Operations> {
    operations! { is_aarch64_feature_detected:
        "neon" = neon::Neon, ["neon"];
        "neondot" = neon::NeonDot, ["neon", "dotprod"];
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn vector_operations() -> Vec<Operations> {
    Vec::new()
}

/// One test for all levels, since which of them can run is the processor's matter: it fails when a level that is here was not tried.
#[test]
fn operations_of_every_level_here() {
    // SAFETY: no features are needed.
    unsafe { everything::<Portable>(cfg!(target_arch = "aarch64")) }
    let mut tried = vec!["portable"];
    for (name, run) in vector_operations() {
        if let Some(run) = run {
            // SAFETY: the features are there.
            unsafe { run() };
            tried.push(name);
        }
    }
    // NOTE: tiles have no vectors of their own; they are tried with the matrix products.
    let here = || levels().into_iter().filter(|known| known.is_here && known.name != "amx");
    assert!(here().all(|known| tried.contains(&known.name)), "tried {tried:?} of {:?}", here().collect::<Vec<_>>());
}

/// Everything else is tried on the level in use. `handler-tests/run` reads these lines, and asks for each level that is here.
#[test]
fn the_level_in_use_is_the_one_asked_for() {
    for KnownLevel { name, is_here, level: known, .. } in levels() {
        let state = if known == level() {
            "in use"
        } else if is_here {
            "here"
        } else {
            "not here"
        };
        println!("\nlevel {name}: {state}");
    }
    if let Some(asked) = std::env::var_os("WORKER_CANDLE_SIMD").filter(|asked| !asked.is_empty()) {
        let known = levels().into_iter().find(|known| asked == known.name);
        assert_eq!(known.map(|known| known.level), Some(level()), "WORKER_CANDLE_SIMD={asked:?} is not a level of this processor");
    }
}
