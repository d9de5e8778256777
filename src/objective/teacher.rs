//! The frozen teacher's embeddings of the training cells: computed once, kept on the host in half precision.
//!
//! A post-LN encoder's embeddings are of order 1, so f16 (11 bits) keeps them within 5e-4; N × D · 2 bytes, 0.5 GB for a
//! million cells at D = 256. The mean is summed in f64 over the rows as they were given.

use crate::error::{Code, Error, Result};
use half::f16;

/// h⁰ (N, D) in table order.
#[derive(Debug, Clone)]
pub struct Teacher {
    width: usize,
    rows: Vec<f16>,
    sum: Vec<f64>,
}

impl Teacher {
    /// An empty table of rows of `width`.
    pub fn new(width: usize) -> Self {
        Teacher { width, rows: Vec::new(), sum: vec![0.0; width] }
    }
    /// Appends rows (any number, D). Fails on numbers beyond f16, NaN among them: an encoder that yields those is broken.
    pub fn push(&mut self, h: &[f32]) -> Result<()> {
        self.rows.reserve(h.len());
        for (i, row) in h.chunks_exact(self.width).enumerate() {
            for (sum, x) in self.sum.iter_mut().zip(row) {
                if x.is_nan() || x.abs() >= 65_504.0 {
                    return Err(Error::new(
                        Code::EmbeddingOverflow,
                        "the frozen encoder's embedding of a cell is not usable",
                    )
                    .at(format!("training cell {}", self.rows.len() / self.width + i))
                    .found(x)
                    .wanted("finite numbers below 65504")
                    .next("look at the checkpoint with `cellrefine inspect`"));
                }
                *sum += *x as f64;
            }
        }
        self.rows.extend(h.iter().map(|x| f16::from_f32(*x)));
        Ok(())
    }
    /// N.
    pub fn cells(&self) -> usize {
        self.rows.len() / self.width
    }
    /// D.
    pub fn width(&self) -> usize {
        self.width
    }
    /// One cell's row.
    pub fn row(&self, cell: usize) -> &[f16] {
        &self.rows[cell * self.width..(cell + 1) * self.width]
    }
    /// μ (D): the mean over all cells.
    pub fn mean(&self) -> Vec<f32> {
        let n = self.cells().max(1) as f64;
        self.sum.iter().map(|s| (s / n) as f32).collect()
    }
    /// Mean row (D) of some cells, or of all where there are none.
    pub fn mean_of(&self, cells: &[u32]) -> Vec<f32> {
        if cells.is_empty() {
            return self.mean();
        }
        let mut sum = vec![0.0f64; self.width];
        for cell in cells {
            for (sum, x) in sum.iter_mut().zip(self.row(*cell as usize)) {
                *sum += x.to_f64();
            }
        }
        sum.iter().map(|s| (s / cells.len() as f64) as f32).collect()
    }
    /// Rows of `cells` as f32, in their order.
    pub fn gather(&self, cells: &[u32], out: &mut Vec<f32>) {
        out.clear();
        for cell in cells {
            out.extend(self.row(*cell as usize).iter().map(|x| x.to_f32()));
        }
    }
    /// Bytes held on the host.
    pub fn bytes(&self) -> usize {
        self.rows.len() * 2
    }
}
