//! `cellrefine inspect`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("inspect is not written yet"))
}
