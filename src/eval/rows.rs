//! Dense rows on the host, and the two matrix products that every measure here is made of.
//!
//! `Rows` is a checked view of a (C, D) table of f32: the length fits, every value is finite. Whoever holds one need not
//! look again, which is why no measure in `eval` has a NaN rule of its own. Products run in f64 over blocks of a fixed
//! size, so results carry no rounding of f32 sums and no trace of the number of threads.

use crate::error::{Code, Error, Result};
use gemm::Parallelism;
use rayon::prelude::*;

/// Rows per block of the blocked loops. A block of 64 × 1,024 doubles is 512 KiB: it stays in a core's L2 beside its partner.
pub(crate) const BLOCK: usize = 64;

/// A view of `count` rows of `width` finite numbers, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    values: &'a [f32], // (C, D)
    width: usize,
}

impl<'a> Rows<'a> {
    /// `values` as rows of `width`. Refuses a width of 0, a length that is no multiple of it, NaN and infinities.
    pub fn new(values: &'a [f32], width: usize) -> Result<Self> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return Err(Error::bug("a table of rows has the wrong length")
                .found(format!("{} values", values.len()))
                .wanted(format!("a multiple of the row width {width}")));
        }
        if let Some(i) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::new(
                Code::EmbeddingNotFinite,
                "the embeddings hold a value that is not finite",
            )
            .at(format!("row {}, column {}", i / width, i % width))
            .found(values[i])
            .wanted("finite numbers")
            .next(
                "check the checkpoint with `cellrefine inspect`; a run that diverged leaves such weights",
            ));
        }
        Ok(Rows { values, width })
    }

    /// Number of rows, C.
    pub fn count(&self) -> usize {
        self.values.len() / self.width
    }
    /// Row width, D.
    pub fn width(&self) -> usize {
        self.width
    }
    /// All values, (C, D).
    pub fn values(&self) -> &'a [f32] {
        self.values
    }
    /// Row `i`, (D).
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.width..(i + 1) * self.width]
    }
    /// A copy of the rows `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Vec<f32> {
        indices.iter().flat_map(|&i| self.row(i).iter().copied()).collect()
    }
    /// Column means, (D); zeros for no rows.
    pub fn mean(&self) -> Vec<f64> {
        let mut mean = vec![0f64; self.width];
        for row in self.values.chunks_exact(self.width) {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += x as f64);
        }
        let n = self.count().max(1) as f64;
        mean.iter_mut().for_each(|m| *m /= n);
        mean
    }
    /// Rows `range` widened to f64 into `out`.
    pub(crate) fn widen(&self, range: std::ops::Range<usize>, out: &mut Vec<f64>) {
        out.clear();
        out.extend(self.values[range.start * self.width..range.end * self.width].iter().map(|&x| x as f64));
    }
    /// ‖row‖² of every row.
    pub(crate) fn square_norms(&self) -> Vec<f64> {
        self.values.chunks_exact(self.width).map(|r| r.iter().map(|&x| x as f64 * x as f64).sum()).collect()
    }
}

/// `(x − centre) / ‖x − centre‖` of every row, (C, D). A row equal to the centre has no direction and becomes zeros.
///
/// Post-LN encoders put all cells into a narrow cone; cosines mean something only after the common direction is taken
/// away, and `centre` is that direction: the mean embedding of the training cells, or of the teacher.
pub fn centred_unit_rows(rows: Rows, centre: &[f64]) -> Vec<f32> {
    let width = rows.width();
    assert_eq!(centre.len(), width, "centre and rows differ in width");
    let mut out = vec![0f32; rows.values().len()];
    out.par_chunks_mut(BLOCK * width).zip(rows.values().par_chunks(BLOCK * width)).for_each(|(out, rows)| {
        for (out, row) in out.chunks_exact_mut(width).zip(rows.chunks_exact(width)) {
            let norm = row.iter().zip(centre).map(|(&x, c)| (x as f64 - c).powi(2)).sum::<f64>().sqrt();
            let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            out.iter_mut().zip(row).zip(centre).for_each(|((o, &x), c)| *o = ((x as f64 - c) * scale) as f32);
        }
    });
    out
}

/// `out (M, N) = a (M, K) · b (N, K)ᵀ`, on the calling thread.
pub(crate) fn product_abt(a: &[f64], b: &[f64], k: usize, out: &mut [f64]) {
    let (m, n) = (a.len() / k, b.len() / k);
    assert!(a.len() == m * k && b.len() == n * k && out.len() == m * n, "operand lengths disagree");
    // SAFETY: the three slices hold m·k, n·k and m·n elements (asserted), which is what the strides walk; `out` is
    // borrowed mutably and overlaps neither operand. dst is not read (read_dst = false).
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `out (M, N) = a (K, M)ᵀ · b (K, N)`, on the calling thread.
pub(crate) fn product_atb(a: &[f64], b: &[f64], k: usize, out: &mut [f64]) {
    if k == 0 {
        return out.fill(0.0);
    }
    let (m, n) = (a.len() / k, b.len() / k);
    assert!(a.len() == m * k && b.len() == n * k && out.len() == m * n, "operand lengths disagree");
    // SAFETY: as in `product_abt`: lengths asserted, `out` exclusive, dst not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            m as isize,
            1,
            b.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Refuses tables of unequal row counts or widths, naming both.
pub(crate) fn same_length(what: &str, rows: usize, labels: usize) -> Result<()> {
    if rows == labels {
        return Ok(());
    }
    Err(Error::bug(format!("{what}: rows and labels differ in number"))
        .found(format!("{labels} labels"))
        .wanted(format!("{rows}, one a row")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_equal_plain_loops_at_odd_sizes() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (64, 1, 9), (1, 33, 2), (17, 19, 65)] {
            let fill =
                |len: usize, s: f64| (0..len).map(|i| ((i as f64 + s) * 0.7).sin()).collect::<Vec<_>>();
            let (a, b) = (fill(m * k, 0.3), fill(n * k, 1.1));
            let mut out = vec![f64::NAN; m * n];
            product_abt(&a, &b, k, &mut out);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|t| a[i * k + t] * b[j * k + t]).sum();
                    assert!((out[i * n + j] - want).abs() < 1e-12);
                }
            }
            let (a, b) = (fill(k * m, 0.1), fill(k * n, 2.0));
            out.fill(f64::NAN);
            product_atb(&a, &b, k, &mut out);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|t| a[t * m + i] * b[t * n + j]).sum();
                    assert!((out[i * n + j] - want).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn rows_refuse_what_is_not_finite_and_say_where() {
        let e = Rows::new(&[1.0, 2.0, 3.0, f32::NAN, 5.0, 6.0], 3).unwrap_err();
        assert_eq!(e.kind().exit_code(), 3);
        assert_eq!(e.place(), Some("row 1, column 0"));
        assert!(Rows::new(&[1.0, f32::INFINITY], 1).is_err());
        assert!(Rows::new(&[1.0; 4], 3).is_err() && Rows::new(&[], 0).is_err());
        assert_eq!(Rows::new(&[], 3).unwrap().count(), 0);
    }

    #[test]
    fn a_row_at_the_centre_becomes_zeros() {
        let rows = Rows::new(&[1.0, 2.0, 4.0, 6.0], 2).unwrap();
        assert_eq!(centred_unit_rows(rows, &[1.0, 2.0]), [0.0, 0.0, 0.6, 0.8]);
    }
}
