//! Every op of the network's body against its f64 oracle: both activation types, odd sizes, guard words round every buffer,
//! NaN in every output, the same bits for 1, 2 and 3 threads. One file per op, its bodies generic over the backend; a
//! backend joins by its lines in [`on_every_backend`].

#[path = "../common/mod.rs"]
mod common;

use cellrefine::device::{Act, Dropout};
use common::guarded::Sample;

/// One test per body and backend, and per activation type where the op has one: `on_every_backend!(A: forward)` calls
/// `forward::<_, f32>(&backend)` and `forward::<_, bf16>(&backend)`, `on_every_backend!(sum)` calls `sum(&backend)`.
macro_rules! on_every_backend {
    (A: $($body:ident),* $(,)?) => {
        mod cpu_f32 {
            $(#[test] fn $body() { super::$body::<_, f32>(&cellrefine::cpu::Cpu); })*
        }
        mod cpu_bf16 {
            $(#[test] fn $body() { super::$body::<_, half::bf16>(&cellrefine::cpu::Cpu); })*
        }
    };
    ($($body:ident),* $(,)?) => {
        mod cpu {
            $(#[test] fn $body() { super::$body(&cellrefine::cpu::Cpu); })*
        }
    };
}

mod adamw;
mod embed;
mod layernorm;
mod linear;
mod mask_tokens;
mod pool;
mod reduce;
mod rows;

/// Activations that can be poisoned and guarded.
pub trait ActSample: Act + Sample {}
impl<A: Act + Sample> ActSample for A {}

/// Dropout of the tests that have some.
const DROPOUT: Dropout =
    Dropout { probability: 0.25, seed: 0xABCD_EF01_2345, step: 3, site: 5, first_row: 1000 };
