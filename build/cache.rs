//! Compile only what changed: an output is kept while its key, a digest of everything it was made from, is the same.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// One compiler call and the file it makes.
pub struct Job {
    pub command: Command,
    pub output: PathBuf,
    /// Digest of sources, headers, flags and compiler version.
    pub key: u64,
    /// For the error message.
    pub source: PathBuf,
}

/// A digest of some texts, in order.
pub fn digest<T: AsRef<[u8]>>(texts: impl IntoIterator<Item = T>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for t in texts {
        t.as_ref().hash(&mut hasher);
    }
    hasher.finish()
}

fn key_file(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".key");
    name.into()
}

/// Runs what is out of date, on as many processes as cargo was given.
///
/// # Errors
/// The first failing compiler's command and output.
pub fn run(jobs: Vec<Job>) -> Result<(), String> {
    let stale = |job: &Job| {
        !job.output.exists()
            || std::fs::read_to_string(key_file(&job.output)).ok().as_deref() != Some(&job.key.to_string())
    };
    let queue = Mutex::new(jobs.into_iter().filter(stale).collect::<Vec<_>>());
    let failure = Mutex::new(None);
    let workers = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let Some(mut job) = queue.lock().expect("no panic holds it").pop() else { return };
                    let failed = match job.command.output() {
                        Ok(o) if o.status.success() => {
                            print_warnings(&job.source, &o.stderr);
                            std::fs::write(key_file(&job.output), job.key.to_string())
                                .err()
                                .map(|e| e.to_string())
                        }
                        Ok(o) => Some(String::from_utf8_lossy(&o.stderr).into_owned()),
                        Err(e) => Some(e.to_string()),
                    };
                    if let Some(text) = failed {
                        let mut failure = failure.lock().expect("no panic holds it");
                        failure.get_or_insert(format!("{}\n{:?}\n{text}", job.source.display(), job.command));
                        queue.lock().expect("no panic holds it").clear();
                        return;
                    }
                }
            });
        }
    });
    failure.into_inner().expect("no panic holds it").map_or(Ok(()), Err)
}

fn print_warnings(source: &Path, stderr: &[u8]) {
    let text = String::from_utf8_lossy(stderr);
    for line in text.lines().filter(|l| l.contains("warning")).take(4) {
        println!("cargo::warning={}: {line}", source.display());
    }
}
