//! `cellrefine completions`: what a shell needs to complete commands, flags and their values; generated from the flags themselves.

use super::Output;
use crate::error::{Error, Result};
use clap_complete::Shell;
use serde_json::json;

/// Flags of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine completions bash > ~/.local/share/bash-completion/completions/cellrefine
  cellrefine completions zsh > ~/.zfunc/_cellrefine        (with fpath+=~/.zfunc before compinit in ~/.zshrc)
  cellrefine completions fish > ~/.config/fish/completions/cellrefine.fish")]
pub struct Flags {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(program: &clap::Command, flags: &Flags) -> Result<Output> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut program.clone(), "cellrefine", &mut script);
    let text = String::from_utf8(script).map_err(|e| Error::bug(format!("a completion script: {e}")))?;
    Ok(Output { json: json!({"shell": flags.shell.to_string(), "script": text}), text })
}
