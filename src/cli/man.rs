//! `cellrefine man`: manual pages, one for the program and one a command, generated from the flags themselves.

use super::Output;
use crate::disk;
use crate::error::{Error, Result};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Flags of `man`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine man --out ~/.local/share/man/man1
  cellrefine man --out man && man -l man/cellrefine-refine.1")]
pub struct Flags {
    /// Folder for the pages; made where it is missing.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(mut program: clap::Command, flags: &Flags) -> Result<Output> {
    program.build();
    disk::create_folders(&flags.out).map_err(|e| Error::io(&flags.out, "make the folder", &e))?;
    let mut pages = Vec::new();
    page(&program, "cellrefine", &flags.out, &mut pages)?;
    Ok(Output {
        text: format!("{}: {} pages", flags.out.display(), pages.len()),
        json: json!({"out": flags.out, "pages": pages}),
    })
}

/// Writes the page of `command` and those of its subcommands: `cellrefine-vocab-build.1`.
fn page(command: &clap::Command, name: &str, out: &Path, pages: &mut Vec<String>) -> Result<()> {
    let file = format!("{name}.1");
    let path = out.join(&file);
    let mut text = Vec::new();
    let failed = |e: std::io::Error| Error::io(&path, "write the page", &e);
    clap_mangen::Man::new(command.clone().display_name(name.to_string()))
        .title(name.to_uppercase())
        .render(&mut text)
        .map_err(failed)?;
    disk::replace(&path, &text)?;
    pages.push(file);
    let visible = command.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set());
    for sub in visible {
        page(sub, &format!("{name}-{}", sub.get_name()), out, pages)?;
    }
    Ok(())
}
