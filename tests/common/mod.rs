//! The shared harness of the op tests: generic over the backend and the activation type.
//!
//! A test uploads its inputs with [`guarded::input`], takes outputs from [`guarded::poisoned`] (NaN in every element, guard
//! words on both sides), runs the op, reads back with [`Guarded::read`](guarded::Guarded::read), which also looks at the
//! guards, and compares with an f64 oracle of [`naive`] through [`close`].
#![allow(dead_code)] // every test binary uses its own part of the harness

pub mod attention;
pub mod cases;
pub mod close;
pub mod guarded;
#[cfg(emulator)]
pub mod mutants;
pub mod naive;
pub mod network;
pub mod softmax;
