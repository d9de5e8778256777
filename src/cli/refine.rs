//! `cellrefine refine`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `refine`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("refine is not written yet"))
}
