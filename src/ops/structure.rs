//! Structure: cosines between prototypes follow the overlap of their marker sets.
//!
//! ```text
//! φ_kl = c0 + (c1 - c0) J_kl,   e_kl = p_k·p_l - φ_kl
//! loss_k = 1/(P(P-1)) Σ_{l≠k} e_kl²,   dp_k += scale · 4/(P(P-1)) Σ_{l≠k} e_kl p_l
//! ```
//! P = 1 gives 0. (method: L_struct with ω = 1.)

use super::check_all;
use crate::device::Device;
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// P.
    pub prototypes: usize,
    /// D.
    pub width: usize,
    /// Cosine wanted at overlap 0.
    pub c0: f32,
    /// Cosine wanted at overlap 1.
    pub c1: f32,
    /// Factor of the gradient: the term's weight.
    pub scale: f32,
}

/// A backend's structure term. All f32.
pub trait Structure: Device {
    /// Sets loss (P); dp (P, D) +=. `jaccard` is (P, P), symmetric.
    fn structure(
        &self,
        dims: Dims,
        p: &Self::Buf<f32>,
        jaccard: &Self::Buf<f32>,
        loss: &mut Self::Buf<f32>,
        dp: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// Checked call.
pub fn forward_backward<B: Structure>(
    dev: &B,
    dims: Dims,
    p: &B::Buf<f32>,
    jaccard: &B::Buf<f32>,
    loss: &mut B::Buf<f32>,
    dp: &mut B::Buf<f32>,
) -> Result<()> {
    let n = dims.prototypes * dims.width;
    check_all!("structure", p: p, n; jaccard: jaccard, dims.prototypes * dims.prototypes; loss: loss, dims.prototypes;
        dp: dp, n);
    let _range = crate::trace::range("structure");
    dev.structure(dims, p, jaccard, loss, dp)
}
