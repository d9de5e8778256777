//! `cellrefine explain`: what an error's code means and what to do, from the tables in `error::explain`.

use super::Output;
use crate::error::explain::{self, Explanation};
use crate::error::{Code, Error, Result, nearest};
use serde_json::{Value, json};
use std::fmt::Write;

/// Flags of `explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine explain CR0307
  cellrefine explain                 (all codes)
  cellrefine explain --json | jq -r '.codes[] | [.code, .exit_code, .title] | @tsv'")]
pub struct Flags {
    /// The code, as printed: CR0307. Without it, all codes are listed.
    #[arg(value_name = "CODE", conflicts_with = "markdown")]
    code: Option<String>,
    /// Print docs/errors.md.
    #[arg(long)]
    markdown: bool,
}

pub fn run(flags: &Flags) -> Result<Output> {
    if flags.markdown {
        let page = explain::page();
        return Ok(Output { json: json!({"markdown": page}), text: page });
    }
    match &flags.code {
        Some(text) => one(text),
        None => Ok(list()),
    }
}

fn one(text: &str) -> Result<Output> {
    let found = Code::parse(text).and_then(explain::of).ok_or_else(|| unknown(text))?;
    let Explanation { code, title, means, mend } = found;
    let mut out = format!(
        "{code}: {title}\n{} (exit code {})\n\n{}\n\n",
        code.area(),
        code.kind().exit_code(),
        fill(means, "")
    );
    for remedy in *mend {
        let _ = writeln!(out, "- {}", fill(remedy, "  "));
    }
    Ok(Output { text: out, json: object(found) })
}

fn list() -> Output {
    let mut text = String::new();
    let mut area = "";
    for e in explain::all() {
        if e.code.area() != area {
            let space = if area.is_empty() { "" } else { "\n" };
            area = e.code.area();
            let _ = writeln!(text, "{space}{area} (exit code {})", e.code.kind().exit_code());
        }
        let _ = writeln!(text, "  {}  {}", e.code, e.title);
    }
    Output { text, json: json!({"codes": explain::all().map(object).collect::<Vec<_>>()}) }
}

fn object(e: &Explanation) -> Value {
    json!({"code": e.code.to_string(), "kind": e.code.kind().name(), "exit_code": e.code.kind().exit_code(),
        "area": e.code.area(), "title": e.title, "means": e.means, "next": e.mend})
}

fn unknown(text: &str) -> Error {
    let all: Vec<String> = Code::ALL.iter().map(Code::to_string).collect();
    let e = Error::new(Code::CodeUnknown, "no such error code").found(text);
    match nearest(&text.to_uppercase(), all.iter().map(String::as_str)) {
        Some(near) => e.wanted(format!("such as {near}")).next("cellrefine explain"),
        None => e.wanted("CR and four digits, such as CR0307").next("cellrefine explain"),
    }
}

/// `text` in lines of at most 100 characters, those after the first behind `indent`.
fn fill(text: &str, indent: &str) -> String {
    let mut out = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > 100 {
            out.push('\n');
            out.push_str(indent);
            width = indent.len();
        } else if width > 0 {
            out.push(' ');
            width += 1;
        }
        out.push_str(word);
        width += length;
    }
    out
}
