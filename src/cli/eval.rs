//! `cellrefine eval`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `eval`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("eval is not written yet"))
}
