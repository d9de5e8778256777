//! Labels without a classifier: nearest prototype, marker score, or both together.
//!
//! ```text
//! prototype   s_ik = cos(h_i − μ, q_k − μ)              μ: mean embedding of the teacher (or of the reference cells)
//! markers     s_ik = u_ik / max_{j in reference} u_jk   u: marker score of the rank tokens
//! both        s_ik = the sum of the two
//! p_ik = softmax_k(s_ik / τ)
//! beside a classifier's logits l: softmax_k(l_ik + u_ik / (τ max_j u_jk))
//! ```
//!
//! Why these forms. The cosine is taken after subtracting μ because all embeddings of a post-LN encoder share one large
//! component. A marker score is bounded by what its set can reach, which differs from set to set; the best reference cell shows
//! how much that is, so both evidences are at most about 1 and mean "as good as the best example". Their sum at one temperature
//! is the product of the two softmaxes, renormalised: two experts that err independently. No labels enter, and a cell's
//! scores depend on the cell and the reference, never on the other cells asked about.

use super::rows::{BLOCK, Rows, centred_unit_rows, product_abt, same_length};
use crate::error::{Code, Error, Result};
use rayon::prelude::*;
use serde::Serialize;

/// What speaks for a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Evidence {
    /// Cosine to the type's prototype.
    Prototype,
    /// Marker score of the rank tokens.
    Markers,
    /// Both, added.
    Both,
}

impl Evidence {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Evidence::Prototype => "prototype",
            Evidence::Markers => "markers",
            Evidence::Both => "both",
        }
    }
}

/// Temperature of the softmax where no checkpoint names one: that of the prototype loss.
pub const TEMPERATURE: f32 = 0.07;

/// Cosines (C, P) of `rows` and `prototypes` (P, D), both minus `centre` (D).
pub fn cosines(rows: Rows, prototypes: Rows, centre: &[f32]) -> Result<Vec<f32>> {
    let width = rows.width();
    if prototypes.width() != width || centre.len() != width {
        return Err(Error::bug("cells and prototypes differ in width")
            .found(format!("prototypes {}, centre {}", prototypes.width(), centre.len()))
            .wanted(width));
    }
    let centre: Vec<f64> = centre.iter().map(|&x| x as f64).collect();
    let (z, p) = (centred_unit_rows(rows, &centre), centred_unit_rows(prototypes, &centre));
    let (z, p_rows) = (Rows::new(&z, width)?, Rows::new(&p, width)?);
    let mut p = Vec::new();
    p_rows.widen(0..p_rows.count(), &mut p);
    let types = p_rows.count();
    let mut out = vec![0f32; rows.count() * types];
    out.par_chunks_mut(BLOCK * types.max(1)).enumerate().for_each_init(
        || (Vec::new(), vec![0f64; BLOCK * types]),
        |(block_rows, products), (block, out)| {
            let count = out.len() / types;
            z.widen(block * BLOCK..block * BLOCK + count, block_rows);
            let products = &mut products[..out.len()];
            product_abt(block_rows, &p, width, products);
            out.iter_mut().zip(products).for_each(|(o, x)| *o = x.clamp(-1.0, 1.0) as f32);
        },
    );
    Ok(out)
}

/// Largest marker score of each type over reference cells: what a full score is.
#[derive(Debug, Clone, PartialEq)]
pub struct MarkerScale {
    best: Vec<f32>, // (P)
}

impl MarkerScale {
    /// From raw scores u (cells, P) of the reference.
    pub fn fit(scores: &[f32], types: usize) -> Self {
        let mut best = vec![0f32; types];
        for row in scores.chunks_exact(types.max(1)) {
            best.iter_mut().zip(row).for_each(|(b, &u)| *b = b.max(u));
        }
        MarkerScale { best }
    }
    /// u / best, in place; a type that no reference cell scores on stays at 0.
    pub fn apply(&self, scores: &mut [f32]) {
        for row in scores.chunks_exact_mut(self.best.len().max(1)) {
            row.iter_mut().zip(&self.best).for_each(|(u, &b)| *u = if b > 0.0 { *u / b } else { 0.0 });
        }
    }
}

/// s (C, P): the evidence asked for out of cosines and scaled marker scores, (C, P) each.
pub fn combine(evidence: Evidence, cosines: Option<&[f32]>, markers: Option<&[f32]>) -> Result<Vec<f32>> {
    let need = |e: Option<&[f32]>, what: &str, next: &str| {
        e.map(<[f32]>::to_vec)
            .ok_or_else(|| Error::new(Code::MarkersNeeded, format!("this evidence needs {what}")).next(next))
    };
    let prototype =
        || need(cosines, "prototypes", "give a refined checkpoint, or --markers to make prototypes from");
    let marker = || need(markers, "marker sets", "--markers M.gmt");
    match evidence {
        Evidence::Prototype => prototype(),
        Evidence::Markers => marker(),
        Evidence::Both => {
            let (mut s, m) = (prototype()?, marker()?);
            same_length("evidence", s.len(), m.len())?;
            s.iter_mut().zip(m).for_each(|(s, m)| *s += m);
            Ok(s)
        }
    }
}

/// Classifier logits (classes) with marker evidence beside them: `logit_c + u_c / τ`, `u` (P) scaled scores, `column` the type of
/// each class. The product of the classifier's softmax and that of the markers.
pub fn with_markers(logits: &[f32], u: &[f32], column: &[usize]) -> Vec<f32> {
    logits.iter().zip(column).map(|(logit, k)| logit + u[*k] / TEMPERATURE).collect()
}

/// Softmax over types of s / τ, (C, P), in place.
pub fn posterior(scores: &mut [f32], types: usize, temperature: f32) {
    for row in scores.chunks_exact_mut(types.max(1)) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|s| *s = ((*s - max) / temperature).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|s| *s /= sum);
    }
}

/// The `k` highest of one row, best first; equal scores in column order.
pub fn top(row: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_are_taken_about_the_centre() {
        // Without the centre both cells point the same way; about it they are opposite.
        let cells = [11.0f32, 10.0, 9.0, 10.0];
        let prototypes = [12.0f32, 10.0, 10.0, 13.0];
        let c = cosines(Rows::new(&cells, 2).unwrap(), Rows::new(&prototypes, 2).unwrap(), &[10.0, 10.0])
            .unwrap();
        assert_eq!(c, [1.0, 0.0, -1.0, 0.0]);
        assert!(cosines(Rows::new(&cells, 2).unwrap(), Rows::new(&prototypes, 2).unwrap(), &[0.0]).is_err());
    }

    #[test]
    fn markers_beside_a_classifier_are_a_product_too_in_the_classes_order() {
        let (logits, u, column) = ([1.0f32, -2.0, 0.5], [0.1f32, 0.8, 0.4, 0.3], [3usize, 0, 1]);
        let mut both = with_markers(&logits, &u, &column);
        let mut classifier = logits.to_vec();
        let mut markers: Vec<f32> = column.iter().map(|k| u[*k]).collect();
        posterior(&mut both, 3, 1.0);
        posterior(&mut classifier, 3, 1.0);
        posterior(&mut markers, 3, TEMPERATURE);
        let product: Vec<f32> = classifier.iter().zip(&markers).map(|(a, b)| a * b).collect();
        let sum: f32 = product.iter().sum();
        both.iter().zip(&product).for_each(|(b, p)| assert!((b - p / sum).abs() < 1e-5, "{both:?}"));
    }

    #[test]
    fn both_is_the_product_of_the_two_softmaxes() {
        let (c, u) = (vec![0.9f32, 0.2, -0.4], vec![0.1f32, 0.8, 0.3]);
        let softmax = |s: &[f32]| {
            let mut s = s.to_vec();
            posterior(&mut s, 3, 0.3);
            s
        };
        let (a, b) = (softmax(&c), softmax(&u));
        let both = softmax(&combine(Evidence::Both, Some(&c), Some(&u)).unwrap());
        let product: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a * b).collect();
        let sum: f32 = product.iter().sum();
        assert!(both.iter().zip(&product).all(|(x, p)| (x - p / sum).abs() < 1e-6));
        assert_eq!(combine(Evidence::Both, Some(&c), None).unwrap_err().kind().exit_code(), 2);
    }

    #[test]
    fn scales_by_the_best_reference_cell_and_survives_a_set_that_scores_nowhere() {
        let scale = MarkerScale::fit(&[0.2, 0.0, 0.4, 0.0], 2);
        let mut u = vec![0.1, 0.0, 0.8, 0.5];
        scale.apply(&mut u);
        assert_eq!(u, [0.25, 0.0, 2.0, 0.0]);
    }

    #[test]
    fn top_orders_ties_by_column_and_is_bounded_by_the_types() {
        assert_eq!(top(&[0.5, 0.9, 0.5], 5), [1, 0, 2]);
        assert_eq!(top(&[0.5, 0.9, 0.5], 1), [1]);
    }
}
