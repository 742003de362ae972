//! min_p, then top_k, then top_p: which tokens may be sampled. The vocabulary is never sorted as a whole, because nearly always few tokens are kept.

use super::{SamplingParams, Scratch};
use crate::kernels::cpu::softmax;

/// Most tokens kept in order by insertion; beyond it a partial selection is cheaper.
const INSERTED: usize = 128;
/// The nucleus is looked for among the tokens of more than e⁻⁶ of the greatest probability, then of more than e⁻¹², then among all. These
/// are the distances from the greatest logit, divided by the temperature.
const REACHES: [f32; 3] = [6.0, 12.0, f32::INFINITY];

/// Leaves in `scratch.kept` the tokens that may be sampled, with their logits, by id. `max`: the greatest logit; `scale`: 1 / temperature.
///
/// A token's weight is its probability divided by the greatest one. `min_p` is a limit on just that.
pub fn keep(logits: &[f32], params: &SamplingParams, max: f32, scale: f32, scratch: &mut Scratch) {
    filter(logits, params, max, scale, scratch);
    scratch.kept.sort_unstable_by_key(|(id, _)| *id);
}

fn filter(logits: &[f32], params: &SamplingParams, max: f32, scale: f32, scratch: &mut Scratch) {
    let weight = |logit: f32| softmax::weight((logit - max) * scale);
    let least = if params.min_p > 0.0 { params.min_p } else { f32::MIN_POSITIVE };
    // A logit below this is certainly too low: no exponential is needed to tell.
    let low = least.ln() - 0.01;
    let allowed = |logit: f32| (logit - max) * scale >= low && (weight(logit) >= least || logit == max);
    let Scratch { sums, kept, .. } = scratch;
    let k = params.top_k as usize;
    let limited = k > 0 && k < logits.len();
    if limited {
        greatest(logits, k, kept);
        kept.retain(|(_, logit)| allowed(*logit));
    } else if params.min_p > 0.0 {
        gather(logits, allowed, kept);
    }
    if params.top_p >= 1.0 {
        if !limited && params.min_p <= 0.0 {
            gather(logits, allowed, kept);
        }
        return;
    }
    let mass_of = |kept: &[(u32, f32)]| kept.iter().map(|(_, logit)| f64::from(weight(*logit))).sum::<f64>();
    if limited || params.min_p > 0.0 {
        let target = f64::from(params.top_p) * mass_of(kept);
        return cut(kept, target, |logit| f64::from(weight(logit)));
    }
    softmax::exp_sums(logits, max, scale, sums);
    let target = f64::from(params.top_p) * sums.iter().sum::<f64>();
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
    // A logit must exceed this to be kept. Ids ascend, so of equal logits the lower id stays.
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

/// Keeps the greatest logits whose weights together reach `target`, and no more of them than that takes. It searches by halving, so that
/// nothing is sorted as a whole.
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
