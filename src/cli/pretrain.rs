//! `cellrefine pretrain`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `pretrain`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("pretrain is not written yet"))
}
