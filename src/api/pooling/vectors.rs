//! Arithmetic on results.

use crate::engine::PoolingSpec;

/// The vector as the request wants it: cut to its first `dimensions` numbers, and made to have length 1 where the model or the request says so.
pub fn finished(mut vector: Vec<f32>, dimensions: Option<usize>, normalize: bool) -> Vec<f32> {
    vector.truncate(dimensions.unwrap_or(usize::MAX));
    if normalize {
        let length = dot(&vector, &vector).sqrt();
        // A vector of zeros has no direction, and stays.
        if length > 0.0 {
            vector.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
        }
    }
    vector
}

/// A score as the request wants it.
pub fn score(result: &[f32], spec: &PoolingSpec, activation: Option<bool>) -> f32 {
    let logit = result.first().copied().unwrap_or_default();
    if activation.unwrap_or(spec.sigmoid) { (1.0 / (1.0 + (-f64::from(logit)).exp())) as f32 } else { logit }
}

/// The cosine of the angle between two vectors.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { (dot(a, b) / lengths) as f32 } else { 0.0 }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
