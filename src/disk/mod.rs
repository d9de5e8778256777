//! The one way in which files are written: what becomes durable when, and what a fault may leave behind.
//!
//! A file is durable once it and the folder that holds its name are synced; a rename once its folder is. So everything that
//! counts is written beside its place under a hidden name, synced, renamed, and its folder synced ([`replace`] for bytes at
//! hand, [`Pending`] for a stream, [`publish_folder`] for a whole folder), and under a final name there is the old thing or the
//! new one. Each primitive passes [`fault`], which can make the n-th of them fail or be the process's last, and can record them,
//! so that tests meet every crash and replay every power loss. Lock files, which mean nothing without their lock, and scratch
//! files without a name are no part of this.

pub mod fault;
mod output;
mod pending;

pub use output::Output;
pub use pending::Pending;

use crate::error::{Code, Error, Result};
use fault::Operation;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// The folder that holds `path`; the current one for a bare name.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A hidden name beside `path`: `.NAME.SUFFIX`.
///
/// # Errors
/// Usage: `path` ends in no name.
pub fn beside(path: &Path, suffix: &str) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        Error::new(Code::OutputName, "an output needs a name")
            .at(path.display())
            .wanted("a path that ends in one")
    })?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden.push(suffix);
    Ok(path.with_file_name(hidden))
}

/// Makes `path` a folder; its parent must exist, and is not synced.
pub fn create_folder(path: &Path) -> io::Result<()> {
    fault::meet(Operation::Create, path)?;
    fs::create_dir(path)?;
    fault::record(|| fault::Entry::folder(path));
    Ok(())
}

/// Makes `path` a folder with all that lead to it, and their names durable.
pub fn create_folders(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    create_folders(parent(path))?;
    match create_folder(path) {
        // Another process came first.
        Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_folder(parent(path)),
    }
}

/// Gives `from` the name `to`, replacing a file there.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fault::meet(Operation::Rename, to)?;
    fs::rename(from, to)?;
    fault::record(|| fault::Entry::rename(from, to));
    Ok(())
}

/// Gives the file `from` a second name, or copies and syncs it where the file system has no links.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    fault::meet(Operation::Create, to)?;
    if fs::hard_link(from, to).is_ok() {
        fault::record(|| fault::Entry::link(from, to));
        return Ok(());
    }
    let mut output = Output::create_new(to)?;
    io::copy(&mut File::open(from)?, &mut output)?;
    output.sync()
}

/// Makes the content of a file durable that is written elsewhere.
pub fn sync_file(path: &Path) -> io::Result<()> {
    fault::meet(Operation::Sync, path)?;
    File::open(path)?.sync_all()?;
    fault::record(|| fault::Entry::synced(path));
    Ok(())
}

/// Makes the names in a folder durable. File systems that cannot sync a folder (some networks' and FUSE's) answer EINVAL,
/// which is no failure: they have nothing to sync.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    fault::meet(Operation::Sync, path)?;
    match File::open(path)?.sync_all() {
        Err(e) if !matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTSUP)) => return Err(e),
        _ => fault::record(|| fault::Entry::synced_folder(path)),
    }
    Ok(())
}

/// Removes a file; one that is not there is no error.
pub fn remove_file(path: &Path) -> io::Result<()> {
    fault::meet(Operation::Remove, path)?;
    match fs::remove_file(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => {
            fault::record(|| fault::Entry::removed(path));
            Ok(())
        }
    }
}

/// Removes a folder and all in it; one that is not there is no error. A crash leaves a part: see [`discard_folder`].
pub fn remove_folder(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // The type of the entry itself: a link is removed, never followed.
        match entry.file_type()?.is_dir() {
            true => remove_folder(&entry.path())?,
            false => remove_file(&entry.path())?,
        }
    }
    fault::meet(Operation::Remove, path)?;
    fs::remove_dir(path)?;
    fault::record(|| fault::Entry::removed(path));
    Ok(())
}

/// Removes a folder so that no part of it is ever seen under its name: hidden by a rename first.
///
/// # Errors
/// The file system's.
pub fn discard_folder(path: &Path) -> Result<()> {
    let hidden = beside(path, "old")?;
    let failed = |e: io::Error| Error::io(path, "remove the folder", &e);
    remove_folder(&hidden).map_err(failed)?;
    match rename(path, &hidden) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed(e)),
        // Synced, or a power loss could bring the name back with a part of what it held.
        Ok(()) => sync_folder(parent(path)).and_then(|()| remove_folder(&hidden)).map_err(failed),
    }
}

/// Writes and syncs a file under its own name: one whose folder is published later, as a whole.
///
/// # Errors
/// The file system's.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut output = Output::create(path)?;
        output.write_all(bytes)?;
        output.sync()
    };
    write().map_err(|e| Error::io(path, "write the file", &e))
}

/// Gives `path` the content `bytes`, durably; a reader, and whoever looks after a crash, sees the old file or the new one.
///
/// # Errors
/// The file system's, after which the old file stands. Usage: `path` ends in no name.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut pending = Pending::create(path)?;
    pending.write(bytes)?;
    pending.publish()
}

/// As [`replace`], for what is written often and lost without harm: nothing is synced, so that no training step waits.
///
/// # Errors
/// The file system's, after which the old file stands.
pub fn replace_unsynced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut pending = Pending::create(path)?;
    pending.write(bytes)?;
    pending.publish_unsynced()
}

/// Gives the complete and synced folder `hidden` the name `place`, durably. A folder of that name is moved aside first and
/// removed afterwards, so that no moment has half of either.
///
/// # Errors
/// The file system's, after which the older folder stands under its name and `hidden` under its own.
pub fn publish_folder(hidden: &Path, place: &Path) -> Result<()> {
    let failed = |e: io::Error| Error::io(place, "publish the folder", &e);
    let old = beside(place, "old")?;
    remove_folder(&old).map_err(failed)?;
    sync_folder(hidden).map_err(failed)?;
    let replaces = match rename(place, &old) {
        Err(e) if e.kind() == ErrorKind::NotFound => false,
        other => other.map(|()| true).map_err(failed)?,
    };
    if let Err(e) = rename(hidden, place) {
        if replaces {
            let _ = rename(&old, place);
        }
        return Err(failed(e));
    }
    sync_folder(parent(place)).map_err(failed)?;
    if replaces {
        remove_folder(&old).map_err(failed)?;
    }
    Ok(())
}

/// Bytes that this user may still write on the file system of `path`, or of the nearest folder above that exists.
///
/// # Errors
/// The file system's.
pub fn free_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let mut place = path;
    while !place.as_os_str().is_empty() && !place.exists() {
        place = parent(place);
    }
    let name = std::ffi::CString::new(place.as_os_str().as_bytes())
        .map_err(|_| Error::new(Code::OutputName, "a name with a zero byte").at(path.display()))?;
    // SAFETY: the structure is plain numbers, for which zeros are values.
    let mut numbers: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `name` ends in a zero byte, and `numbers` is a statvfs that the call fills.
    if unsafe { libc::statvfs(name.as_ptr(), &mut numbers) } != 0 {
        return Err(Error::io(place, "ask for free space", &io::Error::last_os_error()));
    }
    Ok(numbers.f_bavail as u64 * numbers.f_frsize as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_the_old_file_or_the_new_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        // A folder in the way: refused, and nothing is left beside it.
        let taken = dir.path().join("taken");
        fs::create_dir_all(taken.join("inner")).unwrap();
        assert!(replace(&taken, b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert_eq!(replace(Path::new("/"), b"x").unwrap_err().kind().exit_code(), 2);
    }

    #[test]
    fn a_published_folder_replaces_the_older_one_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (place, hidden) = (dir.path().join("p"), dir.path().join(".p.partial"));
        for round in 0..2 {
            create_folder(&hidden).unwrap();
            write_synced(&hidden.join(format!("f{round}")), b"x").unwrap();
            publish_folder(&hidden, &place).unwrap();
        }
        assert!(place.join("f1").exists() && !place.join("f0").exists());
        discard_folder(&place).unwrap();
        discard_folder(&place).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn removing_a_folder_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, removed) = (dir.path().join("kept"), dir.path().join("removed"));
        create_folders(&kept.join("deep")).unwrap();
        create_folders(&removed).unwrap();
        std::os::unix::fs::symlink(&kept, removed.join("link")).unwrap();
        remove_folder(&removed).unwrap();
        assert!(kept.join("deep").is_dir() && !removed.exists());
        assert!(free_bytes(&dir.path().join("not/yet/there")).unwrap() > 0);
    }
}
