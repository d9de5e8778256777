//! What long-tailed classes need: weights, margins, temperatures and biases from class counts n_c of the training split.
//!
//! ```text
//! weights        w_c = (1-β) / (1-β^n_c), rescaled to mean 1                 (Cui et al. 2019; n_c = 0 counts as 1)
//! margins        m_c = m · n_c^(-1/4) / max n^(-1/4)                         (LDAM, Cao et al. 2019)
//! adjustment     b_c = τ_a · log π_c,  π_c = n_c / N                         (Menon et al. 2021)
//! temperatures   φ_c = mean_{i∈c} ‖z_i - p_c‖ / log(n_c + 10), clipped to [p10, p90], rescaled to mean τ   (PCL, Li et al. 2021)
//! ```

use super::Teacher;

/// Effective-number class weights with mean 1; β = 0 gives ones.
pub fn effective_number_weights(counts: &[u32], beta: f32) -> Vec<f32> {
    if beta == 0.0 {
        return vec![1.0; counts.len()];
    }
    let beta = beta as f64;
    let raw: Vec<f64> = counts.iter().map(|n| (1.0 - beta) / (1.0 - beta.powf((*n).max(1) as f64))).collect();
    let mean = raw.iter().sum::<f64>() / raw.len().max(1) as f64;
    raw.iter().map(|w| (w / mean) as f32).collect()
}

/// LDAM margins in cosine units, the rarest class's being `largest`.
pub fn ldam_margins(counts: &[u32], largest: f32) -> Vec<f32> {
    let root: Vec<f64> = counts.iter().map(|n| ((*n).max(1) as f64).powf(-0.25)).collect();
    let top = root.iter().cloned().fold(f64::MIN_POSITIVE, f64::max);
    root.iter().map(|r| (largest as f64 * r / top) as f32).collect()
}

/// Logit-adjustment biases; an empty class counts as one cell, so that its bias is finite.
pub fn logit_adjustment(counts: &[u32], tau: f32) -> Vec<f32> {
    let total: f64 = counts.iter().map(|n| (*n).max(1) as f64).sum();
    counts.iter().map(|n| (tau as f64 * ((*n).max(1) as f64 / total).ln()) as f32).collect()
}

/// PCL temperatures (P) from the teacher's centred unit rows and unit prototypes (P, D); class -1 takes no part. A class of
/// fewer than two cells has no spread and takes the largest.
pub fn spread_temperatures(
    teacher: &Teacher,
    center: &[f32],
    class: &[i32],
    prototypes: &[f32],
    tau: f32,
) -> Vec<f32> {
    let width = teacher.width();
    let types = prototypes.len() / width;
    let (mut distance, mut count) = (vec![0.0f64; types], vec![0u32; types]);
    for (cell, class) in class.iter().enumerate().filter(|(_, c)| **c >= 0) {
        let k = *class as usize;
        let h = teacher.row(cell).iter().zip(center).map(|(h, c)| h.to_f64() - *c as f64);
        let (mut square, mut dot) = (0.0, 0.0);
        for (h, p) in h.zip(&prototypes[k * width..]) {
            square += h * h;
            dot += h * *p as f64;
        }
        let cosine = dot / square.max(1e-24).sqrt();
        distance[k] += (2.0 - 2.0 * cosine).max(0.0).sqrt();
        count[k] += 1;
    }
    let spread = |k: usize| distance[k] / count[k] as f64 / (count[k] as f64 + 10.0).ln();
    let known: Vec<f64> = (0..types).filter(|k| count[*k] >= 2).map(spread).collect();
    let top = known.iter().cloned().fold(0.0, f64::max);
    if top <= 0.0 {
        return vec![tau; types];
    }
    let mut phi: Vec<f64> = (0..types).map(|k| if count[k] >= 2 { spread(k) } else { top }).collect();
    let (low, high) = (percentile(&phi, 0.1), percentile(&phi, 0.9));
    // All cells of most classes on their prototypes: no temperature may reach 0.
    phi.iter_mut().for_each(|x| *x = x.clamp(low, high).max(1e-3 * top));
    let mean = phi.iter().sum::<f64>() / types as f64;
    phi.iter().map(|x| ((tau as f64 * x / mean) as f32).max(0.01)).collect()
}

/// Percentile with linear interpolation (numpy's default).
fn percentile(x: &[f64], q: f64) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((*g as f64 - w).abs() < 1e-5 * w.abs().max(1.0), "{got:?} {want:?}");
        }
    }

    /// Values from numpy: `w = (1-b)/(1-b**n); w/w.mean()`, and so on.
    #[test]
    fn known_values() {
        close(
            &effective_number_weights(&[1000, 100, 10, 1], 0.999),
            &[0.005686134, 0.037763531, 0.361159920, 3.595390415],
        );
        close(&effective_number_weights(&[5, 0], 0.0), &[1.0, 1.0]);
        close(&ldam_margins(&[16, 1, 0], 0.2), &[0.1, 0.2, 0.2]);
        close(&logit_adjustment(&[3, 1], 2.0), &[2.0 * 0.75f64.ln(), 2.0 * 0.25f64.ln()]);
        assert!((percentile(&[4.0, 1.0, 3.0, 2.0], 0.1) - 1.3).abs() < 1e-12);
    }

    #[test]
    fn wide_classes_get_higher_temperatures_with_mean_tau() {
        let mut teacher = Teacher::new(2);
        let mut class = Vec::new();
        for (k, spread) in [(0, 0.1f32), (1, 0.5)] {
            for i in 0..20 {
                let angle = k as f32 * 1.5 + spread * (i as f32 / 19.0 - 0.5);
                teacher.push(&[3.0 * angle.cos(), 3.0 * angle.sin()]).unwrap();
                class.push(k);
            }
        }
        let p = [1.0, 0.0, 1.5f32.cos(), 1.5f32.sin(), 0.0, 1.0];
        let phi = spread_temperatures(&teacher, &[0.0, 0.0], &class, &p, 0.07);
        assert!(phi[1] > 2.0 * phi[0] && phi[2] >= phi[1], "{phi:?}");
        assert!((phi.iter().sum::<f32>() / 3.0 - 0.07).abs() < 1e-6);
        let none = spread_temperatures(&teacher, &[0.0, 0.0], &[-1; 40], &p, 0.07);
        assert_eq!(none, [0.07; 3]);
    }
}
