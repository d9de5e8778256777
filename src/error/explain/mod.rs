//! What each code means and what to do about it: the tables behind `cellrefine explain` and docs/errors.md.
//!
//! One file an area. [`of`] is total over [`Code`]: a test finds a code without an explanation, or one explained twice.

mod cells;
mod corpora;
mod files;
mod genes;
mod machine;
mod models;
mod runs;
mod settings;

use super::Code;
use std::fmt::Write;

/// The explanation of one code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explanation {
    /// The code explained.
    pub code: Code,
    /// A few words, without a final stop.
    pub title: &'static str,
    /// What has happened, and why the program stops rather than goes on.
    pub means: &'static str,
    /// What to do, the likeliest remedy first.
    pub mend: &'static [&'static str],
}

const fn code(
    code: Code,
    title: &'static str,
    means: &'static str,
    mend: &'static [&'static str],
) -> Explanation {
    Explanation { code, title, means, mend }
}

/// All explanations, by code.
pub fn all() -> impl Iterator<Item = &'static Explanation> {
    [
        settings::TABLE,
        files::TABLE,
        cells::TABLE,
        genes::TABLE,
        corpora::TABLE,
        models::TABLE,
        runs::TABLE,
        machine::TABLE,
    ]
    .into_iter()
    .flatten()
}

/// The explanation of `code`; `None` would be a gap in the tables, which a test forbids.
pub fn of(code: Code) -> Option<&'static Explanation> {
    all().find(|e| e.code == code)
}

/// docs/errors.md: every code with its explanation, in the order of the numbers.
pub fn page() -> String {
    let mut out = String::from(
        "# Errors by code\n\n\
         Every error of `cellrefine` is printed with a stable code, on stderr and under `--json` on stdout:\n\n\
         ```\n\
         error[CR0307]: indptr falls\n  \
         where:  cells.h5ad:X/indptr[17]\n  \
         found:  1024 after 2048\n  \
         wanted: offsets that never fall\n  \
         try:    write the file again with anndata\n\
         ```\n\n\
         `cellrefine explain CR0307` prints what stands here, `cellrefine explain` the list. The first two digits are the\n\
         area and fix the exit code. A code keeps its meaning for good. This page is written from the program's own tables\n\
         (`cellrefine explain --markdown`); a test compares them.\n",
    );
    let mut area = "";
    for e in all() {
        if e.code.area() != area {
            area = e.code.area();
            let (digits, exit) = (e.code.number() / 100, e.code.kind().exit_code());
            let _ = writeln!(out, "\n## CR{digits:02}: {area} (exit code {exit})");
        }
        let _ = writeln!(out, "\n### {}: {}\n{}", e.code, e.title, e.means);
        e.mend.iter().for_each(|m| {
            let _ = writeln!(out, "- {m}");
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_explained_once_and_in_order() {
        let explained: Vec<Code> = all().map(|e| e.code).collect();
        assert_eq!(explained, Code::ALL);
    }

    #[test]
    fn explanations_say_something() {
        for e in all() {
            assert!(!e.title.ends_with('.') && e.means.ends_with('.') && e.means.len() > 40, "{}", e.code);
            assert!(!e.mend.is_empty() && e.mend.iter().all(|m| !m.is_empty()), "{}", e.code);
        }
    }
}
