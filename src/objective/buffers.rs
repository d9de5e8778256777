//! The objective's memory: over prototypes, over the cells of a logical batch, and the host's copies of what a batch uploads.

use crate::device::Device;
use crate::error::Result;
use crate::model::ledger::Ledger;

/// Buffers over prototypes. P types, D wide.
pub(super) struct Prototypes<B: Device> {
    pub(super) q: B::Buf<f32>,            // (P, D) parameter
    pub(super) dq: B::Buf<f32>,           // (P, D)
    pub(super) p: B::Buf<f32>,            // (P, D)
    pub(super) dp: B::Buf<f32>,           // (P, D)
    pub(super) start: B::Buf<f32>,        // (P, D) p⁰
    pub(super) inverse_norm: B::Buf<f32>, // (P)
    pub(super) loss: B::Buf<f32>,         // (P)
    pub(super) scale: B::Buf<f32>,        // (P) 1/τ_k
    pub(super) bias: B::Buf<f32>,         // (P)
    pub(super) margin: B::Buf<f32>,       // (P)
    pub(super) jaccard: B::Buf<f32>,      // (P, P)
    pub(super) overlap: B::Buf<f32>,      // (P, P)
}

impl<B: Device> Prototypes<B> {
    /// Zeros for P types of width D.
    pub(super) fn planned(l: &mut Ledger<'_, B>, p: usize, width: usize) -> Result<Self> {
        let pd =
            |l: &mut Ledger<'_, B>, name: &str| l.zeros(format!("objective.{name}"), "(P, D)", p * width);
        let p1 = |l: &mut Ledger<'_, B>, name: &str| l.zeros(format!("objective.{name}"), "(P)", p);
        let pp = |l: &mut Ledger<'_, B>, name: &str| l.zeros(format!("objective.{name}"), "(P, P)", p * p);
        Ok(Prototypes {
            q: pd(l, "prototype")?,
            dq: pd(l, "dprototype")?,
            p: pd(l, "p")?,
            dp: pd(l, "dp")?,
            start: pd(l, "p_start")?,
            inverse_norm: p1(l, "p_inverse_norm")?,
            loss: p1(l, "p_loss")?,
            scale: p1(l, "p_scale")?,
            bias: p1(l, "p_bias")?,
            margin: p1(l, "p_margin")?,
            jaccard: pp(l, "jaccard")?,
            overlap: pp(l, "overlap")?,
        })
    }
}

/// Buffers over the cells of a logical batch. At most C cells.
pub(super) struct Cells<B: Device> {
    pub(super) z: B::Buf<f32>,            // (C, D)
    pub(super) dz: B::Buf<f32>,           // (C, D)
    pub(super) teacher_h: B::Buf<f32>,    // (C, D)
    pub(super) teacher_z: B::Buf<f32>,    // (C, D)
    pub(super) inverse_norm: B::Buf<f32>, // (C)
    pub(super) teacher_lse: B::Buf<f32>,  // (C)
    pub(super) loss: B::Buf<f32>,         // (C)
    pub(super) lse: B::Buf<f32>,          // (C)
    pub(super) row_weight: B::Buf<f32>,   // (C)
    pub(super) column: B::Buf<i32>,       // (C, entries)
    pub(super) mass: B::Buf<f32>,         // (C, entries)
    pub(super) label: B::Buf<i32>,        // (C)
    pub(super) scale: B::Buf<f32>,        // (C) 1/τ_c
    pub(super) bias: B::Buf<f32>,         // (C)
    pub(super) same_bias: B::Buf<f32>,    // (C)
}

impl<B: Device> Cells<B> {
    /// Zeros for at most C cells of width D with `entries` target entries each.
    pub(super) fn planned(l: &mut Ledger<'_, B>, c: usize, width: usize, entries: usize) -> Result<Self> {
        let cd =
            |l: &mut Ledger<'_, B>, name: &str| l.zeros(format!("objective.{name}"), "(C, D)", c * width);
        let c1 = |l: &mut Ledger<'_, B>, name: &str| l.zeros(format!("objective.{name}"), "(C)", c);
        Ok(Cells {
            z: cd(l, "z")?,
            dz: cd(l, "dz")?,
            teacher_h: cd(l, "teacher_h")?,
            teacher_z: cd(l, "teacher_z")?,
            inverse_norm: c1(l, "z_inverse_norm")?,
            teacher_lse: c1(l, "teacher_lse")?,
            loss: c1(l, "loss")?,
            lse: c1(l, "lse")?,
            row_weight: c1(l, "row_weight")?,
            column: l.zeros("objective.target", "(C, entries)", c * entries)?,
            mass: l.zeros("objective.target_mass", "(C, entries)", c * entries)?,
            label: l.zeros("objective.label", "(C)", c)?,
            scale: c1(l, "contrast_scale")?,
            bias: c1(l, "contrast_bias")?,
            same_bias: c1(l, "contrast_same_bias")?,
        })
    }
}

/// Host copies of what a batch uploads; kept to spare allocations.
#[derive(Default)]
pub(super) struct Staging {
    pub(super) teacher_h: Vec<f32>,
    pub(super) row_weight: Vec<f32>,
    pub(super) column: Vec<i32>,
    pub(super) mass: Vec<f32>,
    pub(super) label: Vec<i32>,
    pub(super) bias: Vec<f32>,
    pub(super) same_bias: Vec<f32>,
    pub(super) count: Vec<u32>,
}
