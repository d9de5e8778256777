//! What the training commands share: flags of the split and of resuming, progress, signals.

use super::{Global, Progress};
use crate::collective::Collective;
use crate::config::{Sources, Stage};
use crate::error::Result;
use crate::trace::Trace;
use crate::train::observer::{asked_to_stop, stop_on_signals};
use crate::train::record::StepRecord;
use crate::train::{Allowed, Flow, Observer, Resume, RunInputs, SplitFlags};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What `--help` of a stage ends with: its defaults, and two examples.
pub fn help(stage: Stage, examples: &str) -> String {
    format!("{}\n\n{examples}", crate::config::describe_defaults(stage))
}

/// How cells are divided. With none of these the split of the checkpoint's run is taken over.
#[derive(Debug, clap::Args)]
pub struct SplitArgs {
    /// Divide the cells, stratified by label and seeded: train=0.67,test=0.33 or train=0.6,val=0.1,test=0.3.
    #[arg(long, value_name = "FRACTIONS", conflicts_with = "holdout")]
    split: Option<String>,
    /// Cells whose obs column has this value are the test part.
    #[arg(long, value_name = "COLUMN=VALUE")]
    holdout: Option<String>,
    /// With --holdout: share of the other cells that validates.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, requires = "holdout")]
    holdout_val: f64,
    /// Leave out cells with this label (may be repeated).
    #[arg(long, value_name = "LABEL")]
    exclude_label: Vec<String>,
}

impl SplitArgs {
    /// With the command's own label flags.
    pub fn flags(&self, label: Option<String>, labels_per_class: Option<usize>) -> SplitFlags {
        SplitFlags {
            split: self.split.clone(),
            holdout: self.holdout.clone(),
            validation: self.holdout_val,
            label,
            exclude: self.exclude_label.clone(),
            labels_per_class,
        }
    }
}

/// `--resume`, `--resume=auto`.
#[derive(Debug, clap::Args)]
pub struct ResumeFlag {
    /// Continue the run in --out; `auto` skips damaged checkpoints and starts afresh where there is none.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "last",
        value_parser = ["last", "auto"])]
    resume: Option<String>,
    /// With --resume: go on with another corpus. It is divided by the run's rule, and its cells come from the first epoch on.
    #[arg(long, requires = "resume")]
    allow_corpus: bool,
    /// With --resume: go on with a corpus of another vocabulary, of the same length.
    #[arg(long, requires = "resume")]
    allow_vocabulary: bool,
    /// With --resume: go on with the settings that --set, --config and the environment say now, where they differ.
    #[arg(long, requires = "resume")]
    allow_settings: bool,
    /// Take over a run folder whose writer was killed on another host.
    #[arg(long)]
    force_unlock: bool,
}

impl ResumeFlag {
    fn allowed(&self) -> Allowed {
        Allowed {
            corpus: self.allow_corpus,
            vocabulary: self.allow_vocabulary,
            settings: self.allow_settings,
        }
    }

    fn mode(&self) -> Resume {
        match self.resume.as_deref() {
            None => Resume::No,
            Some("auto") => Resume::Auto,
            Some(_) => Resume::Last,
        }
    }
}

/// `--trace FILE`.
#[derive(Debug, Clone, clap::Args)]
pub struct TraceFlag {
    /// Write where the time goes, phase by phase and op by op, as a Chrome trace: open it in ui.perfetto.dev.
    #[arg(long = "trace", value_name = "FILE.json")]
    file: Option<PathBuf>,
}

impl TraceFlag {
    /// Is a file named?
    pub fn is_set(&self) -> bool {
        self.file.is_some()
    }
    /// Records from here on, where a file is named.
    pub fn start(&self) -> Result<Option<Trace>> {
        self.file.as_deref().map(Trace::start).transpose()
    }
}

/// The library's inputs; `preset` and `checkpoint` are the command's to fill.
pub fn inputs(
    global: &Global,
    corpus: &Path,
    out: &Path,
    split: SplitFlags,
    resume: &ResumeFlag,
) -> RunInputs {
    RunInputs {
        device: global.device,
        corpus: corpus.to_path_buf(),
        out: out.to_path_buf(),
        split,
        resume: resume.mode(),
        allow: resume.allowed(),
        force_unlock: resume.force_unlock,
        resume_command: Some(resume_command()),
        sources: Sources::of_process(global.config.clone(), global.set.clone(), global.seed),
        ..RunInputs::default()
    }
}

/// This command line with `--resume`.
fn resume_command() -> String {
    let mut words: Vec<String> = std::env::args().collect();
    if let Some(program) = words.first_mut() {
        *program = PathBuf::from(&*program)
            .file_name()
            .map_or("cellrefine".into(), |n| n.to_string_lossy().into_owned());
    }
    if !words.iter().any(|word| word == "--resume" || word.starts_with("--resume=")) {
        words.push("--resume".into());
    }
    let plain = |word: &str| {
        !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c))
    };
    let quoted = |word: &String| match plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// Prints notes and records, moves the progress bar, passes on SIGINT and SIGTERM.
pub struct Watcher<'a> {
    global: &'a Global,
    /// The leading rank speaks for all.
    speaks: bool,
    progress: Option<Progress>,
    stop: Arc<AtomicBool>,
}

impl<'a> Watcher<'a> {
    /// Watches for `global`; from here on the first signal asks for a checkpoint.
    pub fn new(global: &'a Global, ranks: &Collective) -> Self {
        Watcher { global, speaks: ranks.leads(), progress: None, stop: stop_on_signals() }
    }
}

impl Observer for Watcher<'_> {
    fn begin(&mut self, stage: Stage, step: u64, steps: u64) {
        if !self.speaks {
            return;
        }
        let progress = self.global.progress(stage.name(), Some(steps));
        progress.start_at(step);
        self.progress = Some(progress);
    }

    fn note(&mut self, text: &str) {
        match &self.progress {
            _ if !self.speaks => {}
            Some(progress) => progress.above(|| self.global.note(text)),
            None => self.global.note(text),
        }
    }

    fn step(&mut self, _step: u64, record: Option<&StepRecord>) -> Flow {
        if let Some(progress) = &self.progress {
            if let Some(record) = record {
                progress.say(&record.to_text());
            }
            progress.add(1);
        }
        if asked_to_stop(&self.stop) { Flow::Stop } else { Flow::Continue }
    }

    fn end(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}
