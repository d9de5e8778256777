//! The run folder: who writes it, how a checkpoint appears in it, which one is the newest that can be trusted.
//!
//! A checkpoint is written into a temporary folder beside its final name: every file, each synced; then `state.json`, which
//! holds size and SHA-256 of all the others; then one rename. So a folder named `step-N` is complete, and a kill or a power
//! loss at any moment leaves the ones before it. `best` and `last` hold a checkpoint's name and are replaced by rename; they are
//! a convenience, never believed without the manifest behind them.

use super::sealed;
use crate::digest::sha256_of_file;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::lock::Lock;
use crate::model::checkpoint::{self, Pointer};
use crate::model::snapshot::Snapshot;
use crate::whole_file;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of a checkpoint's manifest.
pub const MANIFEST: &str = "state.json";
/// Name of the lock file.
const LOCK: &str = ".lock";
/// What it locks.
const WHAT: &str = "run folder";

/// An open run folder, locked for as long as this lives.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
    /// Holds the lock; the leading rank's.
    _lock: Option<Arc<Lock>>,
}

impl RunFolder {
    /// Opens or creates `root` and locks it. A second writer is refused (exit 4) with the holder's process, host and time.
    pub fn open(root: &Path) -> Result<RunFolder> {
        disk::create_folders(&root.join("checkpoints"))
            .map_err(|e| Error::io(root, "create the run folder", &e))?;
        let lock = Lock::take(&root.join(LOCK), WHAT)?;
        sweep(root)?;
        Ok(RunFolder { root: root.to_path_buf(), _lock: Some(Arc::new(lock)) })
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

    /// Publishes `checkpoints/step-N`: the files of `snapshot` in a hidden folder, then the manifest, then one rename; then all of
    /// it is read back, and only then does `last` name it. `record` is the manifest without its file list.
    ///
    /// # Errors
    /// Environment: too little space, with the bytes needed and free; the disk. Nothing new is visible then.
    pub fn publish(&self, step: u64, mut record: Value, snapshot: &Snapshot) -> Result<PathBuf> {
        let parent = self.root.join("checkpoints");
        let place = parent.join(format!("step-{step}"));
        let partial = parent.join(format!(".step-{step}.partial"));
        self.check_space(snapshot.size(), "this checkpoint")?;
        disk::remove_folder(&partial)
            .and_then(|()| disk::create_folder(&partial))
            .map_err(|e| Error::io(&partial, "create the checkpoint", &e))?;
        let written = snapshot.write(&partial).and_then(|files| {
            record["files"] = Value::Object(files);
            disk::write_synced(&partial.join(MANIFEST), sealed::text(record).as_bytes())?;
            // Only a checkpoint of this very step can be in the way: made before a resume from an older one.
            disk::publish_folder(&partial, &place)
        });
        if let Err(e) = written {
            let _ = disk::remove_folder(&partial);
            return Err(match e.code() == Code::DiskFull {
                true => e.wanted(format!("{} bytes for this checkpoint", snapshot.size())),
                false => e,
            }
            .next("free space, then continue from the last checkpoint with --resume"));
        }
        verify(&place)?;
        self.point(Pointer::Last, step)?;
        Ok(place)
    }

    /// Is there space for `bytes` more, which are to hold `what`?
    ///
    /// # Errors
    /// Environment: there is not.
    pub fn check_space(&self, bytes: u64, what: &str) -> Result<()> {
        let free = disk::free_bytes(&self.root)?;
        if free >= bytes {
            return Ok(());
        }
        Err(Error::new(Code::DiskFull, "too little space on the disk")
            .at(self.root.display())
            .found(format!("{free} bytes free"))
            .wanted(format!("{bytes} bytes for {what}"))
            .next("free space, or choose another --out; a run that was begun goes on with --resume"))
    }

    /// Makes `pointer` name the checkpoint of `step`.
    pub fn point(&self, pointer: Pointer, step: u64) -> Result<()> {
        checkpoint::point(&self.root, pointer, &format!("step-{step}"))
    }

    /// Removes all checkpoints but the newest `keep` and that of step `best`. Call after a publish.
    pub fn prune(&self, keep: usize, best: Option<u64>) -> Result<()> {
        for (step, place) in checkpoints(&self.root)?.into_iter().skip(keep.max(1)) {
            if Some(step) != best {
                disk::discard_folder(&place)?;
            }
        }
        Ok(())
    }

    /// Forgets pointers and checkpoints: a run that starts afresh in a folder without a usable checkpoint.
    pub fn clear(&self) -> Result<()> {
        for name in ["best", "last", "metrics.jsonl", "metrics.prom"] {
            let _ = disk::remove_file(&self.root.join(name));
        }
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("events.out.tfevents.") {
                let _ = disk::remove_file(&entry.path());
            }
        }
        let parent = self.root.join("checkpoints");
        disk::remove_folder(&parent)
            .and_then(|()| disk::create_folders(&parent))
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
        let digest = sha256_of_file(&path)?;
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

/// Removes what a killed run left half-written or half-removed: hidden files in the run folder `root`, hidden folders among its
/// checkpoints.
fn sweep(root: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(root, "clear what a killed run left", &e);
    for entry in fs::read_dir(root).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') && name.ends_with(".tmp") {
            disk::remove_file(&path).map_err(failed)?;
        }
    }
    let checkpoints = root.join("checkpoints");
    for entry in fs::read_dir(&checkpoints).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = |end| name.strip_prefix(".step-").and_then(|rest| rest.strip_suffix(end));
        let Some(step) = step(".partial").or_else(|| step(".old")) else { continue };
        let place = checkpoints.join(format!("step-{step}"));
        // Killed between two renames: the older checkpoint of this step stands aside, and nothing in its place.
        if name.ends_with(".old") && !place.exists() && verify(&path).is_ok() {
            disk::rename(&path, &place).map_err(failed)?;
        } else {
            disk::remove_folder(&path).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn publish(run: &RunFolder, step: u64) -> PathBuf {
        let mut snapshot = Snapshot::default();
        snapshot.bytes("weights", vec![step as u8; 100]);
        run.publish(step, json!({"step": step}), &snapshot).unwrap()
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
        let mut two = Snapshot::default();
        two.bytes("a", vec![1]);
        two.bytes("a/b", vec![2]);
        assert!(run.publish(8, json!({}), &two).is_err(), "a file cannot be a folder");
        let e = run.check_space(u64::MAX, "everything").unwrap_err();
        assert_eq!(e.kind().exit_code(), 4);
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
