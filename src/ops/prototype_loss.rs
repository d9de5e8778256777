//! Streaming softmax loss: prototypes, masked genes, classes and cell–cell contrast are the same op.
//!
//! Rows z_i (R, D) against columns p_k (P, D); the (R, P) matrix is never stored:
//! ```text
//! s_ik  = scale_k · (z_i·p_k - margin_k 1[k = label_i]) + bias_k           (+ same_bias_k where labels are equal)
//! lse_i = log Σ_k exp(s_ik)                                          (excluded columns left out)
//! loss_i = κ_i ( lse_i - Σ_k t_ik s'_ik ),    s' = s, or s without its biases (`bias_in_target = false`)
//! dz_i  = g · κ_i Σ_k (p̂_ik - t_ik) scale_k p_k,     p̂_ik = exp(s_ik - lse_i),     g = gradient_scale
//! dp_k += g · scale_k Σ_i κ_i (p̂_ik - t_ik) z_i;     dbias_k += g Σ_i κ_i (p̂_ik - t_ik)
//! dscale_k += g Σ_i κ_i (p̂_ik - t_ik) (z_i·p_k - margin_k 1[k = label_i])
//! ```
//! The forward pass yields loss, lse and dz (it is attention with values scale_k·p_k); only the column gradients need a
//! second pass, which recomputes p̂ from lse. Online max and sum in f32; loss in f32 per row.
//!
//! Targets t_i (rows sum to 1): sparse entries, mixed with a class-overlap matrix and with a frozen teacher; or uniform
//! over the columns of the row's own label (supervised contrast).

use super::check_all;
use crate::device::{Act, Device};
use crate::error::{Error, Result};

/// Sizes and switches of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// R.
    pub rows: usize,
    /// P.
    pub columns: usize,
    /// D.
    pub width: usize,
    /// g: factor of every gradient (the term's weight).
    pub gradient_scale: f32,
    /// Whether the target's logit holds its bias (cross-entropy) or not (supervised contrast with balancing biases).
    pub bias_in_target: bool,
}

/// What both passes read.
pub struct In<'a, B: Device, A: Act> {
    /// (R, D).
    pub z: &'a B::Buf<A>,
    /// (P, D).
    pub column: &'a B::Buf<A>,
    /// (P) 1/τ_k; absent = 1.
    pub scale: Option<&'a B::Buf<f32>>,
    /// (P) bias; absent = 0.
    pub bias: Option<&'a B::Buf<f32>>,
    /// (P) margin in cosine units on the label's column (sparse targets: entry 0 is the label); absent = 0.
    pub margin: Option<&'a B::Buf<f32>>,
    /// (R) κ_i: row weight, already divided by their sum over the logical batch; 0 skips the row (dz = 0, loss = 0).
    pub row_weight: &'a B::Buf<f32>,
    /// What the softmax should be.
    pub target: Target<'a, B>,
}

/// Target distribution of each row.
pub enum Target<'a, B: Device> {
    /// `t_i = (1-ε-δ) Σ_m mass_im e_{column_im} + ε Σ_m mass_im mix[column_im, :] + δ softmax_k(teacher)`
    Sparse {
        /// Entries per row.
        entries: usize,
        /// (R, entries) column, or -1 for none.
        column: &'a B::Buf<i32>,
        /// (R, entries) mass, each row summing to 1; absent = 1 (one entry).
        mass: Option<&'a B::Buf<f32>>,
        /// ε and its (P, P) row-stochastic matrix.
        mix: Option<Mix<'a, B>>,
        /// δ and the frozen teacher.
        teacher: Option<Teacher<'a, B>>,
    },
    /// Uniform over the columns with the row's label, the row's own column left out of target and softmax. Rows without
    /// such a column, and rows with label -1, are skipped.
    SameLabel {
        /// (R) label, or -1.
        row_label: &'a B::Buf<i32>,
        /// (P) label, or -1.
        column_label: &'a B::Buf<i32>,
        /// Column of row 0's own cell; row i's own column is `first_self + i`.
        first_self: usize,
        /// (P) bias where the labels are equal, in place of `bias` (β_ia of the balanced SupCon); absent = `bias`.
        same_bias: Option<&'a B::Buf<f32>>,
    },
}

/// Share of the target given by class overlap.
pub struct Mix<'a, B: Device> {
    /// (P, P), rows sum to 1.
    pub matrix: &'a B::Buf<f32>,
    /// ε.
    pub share: f32,
}

/// Share of the target given by the frozen teacher: softmax_k(scale · z⁰_i·p⁰_k), streamed as well.
pub struct Teacher<'a, B: Device> {
    /// (R, D).
    pub z: &'a B::Buf<f32>,
    /// (P, D).
    pub column: &'a B::Buf<f32>,
    /// (R) log Σ exp of the teacher's logits, from [`lse`].
    pub lse: &'a B::Buf<f32>,
    /// 1/τ of the teacher.
    pub scale: f32,
    /// δ.
    pub share: f32,
}

/// What the forward pass sets.
pub struct Out<'a, B: Device, A: Act> {
    /// (R) κ-weighted loss.
    pub loss: &'a mut B::Buf<f32>,
    /// (R).
    pub lse: &'a mut B::Buf<f32>,
    /// (R, D): set, or added to when `accumulate_dz`.
    pub dz: &'a mut B::Buf<A>,
    /// `dz += …`.
    pub accumulate_dz: bool,
}

/// What the second pass adds to.
pub struct ColumnGradients<'a, B: Device> {
    /// (P, D) +=.
    pub column: &'a mut B::Buf<f32>,
    /// (P) +=.
    pub bias: Option<&'a mut B::Buf<f32>>,
    /// (P) += gradient of `scale`.
    pub scale: Option<&'a mut B::Buf<f32>>,
}

/// A backend's streaming softmax loss.
pub trait PrototypeLoss<A: Act>: Device {
    /// Loss, lse and row gradients.
    fn prototype_loss_forward(&self, dims: Dims, input: In<'_, Self, A>, out: Out<'_, Self, A>)
    -> Result<()>;
    /// Column gradients from the saved `lse` (R).
    fn prototype_loss_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        lse: &Self::Buf<f32>,
        grads: ColumnGradients<'_, Self>,
    ) -> Result<()>;
    /// Sets lse (R) of `scale · z_i·p_k` alone (no bias, no margin): the teacher's normaliser.
    fn prototype_loss_lse(
        &self,
        dims: Dims,
        z: &Self::Buf<A>,
        column: &Self::Buf<A>,
        scale: f32,
        lse: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

fn check<B: Device, A: Act>(d: Dims, i: &In<'_, B, A>) -> Result<()> {
    if d.columns == 0 || d.width == 0 {
        return Err(Error::bug("prototype_loss: no columns or no width").found(format!("{d:?}")));
    }
    check_all!("prototype_loss", z: i.z, d.rows * d.width; column: i.column, d.columns * d.width;
        row_weight: i.row_weight, d.rows);
    for (name, buf) in [("scale", i.scale), ("bias", i.bias), ("margin", i.margin)] {
        if let Some(buf) = buf {
            super::check_len("prototype_loss", name, buf, d.columns)?;
        }
    }
    match &i.target {
        Target::Sparse { entries, column, mass, mix, teacher } => {
            check_all!("prototype_loss", target_column: *column, d.rows * entries);
            if let Some(mass) = mass {
                check_all!("prototype_loss", target_mass: *mass, d.rows * entries);
            } else if *entries != 1 {
                return Err(Error::bug("prototype_loss: several target entries without their masses"));
            }
            if let Some(mix) = mix {
                check_all!("prototype_loss", mix: mix.matrix, d.columns * d.columns);
            }
            if let Some(t) = teacher {
                check_all!("prototype_loss", teacher_z: t.z, d.rows * d.width; teacher_lse: t.lse, d.rows;
                    teacher_column: t.column, d.columns * d.width);
            }
        }
        Target::SameLabel { row_label, column_label, first_self, same_bias } => {
            check_all!("prototype_loss", row_label: *row_label, d.rows; column_label: *column_label, d.columns);
            if let Some(b) = same_bias {
                check_all!("prototype_loss", same_bias: *b, d.columns);
            }
            if first_self + d.rows > d.columns {
                return Err(
                    Error::bug("prototype_loss: a row's own column lies outside").found(first_self + d.rows)
                );
            }
        }
    }
    Ok(())
}

/// Checked first pass.
pub fn forward<A: Act, B: PrototypeLoss<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    out: Out<'_, B, A>,
) -> Result<()> {
    check(dims, &input)?;
    check_all!("prototype_loss", loss: out.loss, dims.rows; lse: out.lse, dims.rows; dz: out.dz, dims.rows * dims.width);
    let _range = crate::trace::range("prototype_loss_forward");
    dev.prototype_loss_forward(dims, input, out)
}

/// Checked second pass.
pub fn backward<A: Act, B: PrototypeLoss<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    lse: &B::Buf<f32>,
    grads: ColumnGradients<'_, B>,
) -> Result<()> {
    check(dims, &input)?;
    check_all!("prototype_loss columns", lse: lse, dims.rows; dcolumn: grads.column, dims.columns * dims.width);
    for (name, buf) in [("dbias", &grads.bias), ("dscale", &grads.scale)] {
        if let Some(buf) = buf {
            super::check_len("prototype_loss columns", name, *buf, dims.columns)?;
        }
    }
    let _range = crate::trace::range("prototype_loss_backward");
    dev.prototype_loss_backward(dims, input, lse, grads)
}

/// Checked normaliser: sets lse (R).
pub fn lse<A: Act, B: PrototypeLoss<A>>(
    dev: &B,
    dims: Dims,
    z: &B::Buf<A>,
    column: &B::Buf<A>,
    scale: f32,
    lse: &mut B::Buf<f32>,
) -> Result<()> {
    check_all!("prototype_loss lse", z: z, dims.rows * dims.width; column: column, dims.columns * dims.width;
        lse: lse, dims.rows);
    let _range = crate::trace::range("prototype_loss_lse");
    dev.prototype_loss_lse(dims, z, column, scale, lse)
}
