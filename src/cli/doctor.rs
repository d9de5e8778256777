//! `cellrefine doctor`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("doctor is not written yet"))
}
