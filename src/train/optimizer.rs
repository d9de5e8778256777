//! AdamW over flat stores: which ranges learn, how fast, and under one global gradient norm.
//!
//! Encoder, classifier and prototypes are groups: each has its own peak learning rate and moments; one norm over all of them
//! decides clipping and whether the step happens at all. Gradients averaged over `a` logical batches are not divided by `a`:
//! AdamW with `a·ε` and the threshold `a·clip` on their sum is the same update, exactly in real numbers, and saves a pass.

use crate::config::OptimizerSettings;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::model::Layout;
use crate::model::ledger::Ledger;
use crate::model::weights::{Parameter, Parts};
use crate::ops::{Backend, adamw, reduce};
use std::ops::Range;

/// Elements of a flat store that learn, and whether weight decay acts on them.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Elements.
    pub range: Range<usize>,
    /// Does weight decay act?
    pub decay: bool,
}

/// The spans of a layout whose parameters `learns` admits. Neighbours are merged, gaps between them included (they are zero
/// and stay zero), so that a whole network is two spans.
pub fn spans<P: Parts>(layout: &Layout<P>, learns: impl Fn(&Parameter) -> bool) -> Vec<Span> {
    let mut parts: Vec<(&Parameter, Range<usize>)> =
        layout.list().into_iter().map(|(parameter, range)| (parameter, range.clone())).collect();
    parts.sort_by_key(|(_, range)| range.start);
    let mut spans: Vec<Span> = Vec::new();
    let mut continues = false;
    for (parameter, range) in parts {
        let learning = learns(parameter);
        if learning {
            match spans.last_mut() {
                Some(last) if continues && last.decay == parameter.decay => last.range.end = range.end,
                _ => spans.push(Span { range, decay: parameter.decay }),
            }
        }
        continues = learning;
    }
    spans
}

/// First and second moments of a flat store.
pub struct Moments<B: Device> {
    /// m.
    pub m: B::Buf<f32>,
    /// v.
    pub v: B::Buf<f32>,
}

impl<B: Device> Moments<B> {
    /// Zeros for the `len` elements of `name`.
    pub fn planned(ledger: &mut Ledger<B>, name: &str, len: usize) -> Result<Self> {
        Ok(Moments {
            m: ledger.zeros(format!("first moments of {name}"), "(parameters)", len)?,
            v: ledger.zeros(format!("second moments of {name}"), "(parameters)", len)?,
        })
    }
}

/// What one call updates.
pub struct Group<'a, B: Device, A: Act> {
    /// Master weights.
    pub weight: &'a mut B::Buf<f32>,
    /// Activation-type copy, where there is one.
    pub copy: Option<&'a mut B::Buf<A>>,
    /// Gradient.
    pub grad: &'a B::Buf<f32>,
    /// Moments.
    pub moments: &'a mut Moments<B>,
    /// What learns.
    pub spans: &'a [Span],
    /// Learning rate of this step.
    pub learning_rate: f64,
}

/// Slot of the global Σ grad².
pub const NORM_SLOT: usize = 0;
/// Slot of the sum of a stage's own loss over the parts of a logical batch.
pub const LOSS_SLOT: usize = 1;
/// First slot of the refine objective's terms.
pub const TERM_SLOT: usize = 2;
/// First slot of the places of bad gradients, one per group.
pub const BAD_SLOT: usize = TERM_SLOT + crate::objective::SLOTS;
/// Groups at most: the network and a stage's own weights.
const GROUPS: usize = 2;
/// All scalars of a step.
pub const SLOTS: usize = BAD_SLOT + GROUPS;

/// Σ grad² over the groups, added to [`NORM_SLOT`], for [`update`]. Where it is not finite, the index of each group's first bad
/// element is left from [`BAD_SLOT`] on, or the group's length; a group that is `None` was reckoned before. Nothing is read back.
pub fn squared_norm<A: Act, B: Backend<A>>(
    dev: &B,
    gradients: [Option<(&B::Buf<f32>, usize)>; GROUPS],
    scalars: &mut B::Buf<f64>,
) -> Result<()> {
    for (grad, len) in gradients.iter().flatten() {
        reduce::add_sum_squares::<B>(dev, grad, *len, scalars, NORM_SLOT)?;
    }
    for (i, gradient) in gradients.iter().enumerate() {
        if let Some((grad, len)) = gradient {
            reduce::first_bad::<B>(dev, grad, *len, scalars, NORM_SLOT, BAD_SLOT + i)?;
        }
    }
    Ok(())
}

/// One AdamW update of `group`: the `update`-th that was applied, from 1, on gradients summed over `accumulated` batches.
/// Changes nothing where the norm is not finite.
pub fn update<A: Act, B: Backend<A>>(
    dev: &B,
    optimizer: &OptimizerSettings,
    update: u32,
    accumulated: usize,
    group: Group<'_, B, A>,
    scalars: &B::Buf<f64>,
) -> Result<()> {
    let Group { weight, mut copy, grad, moments, spans, learning_rate } = group;
    let batches = accumulated as f64;
    for span in spans {
        let hyper = adamw::Hyper {
            learning_rate: learning_rate as f32,
            beta1: optimizer.beta1 as f32,
            beta2: optimizer.beta2 as f32,
            eps: (optimizer.eps * batches) as f32,
            weight_decay: if span.decay { optimizer.weight_decay as f32 } else { 0.0 },
            step: update,
            max_norm: if optimizer.clip > 0.0 { (optimizer.clip * batches) as f32 } else { f32::INFINITY },
            norm_slot: NORM_SLOT,
        };
        let state = adamw::State {
            weight: &mut *weight,
            grad,
            m: &mut moments.m,
            v: &mut moments.v,
            copy: copy.as_deref_mut(),
            scalars,
        };
        adamw::step::<A, B>(dev, span.range.clone(), hyper, state)?;
    }
    Ok(())
}
