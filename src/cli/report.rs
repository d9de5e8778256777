//! `cellrefine report`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `report`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("report is not written yet"))
}
