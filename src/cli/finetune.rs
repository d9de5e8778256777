//! `cellrefine finetune`.

use super::{Global, Output};
use crate::error::{Error, Result};

/// Flags of `finetune`.
#[derive(Debug, clap::Args)]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
    Err(Error::bug("finetune is not written yet"))
}
