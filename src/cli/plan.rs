//! `cellrefine plan`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `plan`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("plan is not written yet"))
}
