//! bf16 weights in the tile registers of Intel's AMX: sixteen rows by sixteen columns by 32 of k in one instruction.
//!
//! A panel of weights is already what a tile wants: pairs of bf16, 32 columns side by side. Activations lie in tiles of sixteen rows,
//! those that are missing from the last one zero. They are either rounded to bf16, or split into two terms: the nearest bf16 and the
//! nearest to what that leaves, which together hold 17 bits of their 24; this takes twice the products, of which a tile does many
//! times what vectors do. Products of bf16 are exact in f32, where sums are kept. A row's sums depend on no other row: the instruction
//! works row by row and in order of k, and one row alone goes the same way.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use super::{AHEAD, Columns, FAR, MatmulJob, PANEL, Scratch, finish, finish_gated, pairs::nearest};
use crate::cpu::pool::Pool;
use crate::cpu::simd::{Simd, dispatch, x86::Avx512Vnni};
use crate::cpu::{Ptr, PtrMut};

/// Rows and columns of a tile of sums.
const TILE: usize = 16;
/// Numbers of k that a tile holds.
const STEP: usize = 32;
/// Bytes of a tile of activations, or of weights.
const BYTES: usize = TILE * STEP * 2;
/// Rows whose sums are kept in tiles at a time, for a whole panel.
const ROWS: usize = 2 * TILE;
/// Panels a task takes: rows of activations are then read from the second cache, not from memory, for all but the first.
pub(super) const PANELS: usize = 8;

/// Whether this processor has the tiles, and the system lets this process use them: it must be asked, once, for all threads.
pub(crate) fn available() -> bool {
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    const OSXSAVE: u32 = 1 << 27;
    /// The system saves the tiles' configuration and data when it switches threads.
    const SAVED: u32 = 3 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & (TILES | BF16) != TILES | BF16 {
        return false;
    }
    let low: u32;
    // SAFETY: OSXSAVE says that the instruction is there.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack)) };
    low & SAVED == SAVED && permitted()
}

/// Asks the system for the tiles' 8 KB of state a thread.
fn permitted() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let failed: isize;
    // SAFETY: takes two numbers and touches no memory of ours.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => failed, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
             out("rcx") _, out("r11") _, options(nostack));
    }
    failed == 0
}

/// Writes rows as tiles: `[m/16][k/32][TERMS]` tiles of `[16][32]`.
pub(super) fn arrange<const TERMS: usize>(pool: &mut Pool, x: &[f32], k: usize, scratch: &mut Scratch) {
    let (m, width) = (x.len() / k, k.next_multiple_of(STEP));
    // Two terms take the room of one f32.
    scratch.reserve(m.next_multiple_of(TILE) * width);
    let (source, target) = (Ptr(x.as_ptr()), PtrMut(scratch.aligned().cast::<u16>()));
    let block = move |block: usize| {
        let rows = TILE.min(m - block * TILE);
        let (x, out) = (Ptr(source.ptr().wrapping_add(block * TILE * k)), PtrMut(target.ptr().wrapping_add(block * TILE * width * TERMS)));
        if TERMS == 1 {
            dispatch!(rounded::<>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u16>));
        } else {
            dispatch!(split::<>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u16>));
        }
    };
    if m * k < super::SERIAL_WORK / 8 {
        (0..m.div_ceil(TILE)).for_each(block);
    } else {
        pool.run(m.div_ceil(TILE), &|task, _| block(task));
    }
}

#[inline(always)]
unsafe fn rounded<S: Simd>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u16>) {
    // SAFETY: as for `tiles`.
    unsafe { tiles::<1>(x, rows, k, out) }
}

#[inline(always)]
unsafe fn split<S: Simd>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u16>) {
    // SAFETY: as for `tiles`.
    unsafe { tiles::<2>(x, rows, k, out) }
}

/// # Safety
/// `x` holds `rows` rows of `k` numbers, at most a tile's; `out` has room for `TERMS` tiles of every step.
#[inline(always)]
unsafe fn tiles<const TERMS: usize>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u16>) {
    // SAFETY: `rows` rows of x, and sixteen of the tiles.
    unsafe {
        for step in 0..k.div_ceil(STEP) {
            let tiles = &mut *out.0.add(step * TERMS * TILE * STEP).cast::<[[[u16; STEP]; TILE]; TERMS]>();
            let width = STEP.min(k - step * STEP);
            for r in 0..TILE {
                let mut values = [0f32; STEP];
                if r < rows {
                    std::ptr::copy_nonoverlapping(x.0.add(r * k + step * STEP), values.as_mut_ptr(), width);
                }
                for tile in tiles.iter_mut() {
                    for i in 0..STEP {
                        let term = nearest(values[i]);
                        tile[r][i] = term as u16;
                        values[i] -= f32::from_bits(term << 16);
                    }
                }
            }
        }
    }
}

/// What the eight tile registers are: all of sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

#[repr(C, align(64))]
struct Sums([[f32; PANEL]; ROWS]);

/// The last weights of a panel whose k is not whole steps, zeros after them: the panel itself ends there.
#[repr(C, align(64))]
struct Rest([u8; 2 * BYTES]);

/// Panels `from..to` for all rows.
///
/// # Safety
/// As [`super::panels`]; [`available`] has said yes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn panels<const TERMS: usize>(job: MatmulJob, from: usize, to: usize) {
    let (steps, rest) = (job.k / STEP, job.k % STEP);
    let width = job.k.div_ceil(STEP) * TERMS * BYTES;
    let (mut sums, mut last) = (Sums([[0.0; PANEL]; ROWS]), Rest([0; 2 * BYTES]));
    // SAFETY: panels and rows are the job's; tiles are configured before they are used, and given up after.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack));
        let mut row = 0;
        while row < job.m {
            let x = job.x.0.cast::<u8>().add(row / TILE * width);
            for index in from..to {
                let panel = job.w.0.add(index * job.panel_bytes);
                std::ptr::copy_nonoverlapping(panel.add(steps * 2 * BYTES), last.0.as_mut_ptr(), rest.div_ceil(2) * 4 * PANEL);
                let weights = Walk { panel, steps, rest: usize::from(rest > 0), last: &last, sums: &mut sums };
                match (job.m - row > TILE, TERMS) {
                    (true, 1) => two_tiles_rounded(x, x.add(width), weights),
                    (true, _) => two_tiles_split(x, x.add(width), weights),
                    (false, 1) => one_tile_rounded(x, weights),
                    (false, _) => one_tile_split(x, weights),
                }
                for (r, sums) in sums.0.iter().enumerate().take(job.m - row) {
                    let sums = [[Avx512Vnni::load(sums.as_ptr()), Avx512Vnni::load(sums.as_ptr().add(TILE))]];
                    match job.columns {
                        Columns::Plain => finish::<Avx512Vnni, 1>(&job, &sums, index * PANEL, row + r),
                        Columns::Gated => finish_gated::<Avx512Vnni, 1>(&job, &sums, index * PANEL / 2, row + r),
                    }
                }
            }
            row += ROWS;
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// A panel to walk along: `steps` whole steps and, if `rest` is 1, `last`; sums go to `sums`.
struct Walk<'a> {
    panel: *const u8,
    steps: usize,
    rest: usize,
    last: &'a Rest,
    sums: &'a mut Sums,
}

/// Asks for the weights that lie ahead of one row of the tiles, 128 bytes, at the distances of the vector kernels: both lines into the first
/// cache, and one of two into the second. Behind a panel lies the next one. These instructions never fault: an address behind the last panel
/// or beside the copy of a panel's rest does no harm.
macro_rules! ahead {
    ($row:literal) => {
        concat!(
            "prefetcht0 [{w} + {ahead} + ",
            $row,
            "]\n",
            "prefetcht0 [{w} + {ahead} + ",
            $row,
            " + 64]\n",
            "prefetcht1 [{w} + {far} + ",
            $row,
            "]"
        )
    };
}

/// Defines a walk along k for some tiles of activations: `$step` is what one step does with them, in tiles 6 and 7; weights are in 4 and 5.
macro_rules! walk {
    ($name:ident($($x:ident),*), [$($step:literal),*], [$($end:literal),*]) => {
        /// Sums of sixteen rows for each of the pointers; any sixteen the same to the bit, alone or with others.
        ///
        /// # Safety
        /// The processor has tiles, and they are configured; each pointer is to the tiles of all steps, the rest's too.
        #[inline(always)]
        unsafe fn $name($($x: *const u8,)* walk: Walk<'_>) {
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "test {steps}, {steps}",
                    "jz 3f",
                    "2:",
                    // Sixteen rows of 128 bytes are a step.
                    ahead!(0),
                    ahead!(128),
                    ahead!(256),
                    ahead!(384),
                    ahead!(512),
                    ahead!(640),
                    ahead!(768),
                    ahead!(896),
                    "tileloadd tmm4, [{w} + {wide}]",
                    ahead!(1024),
                    ahead!(1152),
                    ahead!(1280),
                    ahead!(1408),
                    ahead!(1536),
                    ahead!(1664),
                    ahead!(1792),
                    ahead!(1920),
                    "tileloadd tmm5, [{w} + {wide} + 64]",
                    $($step,)*
                    "add {w}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    // What is left of k, once.
                    "3:",
                    "test {rest}, {rest}",
                    "jz 4f",
                    "mov {w}, {last}",
                    "xor {rest}, {rest}",
                    "inc {steps}",
                    "jmp 2b",
                    "4:",
                    "tilestored [{sums} + {wide}], tmm0",
                    "tilestored [{sums} + {wide} + 64], tmm1",
                    $($end,)*
                    $($x = inout(reg) $x => _,)*
                    w = inout(reg) walk.panel => _,
                    steps = inout(reg) walk.steps => _,
                    rest = inout(reg) walk.rest => _,
                    last = in(reg) walk.last,
                    sums = in(reg) walk.sums,
                    wide = in(reg) 4 * PANEL,
                    narrow = in(reg) 2 * STEP,
                    ahead = const AHEAD,
                    far = const FAR,
                    options(nostack),
                )
            }
        }
    };
}

walk!(
    one_tile_rounded(x),
    ["tileloadd tmm6, [{x} + {narrow}]", "tdpbf16ps tmm0, tmm6, tmm4", "tdpbf16ps tmm1, tmm6, tmm5", "add {x}, 1024"],
    []
);
walk!(
    one_tile_split(x),
    [
        "tileloadd tmm6, [{x} + {narrow}]",
        "tdpbf16ps tmm0, tmm6, tmm4",
        "tdpbf16ps tmm1, tmm6, tmm5",
        "tileloadd tmm7, [{x} + {narrow} + 1024]",
        "tdpbf16ps tmm0, tmm7, tmm4",
        "tdpbf16ps tmm1, tmm7, tmm5",
        "add {x}, 2048"
    ],
    []
);
walk!(
    two_tiles_rounded(x, y),
    [
        "tileloadd tmm6, [{x} + {narrow}]",
        "tdpbf16ps tmm0, tmm6, tmm4",
        "tdpbf16ps tmm1, tmm6, tmm5",
        "tileloadd tmm7, [{y} + {narrow}]",
        "tdpbf16ps tmm2, tmm7, tmm4",
        "tdpbf16ps tmm3, tmm7, tmm5",
        "add {x}, 1024",
        "add {y}, 1024"
    ],
    ["tilestored [{sums} + {wide} + 2048], tmm2", "tilestored [{sums} + {wide} + 2112], tmm3"]
);
walk!(
    two_tiles_split(x, y),
    [
        "tileloadd tmm6, [{x} + {narrow}]",
        "tdpbf16ps tmm0, tmm6, tmm4",
        "tdpbf16ps tmm1, tmm6, tmm5",
        "tileloadd tmm7, [{y} + {narrow}]",
        "tdpbf16ps tmm2, tmm7, tmm4",
        "tdpbf16ps tmm3, tmm7, tmm5",
        "tileloadd tmm6, [{x} + {narrow} + 1024]",
        "tdpbf16ps tmm0, tmm6, tmm4",
        "tdpbf16ps tmm1, tmm6, tmm5",
        "tileloadd tmm7, [{y} + {narrow} + 1024]",
        "tdpbf16ps tmm2, tmm7, tmm4",
        "tdpbf16ps tmm3, tmm7, tmm5",
        "add {x}, 2048",
        "add {y}, 2048"
    ],
    ["tilestored [{sums} + {wide} + 2048], tmm2", "tilestored [{sums} + {wide} + 2112], tmm3"]
);
