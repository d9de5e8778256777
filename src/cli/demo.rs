//! `cellrefine demo`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("demo is not written yet"))
}
