//! One error type for the whole crate: where, what was found, what was wanted, and what to do next.
//!
//! The library returns [`Error`]; only `main` prints it. Its [`Kind`] fixes the exit code of the command line, so that a
//! script can tell "the file is broken" from "this machine lacks memory" without reading text; its [`Code`] names the
//! failure for good, for `cellrefine explain` and for whoever searches for it.

mod code;
pub mod explain;

pub use code::Code;

use std::fmt;
use std::path::Path;

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something failed; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A fault of this program. Exit code 1.
    Bug,
    /// Wrong flags or settings. Exit code 2.
    Usage,
    /// A file, or what it holds, cannot be used. Exit code 3.
    Input,
    /// The machine lacks something: a device, memory, disk space. Exit code 4.
    Environment,
    /// Stopped by a signal after a checkpoint was written. Exit code 5.
    Interrupted,
    /// Training left the finite numbers. Exit code 6.
    Numerical,
}

impl Kind {
    /// The process exit code of this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Bug => 1,
            Kind::Usage => 2,
            Kind::Input => 3,
            Kind::Environment => 4,
            Kind::Interrupted => 5,
            Kind::Numerical => 6,
        }
    }

    /// Short lower-case name, as in the JSON form.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bug => "bug",
            Kind::Usage => "usage",
            Kind::Input => "input",
            Kind::Environment => "environment",
            Kind::Interrupted => "interrupted",
            Kind::Numerical => "numerical",
        }
    }
}

/// An error with its place and its remedy. Build it with a code, which fixes the kind, and the fields that apply:
///
/// ```
/// use cellrefine::error::{Code, Error};
/// let e = Error::new(Code::SparseOffsets, "indptr is not monotone")
///     .at("pbmc.h5ad:X/indptr[17]")
///     .found("1024 after 2048")
///     .wanted("offsets that never fall")
///     .next("re-export the file with anndata.write_h5ad");
/// assert_eq!((e.kind().exit_code(), e.code().to_string().as_str()), (3, "CR0307"));
/// ```
#[derive(Debug, Clone)]
pub struct Error(Box<Parts>);

#[derive(Debug, Clone)]
struct Parts {
    code: Code,
    what: String,
    place: Option<String>,
    found: Option<String>,
    wanted: Option<String>,
    next: Option<String>,
}

impl Error {
    /// A new error of `code`; `what` is one line without a final stop.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Error(Box::new(Parts { code, what: what.into(), place: None, found: None, wanted: None, next: None }))
    }
    /// A fault of this program (exit 1).
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(Code::Bug, what)
    }
    /// A device that refuses `bytes` of memory (exit 4); `free` is what it has left, of its whole, where that is known.
    pub fn out_of_memory(bytes: usize, free: Option<(usize, usize)>) -> Self {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let free =
            free.map_or(String::new(), |(free, of)| format!("; {:.2} of {:.2} MB free", mb(free), mb(of)));
        Self::new(Code::OutOfMemory, "out of memory").found(format!("{:.2} MB refused{free}", mb(bytes))).next(
            "lower batch.tokens, batch.cells or batch.max_tokens; `cellrefine plan` prints what a run needs",
        )
    }
    /// An operating-system error on `path`: a missing or unreadable file is bad input, a full disk or a failed
    /// write is the environment's.
    pub fn io(path: impl AsRef<Path>, doing: &str, e: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let code = match e.kind() {
            K::NotFound => Code::FileMissing,
            K::PermissionDenied => Code::FileForbidden,
            K::IsADirectory | K::NotADirectory => Code::FileKind,
            // No file can have such a name, or the name leads round in circles.
            K::InvalidInput | K::InvalidFilename => Code::FileMissing,
            _ if e.raw_os_error() == Some(libc::ELOOP) => Code::FileMissing,
            K::InvalidData | K::UnexpectedEof => Code::FileCut,
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Code::DiskFull,
            _ => Code::FileSystem,
        };
        Self::new(code, format!("cannot {doing}"))
            .at(path.as_ref().display().to_string())
            .found(e.to_string())
    }

    /// Where: `file`, `file:slot`, `file:line`.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.place = Some(place.to_string());
        self
    }
    /// What stood there.
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(found.to_string());
        self
    }
    /// What would have been right.
    pub fn wanted(mut self, wanted: impl fmt::Display) -> Self {
        self.0.wanted = Some(wanted.to_string());
        self
    }
    /// The next step for the user: a command where there is one.
    pub fn next(mut self, next: impl fmt::Display) -> Self {
        self.0.next = Some(next.to_string());
        self
    }

    /// Is this a refused allocation, of [`Error::out_of_memory`]?
    pub fn is_out_of_memory(&self) -> bool {
        self.0.code == Code::OutOfMemory
    }
    /// The code that names the failure.
    pub fn code(&self) -> Code {
        self.0.code
    }
    /// The kind, and with it the exit code.
    pub fn kind(&self) -> Kind {
        self.0.code.kind()
    }
    /// The one-line statement of what failed.
    pub fn what(&self) -> &str {
        &self.0.what
    }
    /// The place, where one was given.
    pub fn place(&self) -> Option<&str> {
        self.0.place.as_deref()
    }
    /// What was found, where it was said.
    pub fn found_text(&self) -> Option<&str> {
        self.0.found.as_deref()
    }
    /// What would have been right, where it was said.
    pub fn wanted_text(&self) -> Option<&str> {
        self.0.wanted.as_deref()
    }
    /// The next step, where one was given.
    pub fn next_text(&self) -> Option<&str> {
        self.0.next.as_deref()
    }
    /// The same object as printed under `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        let p = &self.0;
        let kind = p.code.kind();
        serde_json::json!({"error": {"code": p.code.to_string(), "kind": kind.name(), "message": p.what,
            "where": p.place, "found": p.found, "wanted": p.wanted, "next": p.next, "exit_code": kind.exit_code()}})
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.0;
        write!(f, "{}", p.what)?;
        for (name, text) in
            [("where", &p.place), ("found", &p.found), ("wanted", &p.wanted), ("try", &p.next)]
        {
            if let Some(text) = text {
                write!(f, "\n  {:<7} {text}", format!("{name}:"))?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// The name among `known` that is nearest to `name`, for "did you mean"; `None` when nothing is near.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    known
        .into_iter()
        .map(|k| (edit_distance(&lower, &k.to_lowercase()), k))
        .filter(|(d, k)| *d <= 1 + k.len().max(name.len()) / 3)
        .min()
        .map(|(_, k)| k)
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_has_one_line_per_field() {
        let e = Error::new(Code::ColumnMissing, "no such column")
            .at("a.h5ad:obs")
            .found("x, y")
            .wanted("z")
            .next("--label x");
        let lines: Vec<String> = e.to_string().lines().map(str::to_string).collect();
        assert_eq!(lines.len(), 5);
        assert!(lines[1].contains("a.h5ad:obs") && lines[4].contains("--label x"));
    }

    #[test]
    fn nearest_finds_a_typo_and_rejects_a_stranger() {
        assert_eq!(nearest("lerning_rate", ["learning_rate", "warmup"]), Some("learning_rate"));
        assert_eq!(nearest("zzzzzzzz", ["learning_rate", "warmup"]), None);
    }
}
