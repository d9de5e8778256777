//! `cellrefine vocab`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `vocab`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("vocab is not written yet"))
}
