//! `cellrefine pack`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `pack`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("pack is not written yet"))
}
