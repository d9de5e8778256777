//! `cellrefine annotate`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `annotate`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("annotate is not written yet"))
}
