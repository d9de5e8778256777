//! `cellrefine bench`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `bench`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("bench is not written yet"))
}
