//! The run folder: who writes it, how a checkpoint appears in it, which one is the newest that can be trusted.
//!
//! A checkpoint is written into a temporary folder beside its final name: every file, each synced; then `state.json`, which
//! holds size and SHA-256 of all the others; then one rename. So a folder named `step-N` is complete, and a kill or a power
//! loss at any moment leaves the ones before it. `best` and `last` hold a checkpoint's name and are replaced by rename; they are
//! a convenience, never believed without the manifest behind them.

use super::sealed;
use crate::error::{Code, Error, Result};
use crate::lock::Lock;
use crate::model::checkpoint::{self, Pointer, write_synced};
use crate::whole_file;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Name of a checkpoint's manifest.
pub const MANIFEST: &str = "state.json";
/// Name of the lock file.
const LOCK: &str = ".lock";
/// What it locks.
const WHAT: &str = "run folder";

/// An open run folder, locked for as long as this lives.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    /// Holds the lock; the leading rank's.
    _lock: Option<Lock>,
}

impl RunFolder {
    /// Opens or creates `root` and locks it. A second writer is refused (exit 4) with the holder's process, host and time.
    pub fn open(root: &Path) -> Result<RunFolder> {
        fs::create_dir_all(root.join("checkpoints"))
            .map_err(|e| Error::io(root, "create the run folder", &e))?;
        let lock = Lock::take(&root.join(LOCK), WHAT)?;
        Ok(RunFolder { root: root.to_path_buf(), _lock: Some(lock) })
    }

    /// Is the folder free for [`RunFolder::open`]? Asked before a run's inputs are read. Under `force`, the name that a writer of
    /// another host left is taken out.
    pub fn look(root: &Path, force: bool) -> Result<()> {
        let path = root.join(LOCK);
        if force {
            Lock::force(&path)?;
        }
        Lock::look(&path, WHAT)
    }

    /// The folder as a rank sees it that leaves the writing to the leading one.
    pub fn of_leader(root: &Path) -> RunFolder {
        RunFolder { root: root.to_path_buf(), _lock: None }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Publishes `checkpoints/step-N`: `write` fills a temporary folder, then the manifest is written, then it is renamed.
    /// `record` is the manifest without its file list. On failure nothing new is visible.
    pub fn publish(
        &self,
        step: u64,
        record: Value,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let parent = self.root.join("checkpoints");
        let place = parent.join(format!("step-{step}"));
        let partial = parent.join(format!(".step-{step}.partial"));
        remove(&partial)?;
        fs::create_dir(&partial).map_err(|e| Error::io(&partial, "create the checkpoint", &e))?;
        let written = write(&partial).and_then(|()| seal(&partial, record)).and_then(|()| {
            // Only a checkpoint of this very step can be in the way: made before a resume from an older one.
            remove(&place)?;
            fs::rename(&partial, &place).map_err(|e| Error::io(&place, "publish the checkpoint", &e))?;
            sync(&parent)
        });
        if let Err(e) = written {
            let _ = fs::remove_dir_all(&partial);
            return Err(e);
        }
        verify(&place)?;
        self.point(Pointer::Last, step)?;
        Ok(place)
    }

    /// Makes `pointer` name the checkpoint of `step`.
    pub fn point(&self, pointer: Pointer, step: u64) -> Result<()> {
        checkpoint::point(&self.root, pointer, &format!("step-{step}"))
    }

    /// Removes all checkpoints but the newest `keep` and that of step `best`. Call after a publish.
    pub fn prune(&self, keep: usize, best: Option<u64>) -> Result<()> {
        for (step, place) in checkpoints(&self.root)?.into_iter().skip(keep.max(1)) {
            if Some(step) != best {
                remove(&place)?;
            }
        }
        Ok(())
    }

    /// Forgets pointers and checkpoints: a run that starts afresh in a folder without a usable checkpoint.
    pub fn clear(&self) -> Result<()> {
        for name in ["best", "last", "metrics.jsonl", "metrics.prom"] {
            let _ = fs::remove_file(self.root.join(name));
        }
        remove(&self.root.join("checkpoints"))?;
        fs::create_dir_all(self.root.join("checkpoints"))
            .map_err(|e| Error::io(&self.root, "create the run folder", &e))
    }
}

/// (step, folder) of every published checkpoint of the run at `root`, newest first.
pub fn checkpoints(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let parent = root.join("checkpoints");
    let Ok(entries) = fs::read_dir(&parent) else { return Ok(Vec::new()) };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let step = path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found)
}

/// Reads the manifest of the checkpoint at `place` and checks size and SHA-256 of every file that it names.
pub fn verify(place: &Path) -> Result<Value> {
    let manifest = read_manifest(place)?;
    let broken = |file: &str, what: &str| {
        Error::new(Code::CheckpointDamaged, format!("checkpoint file {what}"))
            .at(place.join(file).display())
            .next("continue from an older one: --resume=auto")
    };
    let files = manifest["files"].as_object().ok_or_else(|| broken(MANIFEST, "lists no files"))?;
    for (name, entry) in files {
        let plain = |c| matches!(c, std::path::Component::Normal(_));
        if !Path::new(name).components().all(plain) {
            return Err(broken(MANIFEST, "names a file outside the checkpoint").found(name));
        }
        let path = place.join(name);
        let bytes = fs::metadata(&path).map_err(|e| Error::io(&path, "read the checkpoint file", &e))?.len();
        if Some(bytes) != entry["bytes"].as_u64() {
            return Err(broken(name, "has the wrong size")
                .found(format!("{bytes} bytes"))
                .wanted(format!("{} bytes", entry["bytes"])));
        }
        let digest = sha256(&path)?;
        if Some(digest.as_str()) != entry["sha256"].as_str() {
            return Err(broken(name, "is damaged").found(digest).wanted(&entry["sha256"]));
        }
    }
    Ok(manifest)
}

/// The manifest of the checkpoint at `place`; of the files that it names nothing is checked.
pub fn read_manifest(place: &Path) -> Result<Value> {
    let path = place.join(MANIFEST);
    let text = whole_file::read_text(&path, "read the checkpoint's manifest", sealed::MAX_BYTES)?;
    sealed::read(&text, &path)
}

/// Syncs every file of `folder`, writes its manifest, syncs that and the folder.
fn seal(folder: &Path, mut record: Value) -> Result<()> {
    let mut files = serde_json::Map::new();
    for path in files_below(folder)? {
        sync(&path)?;
        let bytes = fs::metadata(&path).map_err(|e| Error::io(&path, "read", &e))?.len();
        let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
        files.insert(name, serde_json::json!({"bytes": bytes, "sha256": sha256(&path)?}));
    }
    record["files"] = Value::Object(files);
    write_synced(&folder.join(MANIFEST), sealed::text(record).as_bytes())?;
    sync(folder)
}

/// All files in and below `folder`, sorted; the folders between are synced.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, "list the checkpoint", &e))? {
        let path = entry.map_err(|e| Error::io(folder, "list the checkpoint", &e))?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
            sync(&path)?;
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Writes `path` by temporary file, sync and rename.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    write_synced(&partial, bytes)?;
    fs::rename(&partial, path).map_err(|e| Error::io(path, "publish", &e))?;
    // The folder of a bare name is the current one.
    sync(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Syncs a file or a folder.
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Error::io(path, "sync", &e))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, "remove", &e)),
        _ => Ok(()),
    }
}

/// SHA-256 of a file, hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, "read", &e))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(|e| Error::io(path, "read", &e))?;
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of bytes, hexadecimal.
pub fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn publish(run: &RunFolder, step: u64) -> PathBuf {
        run.publish(step, json!({"step": step}), |folder| {
            fs::write(folder.join("weights"), vec![step as u8; 100])
                .map_err(|e| Error::io(folder, "write", &e))
        })
        .unwrap()
    }

    #[test]
    fn publishes_points_and_prunes() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        publish(&run, 1);
        for step in 2..=5 {
            publish(&run, step);
            run.prune(2, Some(1)).unwrap();
        }
        let steps: Vec<u64> = checkpoints(dir.path()).unwrap().iter().map(|(s, _)| *s).collect();
        assert_eq!(steps, [5, 4, 1]);
        assert_eq!(fs::read_to_string(dir.path().join("last")).unwrap(), "step-5\n");
        assert_eq!(fs::read(dir.path().join("checkpoints/step-1/weights")).unwrap(), [1; 100]);
    }

    #[test]
    fn damage_is_found_and_a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        let place = publish(&run, 7);
        let failed = run.publish(8, json!({}), |_| Err(Error::new(Code::DiskFull, "disk full")));
        assert_eq!(failed.unwrap_err().kind().exit_code(), 4);
        assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
        let mut bytes = fs::read(place.join("weights")).unwrap();
        bytes[50] ^= 1;
        fs::write(place.join("weights"), &bytes).unwrap();
        assert!(verify(&place).unwrap_err().to_string().contains("damaged"));
        bytes.pop();
        fs::write(place.join("weights"), &bytes).unwrap();
        assert!(verify(&place).unwrap_err().to_string().contains("99 bytes"));
        fs::remove_file(place.join("weights")).unwrap();
        assert_eq!(verify(&place).unwrap_err().kind().exit_code(), 3);
    }

    #[test]
    fn a_second_writer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        let e = RunFolder::open(dir.path()).unwrap_err();
        assert_eq!(e.kind().exit_code(), 4);
        assert!(e.to_string().contains(&format!("process {}", std::process::id())));
        drop(run);
        RunFolder::open(dir.path()).unwrap();
    }
}
