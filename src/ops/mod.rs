//! The ops: for each, the maths, the shapes, the checks, and one small trait that a backend implements.
//!
//! `ops/x.rs` holds the formula, `Dims`, the `In`/`Out` structs with a shape beside every buffer, and free functions that
//! check each buffer's length against `Dims` once, for every backend, and then call the trait. `cpu/x.rs` (and later
//! `cuda/x.rs` with `kernels/x.cu`) implement the trait and trust the shapes.
//!
//! Conventions: a forward sets its outputs. A backward ADDS into parameter gradients (f32) and SETS activation gradients,
//! unless the field says `+=`. Buffers may be longer than the shape (they are allocated for the largest batch); only the
//! leading elements are touched. Sums and statistics are f32 or better.

pub mod adamw;
pub mod anchor;
pub mod embed;
pub mod gene_attention;
pub mod layernorm;
pub mod linear;
pub mod mask_tokens;
pub mod normalize;
pub mod pool;
pub mod prototype_loss;
pub mod reduce;
pub mod rows;
pub mod structure;

use crate::device::{Act, Device, Len};
use crate::error::{Error, Result};

/// Everything the network and the objective need, for activation type `A`.
pub trait Backend<A: Act>:
    Device
    + embed::Embed<A>
    + layernorm::LayerNorm<A>
    + linear::Linear<A>
    + linear::Linear<f32>
    + gene_attention::GeneAttention<A>
    + rows::Rows<A>
    + pool::Pool<A>
    + prototype_loss::PrototypeLoss<A>
    + prototype_loss::PrototypeLoss<f32>
    + mask_tokens::MaskTokens
    + normalize::Normalize
    + anchor::Anchor
    + structure::Structure
    + adamw::AdamW<A>
    + reduce::Reduce
{
}

impl<A: Act, B> Backend<A> for B where
    B: Device
        + embed::Embed<A>
        + layernorm::LayerNorm<A>
        + linear::Linear<A>
        + linear::Linear<f32>
        + gene_attention::GeneAttention<A>
        + rows::Rows<A>
        + pool::Pool<A>
        + prototype_loss::PrototypeLoss<A>
        + prototype_loss::PrototypeLoss<f32>
        + mask_tokens::MaskTokens
        + normalize::Normalize
        + anchor::Anchor
        + structure::Structure
        + adamw::AdamW<A>
        + reduce::Reduce
{
}

/// Fails unless `buf` holds at least `wanted` elements. A violation is a fault of the caller inside this crate.
pub(crate) fn check_len(op: &str, name: &str, buf: &impl Len, wanted: usize) -> Result<()> {
    if buf.len() >= wanted {
        return Ok(());
    }
    Err(Error::bug(format!("{op}: buffer `{name}` is too short"))
        .found(format!("{} elements", buf.len()))
        .wanted(format!("at least {wanted}")))
}

/// `check_all!("op", x: (buf, rows * width), …)`: [`check_len`] for several buffers.
macro_rules! check_all {
    ($op:expr, $($name:ident: $buf:expr, $len:expr);+ $(;)?) => {
        $($crate::ops::check_len($op, stringify!($name), $buf, $len)?;)+
    };
}
pub(crate) use check_all;
