//! `cellrefine markers`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `markers`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("markers is not written yet"))
}
