//! Nothing lost: the program killed, refused and cut off from power at every operation that it does to the disk, and at random
//! moments; afterwards the same command is given again, and must end with the same bits as a run that nothing happened to.

#[path = "../common/faults.rs"]
mod faults;
mod power;
#[path = "../common/typed_cells.rs"]
mod typed_cells;

use cellrefine::corpus::Corpus;
use cellrefine::disk::fault::Entry;
use cellrefine::report::jsonl;
use cellrefine::rng::Philox;
use cellrefine::train::folder::{checkpoints, verify};
use faults::{cases, report};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const SMALL: &str = "--set batch.cells=8 --set train.steps=6 --set train.checkpoint_every=2 --set train.log_every=1 --threads 1";
const TINY: &str = "--preset tiny --set model.layers=1 --set model.width=16 --set model.ffn=32";
const STEPS: u64 = 6;
const METRICS: &str = "metrics";

/// Files by name.
type Made = BTreeMap<String, Vec<u8>>;

/// What is run: a stage into `run`, or pack into `y.cells`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Job {
    Pack,
    Pretrain,
    Refine,
    Finetune,
}

impl Job {
    fn words(self) -> String {
        match self {
            Job::Pack => {
                let cells = format!("{}/data/pbmc700/pbmc700.h5ad", env!("CARGO_MANIFEST_DIR"));
                format!("pack {cells} --vocab @v.tsv --out @y.cells --shard-cells 200 --threads 1")
            }
            Job::Pretrain => format!("pretrain --corpus @x.cells --out @run {TINY} {SMALL} --resume=auto"),
            Job::Refine => {
                format!(
                    "refine --corpus @x.cells --checkpoint @pre --markers @markers.gmt --out @run {SMALL} --resume=auto"
                )
            }
            Job::Finetune => {
                let split = "--label cell_type --split train=0.7,val=0.3 --set train.eval_every=3";
                format!(
                    "finetune --corpus @x.cells --checkpoint @pre {split} --out @run {SMALL} --resume=auto"
                )
            }
        }
    }
    /// What it makes.
    fn out(self, root: &Path) -> PathBuf {
        root.join(if self == Job::Pack { "y.cells" } else { "run" })
    }
}

/// A folder with what the jobs start from.
struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::canonicalize(dir.path()).unwrap();
        typed_cells::write(&root, "x.cells", &[60, 30, 12], 0.0);
        typed_cells::markers(&root, 3);
        let place = Place { _dir: dir, root };
        let cells = format!("{}/data/pbmc700/pbmc700.h5ad", env!("CARGO_MANIFEST_DIR"));
        for words in [
            format!("vocab build {cells} --out @v.tsv"),
            format!("pretrain --corpus @x.cells --out @pre {TINY} {SMALL} --set train.steps=2"),
        ] {
            let out = place.run(&words, &[]);
            assert!(out.status.success(), "{}", said(&out));
        }
        place
    }

    fn command(&self, words: &str, env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        let root = self.root.display().to_string();
        command.args(words.split_whitespace().map(|word| word.replace('@', &format!("{root}/"))));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CELLREFINE_")) {
            command.env_remove(name);
        }
        command.envs(env.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &str, env: &[(&str, &str)]) -> Output {
        self.command(words, env).output().unwrap()
    }

    fn clear(&self, job: Job) {
        let _ = std::fs::remove_dir_all(job.out(&self.root));
        let _ = std::fs::remove_dir_all(self.root.join(".y.cells.partial"));
        let _ = std::fs::remove_file(self.root.join("record"));
    }

    /// Runs the job with a record of its operations.
    fn recorded(&self, job: Job) -> Vec<Entry> {
        self.clear(job);
        let record = self.root.join("record");
        let out = self.run(&job.words(), &[("CELLREFINE_FAULT_RECORD", record.to_str().unwrap())]);
        assert!(out.status.success(), "{}", said(&out));
        let text = std::fs::read_to_string(&record).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What the job made, as far as it must be the same whatever happened on the way.
    fn made(&self, job: Job) -> Result<Made, String> {
        let out = job.out(&self.root);
        let mut made = BTreeMap::new();
        if job == Job::Pack {
            for entry in std::fs::read_dir(&out).map_err(|e| e.to_string())? {
                let path = entry.unwrap().path();
                made.insert(name(&path), std::fs::read(&path).unwrap());
            }
            return Ok(made);
        }
        let last = out.join(format!("checkpoints/step-{STEPS}"));
        for entry in std::fs::read_dir(&last).map_err(|e| format!("{}: {e}", last.display()))? {
            let path = entry.unwrap().path();
            // The manifest holds the seconds of training.
            if name(&path) != "state.json" {
                made.insert(name(&path), std::fs::read(&path).unwrap());
            }
        }
        let log = jsonl::read(&out.join("metrics.jsonl")).map_err(|e| e.to_string())?;
        let kept =
            |line: &serde_json::Value| format!("{} {} {}\n", line["step"], line["loss"], line["grad_norm"]);
        made.insert(METRICS.into(), log.iter().map(kept).collect::<String>().into_bytes());
        Ok(made)
    }

    /// What stands under final names is whole. `promised` is a step of which a checkpoint must be there, or a later one.
    fn whole(&self, job: Job, promised: u64) -> Result<(), String> {
        let out = job.out(&self.root);
        if job == Job::Pack {
            if out.exists() {
                let corpus = Corpus::open(&out).map_err(|e| format!("under the final name: {e}"))?;
                corpus.verify().map_err(|e| format!("under the final name: {e}"))?;
            }
            return Ok(());
        }
        let mut newest = 0;
        for (step, place) in checkpoints(&out).map_err(|e| e.to_string())? {
            verify(&place).map_err(|e| format!("a checkpoint that is none: {e}"))?;
            newest = newest.max(step);
        }
        if newest < promised {
            return Err(format!("step {promised} was on the disk, and the newest now is {newest}"));
        }
        // The pointer may be behind, never beyond what is there; nor may it hold a part of a name.
        if let Ok(text) = std::fs::read_to_string(out.join("last")) {
            let step = text.trim().strip_prefix("step-").and_then(|n| n.parse::<u64>().ok());
            let step = step.ok_or_else(|| format!("last holds {text:?}"))?;
            if step > newest {
                return Err(format!("last names step {step}, and the newest is {newest}"));
            }
        }
        Ok(())
    }

    /// Gives the command again; afterwards all must be as if nothing had happened, and nothing left beside it.
    fn again(&self, job: Job, reference: &Made) -> Result<(), String> {
        if job == Job::Pack && job.out(&self.root).exists() {
            // It was finished: pack refuses to write over it.
        } else {
            let out = self.run(&job.words(), &[]);
            if !out.status.success() {
                return Err(format!("again: {:?} {}", out.status.code(), said(&out)));
            }
        }
        self.whole(job, if job == Job::Pack { 0 } else { STEPS })?;
        let made = self.made(job)?;
        for (file, bytes) in reference {
            if made.get(file) != Some(bytes) {
                return Err(format!("{file} differs"));
            }
        }
        if let Some(more) = made.keys().find(|file| *file != METRICS && !reference.contains_key(*file)) {
            return Err(format!("{more} was made, and should not have been"));
        }
        match left(&self.root, job) {
            left if left.is_empty() => Ok(()),
            left => Err(format!("left behind: {left:?}")),
        }
    }
}

/// Hidden files and folders beside and below what the job makes.
fn left(root: &Path, job: Job) -> Vec<String> {
    let folders = match job {
        Job::Pack => vec![root.to_path_buf(), root.join("y.cells")],
        _ => vec![root.join("run"), root.join("run/checkpoints")],
    };
    let names = folders.iter().filter_map(|f| std::fs::read_dir(f).ok()).flatten();
    let names = names.map(|entry| name(&entry.unwrap().path()));
    names.filter(|n| n.starts_with('.') && n != ".lock").collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).trim().to_string()
}

/// Tries `tried` on two places at a time; what it returns as an error is a case lost.
fn all<T: Send + Sync>(list: &[T], tried: impl Fn(&Place, &T) -> Result<(), String> + Sync) -> Vec<String> {
    let (next, lost) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let place = Place::new();
                while let Some(case) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = tried(&place, case) {
                        lost.lock().unwrap().push(e);
                    }
                }
            });
        }
    });
    lost.into_inner().unwrap()
}

/// `few` of `list`, evenly spread, with its last; all of it under FAULTS=all.
fn some<T: Clone>(list: Vec<T>, few: usize) -> Vec<T> {
    let n = cases(few.min(list.len()), list.len());
    (0..n).map(|i| list[(i + 1) * list.len() / n - 1].clone()).collect()
}

/// Every job with the record of its operations and what it makes.
fn references() -> Vec<(Job, Vec<Entry>, Made)> {
    let place = Place::new();
    [Job::Pack, Job::Pretrain, Job::Refine, Job::Finetune]
        .map(|job| {
            let record = place.recorded(job);
            place.whole(job, 0).unwrap();
            (job, record, place.made(job).unwrap())
        })
        .into()
}

/// F1, F2: killed before every operation, and in the middle of every write.
#[test]
fn killed_at_every_operation_nothing_is_lost() {
    let references = references();
    for (fault, training, few) in [("F1", true, 30), ("F2", false, 8)] {
        let mut list = Vec::new();
        for (job, record, made) in references.iter().filter(|(job, ..)| (*job != Job::Pack) == training) {
            let writes = record.iter().filter(|e| matches!(e, Entry::Write { .. })).count();
            list.extend((1..=record.len()).map(|n| (job, made, format!("any:any:{n}:die"))));
            list.extend((1..=writes).map(|n| (job, made, format!("any:write:{n}:torn"))));
        }
        let list = some(list, few);
        let lost = all(&list, |place, (job, made, rule)| {
            place.clear(**job);
            let out = place.run(&job.words(), &[("CELLREFINE_FAULT", rule)]);
            let ended = out.status.success();
            let checked = place.whole(**job, 0).and_then(|()| place.again(**job, made));
            checked.map_err(|e| format!("{job:?} {rule} (ended by itself: {ended}): {e}"))
        });
        report(
            fault,
            "SIGKILL before every disk operation, and in the middle of every write",
            list.len(),
            &lost,
        );
    }
}

/// F1, F2: killed at random moments, several times in a row.
#[test]
fn killed_at_random_moments_nothing_is_lost() {
    const KILLS: usize = 5;
    let references = references();
    for (fault, job, runs) in [
        ("F2", Job::Pack, cases(1, 30)),
        ("F1", Job::Pretrain, cases(1, 40)),
        ("F1", Job::Refine, cases(1, 40)),
        ("F1", Job::Finetune, cases(1, 40)),
    ] {
        let (_, _, made) = references.iter().find(|(j, ..)| *j == job).unwrap();
        let kills = AtomicUsize::new(0);
        let seeds: Vec<u64> = (0..runs as u64).collect();
        let lost = all(&seeds, |place, seed| {
            let mut random = Philox::new(*seed, job as u32, 25);
            place.clear(job);
            let (mut killed, mut longest) = (0, 400.0);
            while killed < KILLS {
                let mut child = place.command(&job.words(), &[]).spawn().unwrap();
                std::thread::sleep(Duration::from_secs_f64(random.uniform() * longest / 1e3));
                if child.try_wait().unwrap().is_none() {
                    // SAFETY: a signal to our own child, which has not been waited for.
                    unsafe { libc::kill(child.id() as i32, libc::SIGKILL) };
                    killed += 1;
                } else {
                    // It was quicker: again from the start, with less patience.
                    longest *= 0.7;
                    place.clear(job);
                }
                child.wait().unwrap();
                place.whole(job, 0).map_err(|e| format!("{job:?} seed {seed}, after {killed} kills: {e}"))?;
            }
            kills.fetch_add(killed, Ordering::Relaxed);
            place.again(job, made).map_err(|e| format!("{job:?} seed {seed}: {e}"))
        });
        report(fault, "SIGKILL at random moments, five in a row", kills.into_inner().max(lost.len()), &lost);
    }
}

/// F5, F6: no operation that fails is taken for one that succeeded, and what was there before stays.
#[test]
fn a_full_or_failing_disk_costs_nothing_that_was_there() {
    let references = references();
    for (fault, what) in [
        ("F5", "the disk full from every write on, and short writes"),
        ("F6", "EIO from every disk operation"),
    ] {
        let mut list = Vec::new();
        for (job, record, made) in &references {
            let writes = record.iter().filter(|e| matches!(e, Entry::Write { .. })).count();
            if fault == "F5" {
                list.extend((1..=writes).map(|n| (job, made, format!("any:write:{n}+:enospc"))));
                list.extend((1..=writes).map(|n| (job, made, format!("any:write:{n}:short"))));
            } else {
                list.extend((1..=record.len()).map(|n| (job, made, format!("any:any:{n}:eio"))));
            }
        }
        let list = some(list, 24);
        let lost = all(&list, |place, (job, made, rule)| {
            place.clear(**job);
            let out = place.run(&job.words(), &[("CELLREFINE_FAULT", rule)]);
            let (code, said) = (out.status.code(), said(&out));
            let checked = || {
                let reason = if fault == "F5" { "No space left on device" } else { "Input/output error" };
                match code {
                    // What was refused was a line of a log, or something that was to be removed.
                    Some(0) => {}
                    Some(4) if said.contains(reason) && said.contains(&*place.root.to_string_lossy()) => {}
                    _ => return Err(format!("exit {code:?}")),
                }
                if rule.ends_with("short") && code != Some(0) {
                    return Err("a short write is no failure".to_string());
                }
                place.whole(**job, if code == Some(0) && **job != Job::Pack { STEPS } else { 0 })?;
                if code == Some(0) && !job.out(&place.root).exists() {
                    return Err("reported success, and made nothing".to_string());
                }
                // Refused lines of the log are named, and no reason to stop.
                let mut made = (*made).clone();
                if said.contains("the run record could not be written") {
                    made.remove(METRICS);
                }
                place.again(**job, &made)
            };
            checked().map_err(|e| format!("{job:?} {rule}: {e}; it said {said}"))
        });
        report(fault, what, list.len(), &lost);
    }
}

/// F25: power loss after every operation. What no sync had fixed is gone, or there, or there in part and in another order.
#[test]
fn power_lost_after_any_operation_nothing_promised_is_lost() {
    let references = references();
    let mut list = Vec::new();
    for (job, _, made) in &references {
        for cut in some((1..=100).collect::<Vec<usize>>(), 2) {
            list.extend([power::Loss::Everything, power::Loss::Data].map(|loss| (job, made, cut, loss)));
            list.extend((0..2).map(|seed| (job, made, cut, power::Loss::Random(seed + cut as u64))));
        }
    }
    let records: Mutex<BTreeMap<(usize, String), Vec<Entry>>> = Mutex::default();
    let lost = all(&list, |place, (job, made, percent, loss)| {
        // A record names the places that it was made in.
        let key = (place as *const Place as usize, format!("{job:?}"));
        let known = records.lock().unwrap().get(&key).cloned();
        let record = known.unwrap_or_else(|| place.recorded(**job));
        records.lock().unwrap().insert(key, record.clone());
        let cut = (record.len() * percent).div_ceil(100);
        place.clear(**job);
        let promised = power::replay(&record[..cut], &place.root, *loss);
        let checked = place.whole(**job, promised).and_then(|()| place.again(**job, made));
        checked.map_err(|e| format!("{job:?} after {cut} of {} operations, {loss:?}: {e}", record.len()))
    });
    report(
        "F25",
        "power lost after every operation; unsynced data and names dropped or kept in part",
        list.len(),
        &lost,
    );
}

/// No file is written past the layer that makes it durable and that these tests can make fail.
#[test]
fn all_files_are_written_through_one_layer() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![source.clone()];
    let mut found = Vec::new();
    // Reasons: a lock is nothing without its holder; the report of a panic must not depend on what panicked; scratch files have no
    // name.
    let exempt = ["disk/", "cli/bug_report.rs", "import/transpose.rs"];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(&source).unwrap().to_string_lossy().into_owned();
            if exempt.iter().any(|e| inside.starts_with(e)) {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let product = text.split("mod tests {").next().unwrap();
            for call in
                ["fs::write(", "File::create", "fs::rename(", "fs::copy(", "sync_all", "fs::create_dir"]
            {
                let starts = |at: usize| !product[..at].ends_with(char::is_alphanumeric);
                if product.match_indices(call).any(|(at, _)| starts(at)) {
                    found.push(format!("{inside}: {call}"));
                }
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
