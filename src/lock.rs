//! One writer to a folder: a lock file that says who holds it.
//!
//! | the file | flock | means |
//! |---|---|---|
//! | anything | held | a process of this host writes (of any host, where the file system carries locks): refused |
//! | no name, or one of this host | free | nobody writes: the system frees a lock however its holder ended |
//! | a name of another host | free | a writer there was killed, or lives where its lock does not reach: refused, unless forced |
//!
//! A holder that ends in order takes its name out again, so that only a killed one leaves it behind.

use crate::error::{Code, Error, Result};
use crate::report::html::day;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A held lock; dropping it frees it.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// What a lock file says.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    process: u32,
    host: String,
    since: String,
}

/// Longest lock file that is believed to be one.
const LONGEST: u64 = 4096;

impl Lock {
    /// Takes the lock of `what` (such as "run folder") at `path`, which need not exist.
    ///
    /// # Errors
    /// Environment: another process holds it, or one of another host may.
    pub fn take(path: &Path, what: &str) -> Result<Lock> {
        let io = |e: std::io::Error| Error::io(path, "lock", &e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(refused(path, what, holder(&mut file), true)),
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        if let Some(holder) = holder(&mut file).filter(|holder| holder.host != host()) {
            return Err(refused(path, what, Some(holder), false));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let me = Holder { process: std::process::id(), host: host(), since: day(now) };
        let text = serde_json::to_string(&me).map_err(|e| Error::bug(format!("a lock as JSON: {e}")))?;
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        writeln!(file, "{text}").map_err(io)?;
        Ok(Lock { file })
    }

    /// Could it be taken? Says why not, and touches nothing.
    pub fn look(path: &Path, what: &str) -> Result<()> {
        let Ok(mut file) = File::open(path) else { return Ok(()) };
        let held = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
        match holder(&mut file) {
            holder if held => Err(refused(path, what, holder, true)),
            Some(holder) if holder.host != host() => Err(refused(path, what, Some(holder), false)),
            _ => Ok(()),
        }
    }

    /// Takes the name of another host's writer out, who is known to have ended; a lock that is held stays.
    pub fn force(path: &Path) -> Result<()> {
        let Ok(file) = OpenOptions::new().write(true).open(path) else { return Ok(()) };
        match file.try_lock() {
            Ok(()) => file.set_len(0).map_err(|e| Error::io(path, "unlock", &e)),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The name goes first: closing the file frees the lock.
        let _ = self.file.set_len(0);
    }
}

fn holder(file: &mut File) -> Option<Holder> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string()
}

fn refused(path: &Path, what: &str, holder: Option<Holder>, held: bool) -> Error {
    let who = match &holder {
        Some(h) => format!("process {} on {} since {}", h.process, h.host, h.since),
        None => "a process that has not said which it is".into(),
    };
    let next = match held {
        true => "wait for it, stop it, or choose another --out",
        false => "see that it has ended, then add --force-unlock; or choose another --out",
    };
    let folder = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    Error::new(Code::AnotherWriter, format!("another process writes this {what}"))
        .at(folder.display())
        .found(who)
        .next(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_had_once_and_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = Lock::take(&path, "folder").unwrap();
        for e in [Lock::take(&path, "folder").unwrap_err(), Lock::look(&path, "folder").unwrap_err()] {
            assert_eq!((e.code(), e.kind().exit_code()), (Code::AnotherWriter, 4));
            let text = e.to_string();
            assert!(text.contains(&format!("process {} on {}", std::process::id(), host())), "{text}");
            assert!(text.contains(" since 20") && text.contains("UTC"), "{text}");
        }
        Lock::force(&path).unwrap();
        assert!(Lock::take(&path, "folder").is_err(), "a living holder is not forced");
        drop(lock);
        assert_eq!(std::fs::read(&path).unwrap(), b"", "an orderly end leaves no name");
        Lock::look(&path, "folder").unwrap();
        Lock::take(&path, "folder").unwrap();
    }

    #[test]
    fn what_a_killed_holder_left_depends_on_its_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let left = |host: &str| {
            let holder = Holder { process: 7, host: host.into(), since: "2026-01-02 03:04 UTC".into() };
            std::fs::write(&path, serde_json::to_string(&holder).unwrap()).unwrap();
        };
        left(&host());
        Lock::take(&path, "folder").unwrap();
        left("elsewhere");
        for e in [Lock::take(&path, "folder").unwrap_err(), Lock::look(&path, "folder").unwrap_err()] {
            let text = e.to_string();
            let parts = ["process 7 on elsewhere since 2026-01-02 03:04 UTC", "--force-unlock"];
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        Lock::force(&path).unwrap();
        Lock::take(&path, "folder").unwrap();
        for text in ["", "process 7 on elsewhere", "{}", "\u{0}\u{0}"] {
            std::fs::write(&path, text).unwrap();
            Lock::take(&path, "folder").unwrap();
        }
    }
}
