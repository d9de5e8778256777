//! The hidden folder that becomes a corpus: locked against a second writer, renamed to its final name when all is on the disk, removed
//! when it is not.

use crate::disk::{self, Output};
use crate::error::{Code, Error, Kind, Result};
use crate::lock::Lock;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The hidden folder that becomes the corpus. Removed on drop unless published.
#[derive(Debug)]
pub(super) struct PartialFolder {
    pub path: PathBuf,
    target: PathBuf,
    /// Held while writing; a dead writer's lock is free.
    _lock: Lock,
    published: bool,
}

const LOCK: &str = "writer.lock";

/// Frees the unfinished corpus that becomes `target` from the name that a writer of another host left; a living one keeps it.
pub fn force_unlock(target: &Path) -> Result<()> {
    target.file_name().map_or(Ok(()), |name| Lock::force(&partial_path(target, name).join(LOCK)))
}

fn partial_path(target: &Path, name: &std::ffi::OsStr) -> PathBuf {
    target.with_file_name(format!(".{}.partial", name.to_string_lossy()))
}

impl PartialFolder {
    pub fn create(target: &Path) -> Result<Self> {
        let name = target.file_name().ok_or_else(|| {
            Error::new(Code::OutputName, "the corpus needs a name")
                .at(target.display())
                .wanted("a path such as NAME.cells")
        })?;
        if target.symlink_metadata().is_ok() {
            return Err(Error::new(Code::OutputExists, "the output exists already")
                .at(target.display())
                .next("choose another --out, or remove it first"));
        }
        let path = partial_path(target, name);
        if let Err(e) = disk::create_folder(&path)
            && e.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(Error::io(&path, "create the folder of the corpus", &e)
                .next("create the parent folder first, or choose another --out"));
        }
        let lock_path = path.join(LOCK);
        let io = |e: std::io::Error| Error::io(&lock_path, "lock the unfinished corpus", &e);
        let lock = Lock::take(&lock_path, "corpus")?;
        // Held by no one: whatever else is here, a killed writer left.
        for entry in fs::read_dir(&path).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_name() != LOCK {
                disk::remove_file(&entry.path()).map_err(io)?;
            }
        }
        Ok(PartialFolder { path, target: target.into(), _lock: lock, published: false })
    }

    /// Writes a small file and flushes it to the disk.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let write = || {
            let mut file = Output::create(&self.path.join(name))?;
            file.write_all(bytes)?;
            file.sync()
        };
        write().map_err(|e| self.failed(&format!("write {name}"), &e))
    }

    pub fn failed(&self, doing: &str, e: &std::io::Error) -> Error {
        let error = Error::io(&self.path, doing, e);
        if error.kind() == Kind::Environment {
            error.next("free disk space, or write to another disk; nothing was left under the final name")
        } else {
            error
        }
    }

    /// Flushes the folder and renames it to its final name.
    pub fn publish(mut self) -> Result<()> {
        let run = || {
            for name in ["gene.spool", "value.spool", LOCK] {
                disk::remove_file(&self.path.join(name))?;
            }
            disk::sync_folder(&self.path)?;
            disk::rename(&self.path, &self.target)?;
            disk::sync_folder(disk::parent(&self.target))
        };
        run().map_err(|e| self.failed("publish the corpus under its final name", &e))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.published {
            let _ = disk::remove_folder(&self.path);
        }
    }
}
