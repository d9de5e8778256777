//! The oracles: each op written as its formula, in f64, one loop per sum.

use cellrefine::device::Dropout;
use cellrefine::rng;

/// x (m, k) · w (n, k)ᵀ.
pub fn matmul_nt(x: &[f64], w: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            y[i * n + j] = (0..k).map(|p| x[i * k + p] * w[j * k + p]).sum();
        }
    }
    y
}

/// The transpose of x (m, n).
pub fn transpose(x: &[f64], m: usize, n: usize) -> Vec<f64> {
    (0..m * n).map(|i| x[(i % m) * n + i / m]).collect()
}

/// Dropout factors of `rows` rows of `width` elements, straight from the generator.
pub fn dropout(d: Dropout, rows: usize, width: usize) -> Vec<f64> {
    let threshold = rng::dropout_threshold(d.probability);
    (0..rows * width)
        .map(|i| {
            let element = (d.first_row + (i / width) as u64) * width as u64 + (i % width) as u64;
            let lane = rng::lane16(rng::stream_block(d.seed, d.step, d.site, element / 8), element);
            if lane < threshold { 0.0 } else { rng::dropout_scale(d.probability) as f64 }
        })
        .collect()
}

/// LayerNorm of the rows of s: (y, mean, rstd).
pub fn layernorm(s: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (mut y, mut means, mut rstds) = (Vec::new(), Vec::new(), Vec::new());
    for row in s.chunks(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
        let rstd = 1.0 / (variance + eps).sqrt();
        y.extend((0..width).map(|i| (row[i] - mean) * rstd * weight[i] + bias[i]));
        means.push(mean);
        rstds.push(rstd);
    }
    (y, means, rstds)
}

/// Gradients of LayerNorm from dy: (dsum, dweight, dbias).
pub fn layernorm_backward(dy: &[f64], s: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (_, mean, rstd) = layernorm(s, weight, &vec![0.0; width], eps);
    let (mut ds, mut dweight, mut dbias) = (Vec::new(), vec![0.0; width], vec![0.0; width]);
    for (r, (dy, s)) in dy.chunks(width).zip(s.chunks(width)).enumerate() {
        let n: Vec<f64> = s.iter().map(|x| (x - mean[r]) * rstd[r]).collect();
        let g: Vec<f64> = (0..width).map(|i| dy[i] * weight[i]).collect();
        let mean_g = g.iter().sum::<f64>() / width as f64;
        let mean_gn = (0..width).map(|i| g[i] * n[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            dweight[i] += dy[i] * n[i];
            dbias[i] += dy[i];
            ds.push(rstd[r] * (g[i] - mean_g - n[i] * mean_gn));
        }
    }
    (ds, dweight, dbias)
}
