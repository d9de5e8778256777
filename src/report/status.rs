//! How a run stands at this moment, from its folder alone: for `watch`, for people and for programs.
//!
//! The log is followed, not read again: each look takes the lines that came since the last. Whether a process still writes is known
//! from the run folder's lock, which the system frees however that process ended.

use super::html::brief;
use super::jsonl::{MAX_BYTES, NOT_TERMS};
use super::provenance::duration;
use crate::error::{Code, Error, Result};
use crate::train::folder::{checkpoints, read_manifest};
use crate::whole_file;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Records behind the mean time of a step.
const RECENT: usize = 20;

/// What the run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A process has the folder and has logged no step yet.
    Starting,
    /// A process writes it.
    Running,
    /// Every step is made and saved.
    Finished,
    /// No process has it, and steps are left.
    Interrupted,
}

impl State {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Finished => "finished",
            State::Interrupted => "interrupted",
        }
    }
}

/// A run that is followed.
#[derive(Debug)]
pub struct Follower {
    root: PathBuf,
    read: u64,
    torn: Vec<u8>,
    /// Records so far.
    pub steps: Vec<Value>,
    /// How it stood at the last look.
    pub status: Status,
}

/// How a run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// The folder.
    pub run: PathBuf,
    /// `pretrain`, `refine` or `finetune`; empty where nothing says.
    pub stage: String,
    /// What it is doing.
    pub state: State,
    /// The last record; null before the first.
    pub last: Value,
    /// Steps of the whole run, where known.
    pub steps: Option<u64>,
    /// Seconds that the steps left take at the pace of the last ones, while it runs.
    pub seconds_left: Option<f64>,
    /// Step and folder of the newest checkpoint, and the best evaluation that it remembers.
    pub checkpoint: Option<(u64, PathBuf, Value)>,
    /// The last evaluation.
    pub evaluation: Map<String, Value>,
}

impl Follower {
    /// Begins to follow the run in `root`, with a first look.
    ///
    /// # Errors
    /// Input: not a run folder.
    pub fn new(root: &Path) -> Result<Follower> {
        if !root.join("settings.toml").is_file() && !root.join("metrics.jsonl").is_file() {
            return Err(Error::new(Code::RunFolder, "not a run folder")
                .at(root.display())
                .found("neither settings.toml nor metrics.jsonl")
                .wanted("a folder that pretrain, refine or finetune wrote"));
        }
        let status = Status {
            run: root.to_path_buf(),
            stage: String::new(),
            state: State::Starting,
            last: Value::Null,
            steps: None,
            seconds_left: None,
            checkpoint: None,
            evaluation: Map::new(),
        };
        let mut follower =
            Follower { root: root.to_path_buf(), read: 0, torn: Vec::new(), steps: Vec::new(), status };
        follower.look()?;
        Ok(follower)
    }

    /// Takes what came since the last look.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn look(&mut self) -> Result<()> {
        self.follow()?;
        let s = &mut self.status;
        let text =
            whole_file::read_text(&self.root.join("run.json"), "read the record", super::run::MAX_BYTES);
        let text = text.unwrap_or_default();
        let record: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        s.stage = record["stage"].as_str().unwrap_or_default().to_string();
        let newest = checkpoints(&self.root)?.into_iter().next();
        if s.checkpoint.as_ref().map(|c| c.0) != newest.as_ref().map(|c| c.0) {
            s.checkpoint = newest.map(|(step, place)| {
                let manifest = read_manifest(&place).unwrap_or(Value::Null);
                (step, place, manifest["loop"].clone())
            });
        }
        let saved = s.checkpoint.as_ref().map(|(_, _, state)| state);
        s.last = self.steps.last().cloned().unwrap_or(Value::Null);
        s.steps = s.last["steps"].as_u64().or_else(|| saved?["steps"].as_u64());
        let step = s.last["step"].as_u64().unwrap_or(0);
        let complete = saved.is_some_and(|l| l["step"].is_u64() && l["step"] == l["steps"]);
        s.state = match (locked(&self.root), complete, self.steps.is_empty()) {
            (true, _, true) => State::Starting,
            (true, _, false) => State::Running,
            (false, true, _) => State::Finished,
            (false, false, _) => State::Interrupted,
        };
        let recent = &self.steps[self.steps.len().saturating_sub(RECENT)..];
        let pace: Vec<f64> = recent.iter().filter_map(|l| l["dt_ms"].as_f64()).collect();
        let mean = pace.iter().sum::<f64>() / 1e3 / pace.len() as f64;
        s.seconds_left = (s.state == State::Running && mean.is_finite())
            .then(|| Some(s.steps?.saturating_sub(step) as f64 * mean))
            .flatten();
        if let Some(found) = self.steps.iter().rev().map(measures).find(|m| !m.is_empty()) {
            s.evaluation = found;
        }
        Ok(())
    }

    fn follow(&mut self) -> Result<()> {
        let path = self.root.join("metrics.jsonl");
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(&path, "read the run record", &e)),
        };
        let failed = |e: std::io::Error| Error::io(&path, "read the run record", &e);
        let length = file.metadata().map_err(failed)?.len();
        if length > MAX_BYTES {
            return Err(Error::new(Code::FileTooLarge, "the run record is too large")
                .at(path.display())
                .found(format!("{length} bytes"))
                .wanted(format!("at most {MAX_BYTES}")));
        }
        if length < self.read {
            // A resumed run has rewritten it.
            (self.read, self.torn, self.steps) = (0, Vec::new(), Vec::new());
        }
        file.seek(SeekFrom::Start(self.read)).map_err(failed)?;
        let mut bytes = std::mem::take(&mut self.torn);
        self.read += file.take(length - self.read).read_to_end(&mut bytes).map_err(failed)? as u64;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        self.torn = bytes.split_off(whole);
        for line in bytes.split(|&b| b == b'\n') {
            if let Ok(value) = serde_json::from_slice::<Value>(line)
                && let Some(step) = value["step"].as_u64()
            {
                // A resume that left the file longer than it was: later steps are made again.
                while self.steps.last().is_some_and(|l| l["step"].as_u64() >= Some(step)) {
                    self.steps.pop();
                }
                self.steps.push(value);
            }
        }
        Ok(())
    }

    /// (step, value) of one field.
    pub fn series(&self, field: &str) -> Vec<(f64, f64)> {
        self.steps.iter().filter_map(|l| Some((l["step"].as_f64()?, l[field].as_f64()?))).collect()
    }
}

impl Status {
    /// Name and value of each loss term.
    pub fn terms(&self) -> Vec<(&str, f64)> {
        let fields = self.last.as_object().into_iter().flatten();
        fields
            .filter(|(n, _)| !NOT_TERMS.contains(&n.as_str()) && !n.starts_with("val_"))
            .filter_map(|(n, v)| Some((n.as_str(), v.as_f64()?)))
            .collect()
    }

    /// Share of the steps that is made.
    pub fn share(&self) -> Option<f64> {
        let (step, steps) = (self.last["step"].as_f64()?, self.steps?);
        Some((step / steps.max(1) as f64).min(1.0))
    }

    /// State, step, share and time left, in a line.
    pub fn line(&self) -> String {
        let mut line = self.state.name().to_string();
        if let Some(step) = self.last["step"].as_u64() {
            line += &format!(", step {step}");
        }
        if let (Some(steps), Some(share)) = (self.steps, self.share()) {
            line += &format!(" of {steps} ({:.1} %)", 100.0 * share);
        }
        match self.seconds_left {
            Some(left) if left > 0.0 => line + &format!(", about {} left", duration(left)),
            _ => line,
        }
    }

    /// A few lines for people.
    pub fn to_text(&self) -> String {
        let number = |field: &str| self.last[field].as_f64().map_or("–".to_string(), brief);
        let mut text = format!("{} {}\n{}\n", self.stage, self.run.display(), self.line());
        if !self.last.is_null() {
            let terms: Vec<String> = self.terms().iter().map(|(n, v)| format!("{n} {}", brief(*v))).collect();
            text += &format!("loss {}  ({})\n", number("loss"), terms.join(", "));
            text += &format!(
                "{} cells/s, {} tokens/s, learning rate {}, gradient norm {}, {} skipped steps\n",
                number("cells_per_s"),
                number("tokens_per_s"),
                number("learning_rate"),
                number("grad_norm"),
                number("bad_steps")
            );
        }
        if !self.evaluation.is_empty() {
            let all: Vec<String> = self
                .evaluation
                .iter()
                .map(|(n, v)| format!("{} {}", &n[4..], v.as_f64().map_or("–".into(), brief)))
                .collect();
            text += &format!("validation: {}\n", all.join(", "));
        }
        text + &self.checkpoint_line() + "\n"
    }

    /// The newest checkpoint, in words.
    pub fn checkpoint_line(&self) -> String {
        match &self.checkpoint {
            Some((step, place, _)) => format!("last checkpoint: step {step}, {}", place.display()),
            None => "no checkpoint yet".into(),
        }
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let terms: Map<String, Value> =
            self.terms().into_iter().map(|(n, v)| (n.to_string(), json!(v))).collect();
        let checkpoint = self.checkpoint.as_ref();
        json!({"run": self.run, "stage": self.stage, "state": self.state.name(), "step": self.last["step"], "steps": self.steps,
            "share": self.share(), "seconds_left": self.seconds_left, "loss": self.last["loss"], "terms": terms,
            "learning_rate": self.last["learning_rate"], "grad_norm": self.last["grad_norm"],
            "cells_per_s": self.last["cells_per_s"], "tokens_per_s": self.last["tokens_per_s"],
            "bad_steps": self.last["bad_steps"], "time": self.last["time"], "evaluation": self.evaluation,
            "checkpoint": checkpoint.map(|(step, place, _)| json!({"step": step, "path": place})),
            "best": checkpoint.map(|(_, _, state)| state["best"].clone())})
    }
}

fn measures(line: &Value) -> Map<String, Value> {
    let fields = line.as_object().into_iter().flatten();
    fields.filter(|(n, _)| n.starts_with("val_")).map(|(n, v)| (n.clone(), v.clone())).collect()
}

/// Does a process hold the run folder's lock?
fn locked(root: &Path) -> bool {
    let Ok(lock) = File::open(root.join(".lock")) else { return false };
    // SAFETY: flock takes a descriptor that `lock` keeps open, and touches no memory. A shared lock that is had is freed with it.
    unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::folder::RunFolder;
    use std::io::Write;

    #[test]
    fn a_log_is_followed_through_torn_lines_and_a_resume() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = File::create(&path).unwrap();
        write!(log, "{{\"step\":1,\"loss\":2.0,\"dt_ms\":500,\"steps\":10}}\n{{\"step\":2,\"lo").unwrap();
        let mut run = Follower::new(dir.path()).unwrap();
        assert_eq!((run.steps.len(), run.status.state), (1, State::Interrupted));
        let held = RunFolder::open(dir.path()).unwrap();
        writeln!(log, "ss\":1.5,\"dt_ms\":1500,\"steps\":10}}").unwrap();
        run.look().unwrap();
        assert_eq!((run.series("loss"), run.status.state), (vec![(1.0, 2.0), (2.0, 1.5)], State::Running));
        assert_eq!(run.status.seconds_left, Some(8.0));
        assert_eq!(run.status.line(), "running, step 2 of 10 (20.0 %), about 8.0 s left");
        std::fs::write(&path, "{\"step\":1,\"loss\":9.0}\n").unwrap();
        run.look().unwrap();
        assert_eq!(run.series("loss"), [(1.0, 9.0)]);
        drop(held);
        run.look().unwrap();
        assert_eq!(run.status.state, State::Interrupted);
        assert!(Follower::new(&dir.path().join("none")).is_err());
    }
}
