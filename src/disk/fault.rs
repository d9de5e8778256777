//! Faults on purpose: the n-th write, sync, rename, ... of a class of files fails, or is the last thing the process does.
//!
//! `CELLREFINE_FAULT=CLASS:OPERATION:N[+][:ACTION]`, several divided by commas, switches it on; without the variable an operation
//! pays one load and one branch. Counting is per rule, from 1; `N+` is every one from the N-th on, as a full disk is.
//!
//! | part | words |
//! |---|---|
//! | CLASS | `ckpt` (below `checkpoints/`, and the pointers `best`, `last`), `corpus` (below the hidden folder of an unfinished corpus), `log` (metrics, TensorBoard), `other`, `any` |
//! | OPERATION | `create` (files and folders), `write`, `fsync` (files and folders), `rename`, `remove`, `any` |
//! | ACTION | `die` (the default: SIGKILL before the operation), `torn` (half of a write, then SIGKILL), `eio`, `enospc`, `short` (half of a write, which its caller must continue) |
//!
//! `CELLREFINE_FAULT_RECORD=FILE` appends every operation with its bytes to FILE, one JSON object a line ([`Entry`]): a test
//! replays a power loss from it, dropping and reordering what no sync had fixed.

use crate::digest::hex;
use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// The variable that makes faults.
pub const VARIABLE: &str = "CELLREFINE_FAULT";
/// The variable that names the record.
pub const RECORD: &str = "CELLREFINE_FAULT_RECORD";

/// What is about to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A file or folder made, or a file emptied.
    Create,
    /// Bytes written, or the length set.
    Write,
    /// A file or folder synced.
    Sync,
    /// A file or folder renamed.
    Rename,
    /// A file or folder removed.
    Remove,
}

/// Which file it is done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Checkpoint,
    Corpus,
    Log,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Die,
    Torn,
    Fail(i32),
    Short,
}

/// How an operation goes on that was not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As asked.
    Go,
    /// Half of the bytes.
    Short,
    /// Half of the bytes, and no more of this process.
    Torn,
}

#[derive(Debug)]
struct Rule {
    class: Option<Class>,
    operation: Option<Operation>,
    first: u64,
    onwards: bool,
    action: Action,
    seen: AtomicU64,
}

#[derive(Debug)]
struct State {
    rules: Vec<Rule>,
    record: Option<Mutex<File>>,
}

static STATE: OnceLock<Option<State>> = OnceLock::new();

fn state() -> Option<&'static State> {
    STATE.get_or_init(|| read().unwrap_or_default()).as_ref()
}

fn read() -> Result<Option<State>> {
    let rules = match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => parse(&text)?,
        _ => Vec::new(),
    };
    let record = match std::env::var_os(RECORD) {
        Some(path) if !path.is_empty() => {
            let file = File::options().create(true).append(true).open(&path);
            Some(Mutex::new(file.map_err(|e| Error::io(&path, "open the record of operations", &e))?))
        }
        _ => None,
    };
    Ok((!rules.is_empty() || record.is_some()).then_some(State { rules, record }))
}

/// Are the variables well formed? Asked once, by the program, before it does anything.
///
/// # Errors
/// Usage: a rule that is none. A record that cannot be opened.
pub fn check() -> Result<()> {
    read().map(|_| ())
}

fn parse(text: &str) -> Result<Vec<Rule>> {
    text.split(',').map(|rule| parse_rule(rule.trim())).collect()
}

fn parse_rule(text: &str) -> Result<Rule> {
    let bad = || {
        Error::new(Code::SettingValue, "not a fault")
            .at(VARIABLE)
            .found(format!("{text:?}"))
            .wanted("CLASS:OPERATION:N[+][:ACTION], such as ckpt:write:3 or any:fsync:1:eio")
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (class, operation, count, action) = match parts[..] {
        [class, operation, count] => (class, operation, count, "die"),
        [class, operation, count, action] => (class, operation, count, action),
        _ => return Err(bad()),
    };
    let class = match class {
        "ckpt" => Some(Class::Checkpoint),
        "corpus" => Some(Class::Corpus),
        "log" => Some(Class::Log),
        "other" => Some(Class::Other),
        "any" => None,
        _ => return Err(bad()),
    };
    let operation = match operation {
        "create" => Some(Operation::Create),
        "write" => Some(Operation::Write),
        "fsync" => Some(Operation::Sync),
        "rename" => Some(Operation::Rename),
        "remove" => Some(Operation::Remove),
        "any" => None,
        _ => return Err(bad()),
    };
    let action = match action {
        "die" => Action::Die,
        "torn" => Action::Torn,
        "short" => Action::Short,
        "eio" => Action::Fail(libc::EIO),
        "enospc" => Action::Fail(libc::ENOSPC),
        _ => return Err(bad()),
    };
    let onwards = count.ends_with('+');
    let first = count.trim_end_matches('+').parse().ok().filter(|n| *n > 0).ok_or_else(bad)?;
    Ok(Rule { class, operation, first, onwards, action, seen: AtomicU64::new(0) })
}

fn class_of(path: &Path) -> Class {
    let names: Vec<_> = path.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    let last = names.last().map(|n| n.trim_start_matches('.')).unwrap_or_default();
    let is = |name: &str| last == name || last.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    if names.iter().any(|n| n == "checkpoints") || is("best") || is("last") {
        Class::Checkpoint
    } else if is("metrics.jsonl") || is("metrics.prom") || is("events") {
        Class::Log
    } else if names.iter().any(|n| n.starts_with('.') && n.ends_with(".partial")) {
        Class::Corpus
    } else {
        Class::Other
    }
}

impl Rule {
    /// Counts an operation; the action where its turn has come.
    fn strikes(&self, operation: Operation, class: Class) -> Option<Action> {
        if self.class.is_some_and(|c| c != class) || self.operation.is_some_and(|o| o != operation) {
            return None;
        }
        let n = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        (n == self.first || self.onwards && n > self.first).then_some(self.action)
    }
}

/// Passes before every operation; refuses it, ends the process, or says how it goes on.
#[inline]
pub(super) fn meet(operation: Operation, path: &Path) -> io::Result<Verdict> {
    match state() {
        None => Ok(Verdict::Go),
        Some(state) => meet_rules(state, operation, path),
    }
}

#[cold]
fn meet_rules(state: &State, operation: Operation, path: &Path) -> io::Result<Verdict> {
    let class = class_of(path);
    let mut verdict = Verdict::Go;
    for rule in &state.rules {
        match rule.strikes(operation, class) {
            None => {}
            Some(Action::Fail(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            Some(Action::Torn) if operation == Operation::Write => verdict = Verdict::Torn,
            Some(Action::Short) if operation == Operation::Write => verdict = Verdict::Short,
            Some(Action::Short) => {}
            Some(Action::Die | Action::Torn) => die(),
        }
    }
    Ok(verdict)
}

/// Ends the process as `kill -9` does: no handler, no destructor, no flush.
pub(super) fn die() -> ! {
    // SAFETY: raise touches no memory, and SIGKILL cannot be handled.
    unsafe { libc::raise(libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

/// Appends what was done to the record, where one is kept.
#[inline]
pub(super) fn record(entry: impl FnOnce() -> Entry) {
    if let Some(record) = state().and_then(|s| s.record.as_ref()) {
        write_entry(record, &entry());
    }
}

#[cold]
fn write_entry(record: &Mutex<File>, entry: &Entry) {
    // One write a line: threads take turns, and a kill tears no line but the last.
    if let Ok(mut line) = serde_json::to_vec(entry) {
        line.push(b'\n');
        let mut file = record.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _ = file.write_all(&line);
    }
}

/// An operation that was done. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Entry {
    /// A file opened for writing, of `bytes` now.
    File {
        /// Where.
        path: PathBuf,
        /// Its length then: 0 for a new or emptied one.
        bytes: u64,
    },
    /// A folder made.
    Folder {
        /// Where.
        path: PathBuf,
    },
    /// Bytes written.
    Write {
        /// Where.
        path: PathBuf,
        /// Place of the first in the file.
        at: u64,
        /// The bytes, hexadecimal.
        hex: String,
    },
    /// The length set.
    Cut {
        /// Where.
        path: PathBuf,
        /// The new length.
        bytes: u64,
    },
    /// A file synced.
    Sync {
        /// Where.
        path: PathBuf,
    },
    /// A folder synced.
    SyncFolder {
        /// Where.
        path: PathBuf,
    },
    /// A rename.
    Rename {
        /// Old name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// A second name.
    Link {
        /// Old name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// A file or an empty folder removed.
    Remove {
        /// Where.
        path: PathBuf,
    },
}

fn whole(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

impl Entry {
    pub(super) fn file(path: &Path, bytes: u64) -> Entry {
        Entry::File { path: whole(path), bytes }
    }
    pub(super) fn folder(path: &Path) -> Entry {
        Entry::Folder { path: whole(path) }
    }
    pub(super) fn written(path: &Path, at: u64, bytes: &[u8]) -> Entry {
        Entry::Write { path: whole(path), at, hex: hex(bytes) }
    }
    pub(super) fn cut(path: &Path, bytes: u64) -> Entry {
        Entry::Cut { path: whole(path), bytes }
    }
    pub(super) fn synced(path: &Path) -> Entry {
        Entry::Sync { path: whole(path) }
    }
    pub(super) fn synced_folder(path: &Path) -> Entry {
        Entry::SyncFolder { path: whole(path) }
    }
    pub(super) fn rename(from: &Path, to: &Path) -> Entry {
        Entry::Rename { from: whole(from), to: whole(to) }
    }
    pub(super) fn link(from: &Path, to: &Path) -> Entry {
        Entry::Link { from: whole(from), to: whole(to) }
    }
    pub(super) fn removed(path: &Path) -> Entry {
        Entry::Remove { path: whole(path) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_strike_in_their_turn_and_nowhere_else() {
        let rules = parse("ckpt:write:2:eio, any:fsync:1+:enospc").unwrap();
        let strikes = |r: usize, o, p: &str| rules[r].strikes(o, class_of(Path::new(p)));
        let place = "run/checkpoints/.step-3.partial/model.safetensors";
        assert_eq!(strikes(0, Operation::Sync, place), None);
        assert_eq!(strikes(0, Operation::Write, "run/settings.toml"), None);
        assert_eq!(strikes(0, Operation::Write, place), None);
        assert_eq!(strikes(0, Operation::Write, "run/.last.77.tmp"), Some(Action::Fail(libc::EIO)));
        assert_eq!(strikes(0, Operation::Write, place), None);
        for _ in 0..3 {
            assert_eq!(strikes(1, Operation::Sync, "x"), Some(Action::Fail(libc::ENOSPC)));
        }
    }

    #[test]
    fn files_have_classes() {
        for (path, class) in [
            ("r/best", Class::Checkpoint),
            ("r/lasting", Class::Other),
            ("r/events.out.tfevents.1", Class::Log),
            ("r/.metrics.prom.1.tmp", Class::Log),
            (".x.cells.partial/manifest.json", Class::Corpus),
            ("x.cells", Class::Other),
        ] {
            assert_eq!(class_of(Path::new(path)), class, "{path}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "ckpt", "ckpt:write:0", "ckpt:write:x", "disk:write:1", "ckpt:wipe:1", "a:b:1:c:d"] {
            let e = parse(text).err().unwrap_or_else(|| panic!("{text:?} was taken"));
            assert_eq!(e.kind().exit_code(), 2);
        }
    }
}
