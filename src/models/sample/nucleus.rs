//! min_p, then top_k, then top_p: which tokens may be drawn. Whole sorts of the vocabulary are avoided: what is kept is nearly always short.

use super::Scratch;
use crate::kernels::cpu::softmax;
use crate::models::Draw;

/// Most tokens kept in order by insertion; beyond it a partial selection is cheaper.
const INSERTED: usize = 128;
/// Distances below the greatest logit, in units of the temperature, within which the nucleus is looked for: the tokens of more than
/// e⁻⁶ of the greatest probability, those of more than e⁻¹², all.
const REACHES: [f32; 3] = [6.0, 12.0, f32::INFINITY];

/// Leaves in `scratch.kept` the tokens that may be drawn, with their logits, by id. `max`: the greatest logit; `scale`: 1 / temperature.
///
/// A token's weight is its probability relative to the greatest one, which is just what min_p speaks of.
pub fn keep(logits: &[f32], draw: &Draw, max: f32, scale: f32, scratch: &mut Scratch) {
    filter(logits, draw, max, scale, scratch);
    scratch.kept.sort_unstable_by_key(|(id, _)| *id);
}

fn filter(logits: &[f32], draw: &Draw, max: f32, scale: f32, scratch: &mut Scratch) {
    let weight = |logit: f32| softmax::weight((logit - max) * scale);
    let least = if draw.min_p > 0.0 { draw.min_p } else { f32::MIN_POSITIVE };
    // Most logits are told apart without an exponential: these are certainly too low.
    let low = least.ln() - 0.01;
    let allowed = |logit: f32| (logit - max) * scale >= low && (weight(logit) >= least || logit == max);
    let Scratch { sums, kept, .. } = scratch;
    let k = draw.top_k as usize;
    let limited = k > 0 && k < logits.len();
    if limited {
        greatest(logits, k, kept);
        kept.retain(|(_, logit)| allowed(*logit));
    } else if draw.min_p > 0.0 {
        gather(logits, allowed, kept);
    }
    if draw.top_p >= 1.0 {
        if !limited && draw.min_p <= 0.0 {
            gather(logits, allowed, kept);
        }
        return;
    }
    let mass_of = |kept: &[(u32, f32)]| kept.iter().map(|(_, logit)| f64::from(weight(*logit))).sum::<f64>();
    if limited || draw.min_p > 0.0 {
        let target = f64::from(draw.top_p) * mass_of(kept);
        return cut(kept, target, |logit| f64::from(weight(logit)));
    }
    softmax::exp_sums(logits, max, scale, sums);
    let target = f64::from(draw.top_p) * sums.iter().sum::<f64>();
    for reach in REACHES {
        gather(logits, |logit| (max - logit) * scale <= reach && allowed(logit), kept);
        if reach.is_infinite() || mass_of(kept) >= target {
            break;
        }
    }
    cut(kept, target, |logit| f64::from(weight(logit)));
}

/// Greater logits first, ties by id.
fn order(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn gather(logits: &[f32], wanted: impl Fn(f32) -> bool, kept: &mut Vec<(u32, f32)>) {
    kept.clear();
    kept.extend(logits.iter().enumerate().filter(|(_, logit)| wanted(**logit)).map(|(id, logit)| (id as u32, *logit)));
}

/// The `k` greatest logits, in order; NaN is none of them.
pub fn greatest(logits: &[f32], k: usize, kept: &mut Vec<(u32, f32)>) {
    if k > INSERTED {
        gather(logits, |logit| !logit.is_nan(), kept);
        if k < kept.len() {
            kept.select_nth_unstable_by(k - 1, order);
            kept.truncate(k);
        }
        return kept.sort_unstable_by(order);
    }
    kept.clear();
    if k == 0 {
        return;
    }
    // What a logit must exceed to come in. Ids ascend, so that of equal logits the first stays.
    let mut bar = f32::NEG_INFINITY;
    for (id, logit) in logits.iter().enumerate() {
        let full = kept.len() == k;
        if *logit > bar || (!full && *logit == bar) {
            if full {
                kept.pop();
            }
            let place = kept.partition_point(|(_, other)| *other >= *logit);
            kept.insert(place, (id as u32, *logit));
            if let (Some((_, last)), true) = (kept.last(), kept.len() == k) {
                bar = *last;
            }
        }
    }
}

/// Keeps the shortest beginning, in order of logits, whose weights reach `target`: the token that crosses it stays. A search by halves,
/// so that nothing is sorted as a whole.
fn cut(kept: &mut Vec<(u32, f32)>, target: f64, weight: impl Fn(f32) -> f64) {
    // Everything before `from` stays, everything from `to` on goes.
    let (mut from, mut to, mut mass) = (0, kept.len(), 0.0);
    while from < to {
        let middle = from + (to - from) / 2;
        let (before, at, _) = kept[from..to].select_nth_unstable_by(middle - from, order);
        let less = mass + before.iter().map(|(_, logit)| weight(*logit)).sum::<f64>();
        let with = less + weight(at.1);
        if less >= target && middle > 0 {
            to = middle;
        } else if with >= target {
            return kept.truncate(middle + 1);
        } else {
            (from, mass) = (middle + 1, with);
        }
    }
    kept.truncate(to);
}
