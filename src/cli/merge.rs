//! `cellrefine merge`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `merge`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("merge is not written yet"))
}
