//! `cellrefine embed`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `embed`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("embed is not written yet"))
}
