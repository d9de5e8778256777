//! The command line: one file per command, each `flags -> settings -> one call into the library -> Output`.
//!
//! Results go to stdout, diagnostics and progress to stderr. Under `--json` stdout holds exactly one JSON object, errors
//! included. Exit codes are those of [`Kind`].

mod annotate;
mod bench;
mod bug_report;
mod completions;
mod demo;
mod doctor;
mod embed;
mod eval;
mod explain;
mod export;
mod finetune;
mod inspect;
mod launch;
mod man;
mod markers;
mod merge;
mod pack;
mod perturb;
mod plan;
mod pretrain;
mod progress;
mod ranks;
mod refine;
mod report;
mod training;
mod vocab;
mod watch;

pub use progress::Progress;

use crate::backend::Choice;
use crate::disk::fault;
use crate::error::{Code, Error, Kind, Result};
use clap::{Args, Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// What a command prints: text for people, the same content as one JSON object for programs.
#[derive(Debug, Default)]
pub struct Output {
    /// Lines for stdout; a final newline is added where missing.
    pub text: String,
    /// The object printed under `--json`.
    pub json: serde_json::Value,
}

/// Prototype-guided post-pretraining of single-cell transformers.
#[derive(Debug, Parser)]
#[command(name = "cellrefine", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Examples:\n  cellrefine demo\n  cellrefine pack cells.h5ad --vocab V.tsv --out cells.cells --obs cell_type"
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print exactly one JSON object on stdout.
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no notes on stderr.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Worker threads; 0 = all cores. Results do not depend on it.
    #[arg(
        long,
        global = true,
        default_value_t = 0,
        value_name = "N",
        env = "CELLREFINE_THREADS",
        hide_env = true
    )]
    pub threads: usize,
    /// Where the network runs: auto, cpu (cuda, cuda:N and emulated where built).
    #[arg(
        long,
        global = true,
        default_value = "auto",
        value_name = "DEVICE",
        env = "CELLREFINE_DEVICE",
        hide_env = true
    )]
    pub device: Choice,
    /// Seed of everything random.
    #[arg(long, global = true, value_name = "N", env = "CELLREFINE_SEED", hide_env = true)]
    pub seed: Option<u64>,
    /// Settings file (TOML); weaker than CELLREFINE_* variables and --set.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One setting, dotted: --set objective.proto=0.5 (may be repeated).
    #[arg(long = "set", global = true, value_name = "A.B=C")]
    pub set: Vec<String>,
}

impl Global {
    /// Notes and progress wanted on stderr?
    pub fn talks(&self) -> bool {
        !self.quiet
    }
    /// A note on stderr, unless `--quiet`.
    pub fn note(&self, text: impl std::fmt::Display) {
        if self.talks() {
            complain(text);
        }
    }
    /// A progress bar (a terminal) or a line every few seconds (no terminal); silent under `--quiet`.
    pub fn progress(&self, what: &str, total: Option<u64>) -> Progress {
        Progress::new(what, total, self.talks(), std::io::stderr().is_terminal())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole story on the bundled real cells: before and after refine, in one table.
    Demo(demo::Flags),
    /// Build or convert a gene vocabulary.
    Vocab(vocab::Flags),
    /// Turn .h5ad files, 10x matrices or tokenised data sets into a corpus; prints the gene-mapping report.
    Pack(pack::Flags),
    /// One manifest over shards packed apart.
    Merge(merge::Flags),
    /// What a corpus, checkpoint, vocabulary, marker file or run is, its numbers, its health.
    Inspect(inspect::Flags),
    /// Derive or check marker-gene sets.
    Markers(markers::Flags),
    /// Masked-gene pretraining.
    Pretrain(pretrain::Flags),
    /// Prototype-guided post-pretraining: the main job.
    Refine(refine::Flags),
    /// A classifier on top of a checkpoint.
    Finetune(finetune::Flags),
    /// pretrain, refine or finetune as several processes of this machine.
    Launch(launch::Flags),
    /// Cell embeddings, one row per cell, in input order.
    Embed(embed::Flags),
    /// Delete or overexpress genes in silico: how far cells move, and towards which prototype.
    Perturb(perturb::Flags),
    /// Zero-shot labels by nearest prototype, marker score or both.
    Annotate(annotate::Flags),
    /// Accuracy, macro-F1, probes, kNN, recall@k, clustering and mixing scores.
    Eval(eval::Flags),
    /// A corpus as Geneformer's .dataset folder, or a checkpoint as a Hugging Face model folder.
    Export(export::Flags),
    /// One self-contained page over one or more runs.
    Report(report::Flags),
    /// A run as it goes: loss, pace, time left, last checkpoint.
    Watch(watch::Flags),
    /// Timings against counted floors, as JSON.
    Bench(bench::Flags),
    /// Memory and FLOPs of a run before it starts, per named buffer.
    Plan(plan::Flags),
    /// What this build and this machine can do.
    Doctor(doctor::Flags),
    /// What an error's code means and what to do about it.
    Explain(explain::Flags),
    /// Completions for a shell, on stdout.
    Completions(completions::Flags),
    /// Manual pages, one a command, into a folder.
    Man(man::Flags),
    /// Breaks off as a fault of the program would, so that its report can be tested.
    #[command(hide = true)]
    BreakOff {
        /// As an error that is returned rather than a panic.
        #[arg(long)]
        returned: bool,
    },
}

impl Command {
    /// Threads of a rank that shares its machine's cores with others; 0 = not among several.
    fn threads_of_rank(&self, device: Choice) -> usize {
        let flags = match self {
            Command::Pretrain(f) => &f.ranks,
            Command::Refine(f) => &f.ranks,
            Command::Finetune(f) => &f.ranks,
            _ => return 0,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // What cannot be read is refused when the command joins its ranks.
        flags.launch(device).map_or(0, |launch| if launch.world > 1 { launch.threads(cores) } else { 0 })
    }
}

fn dispatch(global: &Global, command: &Command) -> Result<Output> {
    match command {
        Command::Demo(f) => demo::run(global, f),
        Command::Vocab(f) => vocab::run(global, f),
        Command::Pack(f) => pack::run(global, f),
        Command::Merge(f) => merge::run(global, f),
        Command::Inspect(f) => inspect::run(global, f),
        Command::Markers(f) => markers::run(global, f),
        Command::Pretrain(f) => pretrain::run(global, f),
        Command::Refine(f) => refine::run(global, f),
        Command::Finetune(f) => finetune::run(global, f),
        Command::Launch(f) => match launch::run(global, f)? {
            0 => Ok(Output::default()),
            // The ranks have said why.
            code => std::process::exit(code),
        },
        Command::Embed(f) => embed::run(global, f),
        Command::Perturb(f) => perturb::run(global, f),
        Command::Annotate(f) => annotate::run(global, f),
        Command::Eval(f) => eval::run(global, f),
        Command::Export(f) => export::run(global, f),
        Command::Report(f) => report::run(global, f),
        Command::Watch(f) => watch::run(global, f),
        Command::Bench(f) => bench::run(global, f),
        Command::Plan(f) => plan::run(global, f),
        Command::Doctor(f) => doctor::run(global, f),
        Command::Explain(f) => explain::run(f),
        Command::Completions(f) => completions::run(&program(), f),
        Command::Man(f) => man::run(program(), f),
        Command::BreakOff { returned: true } => Err(Error::bug("asked to return a fault")),
        // On a thread of the pool, as most work is.
        Command::BreakOff { .. } => rayon::join(|| panic!("asked to break off"), || ()).0,
    }
}

/// The whole command line as clap sees it, for what is generated from it.
fn program() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Parses the arguments, runs the command, prints, and returns the exit code. Only this function prints results and errors.
pub fn main() -> u8 {
    bug_report::install();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() => return wrong_usage(&e),
        Err(e) => {
            let _ = e.print();
            return 0;
        }
    };
    let threads = match cli.global.threads {
        0 => cli.command.threads_of_rank(cli.global.device),
        threads => threads,
    };
    if threads > 0 {
        // Fails only where a pool was already built, which nothing before this line does.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    let run = std::panic::AssertUnwindSafe(|| {
        fault::check()?;
        dispatch(&cli.global, &cli.command)
    });
    match std::panic::catch_unwind(run).unwrap_or_else(|_| Err(bug_report::panicked())) {
        Ok(output) => {
            let text = if cli.global.json { output.json.to_string() } else { output.text };
            if ranks::is_follower() { 0 } else { print(&text) }
        }
        Err(e) => {
            let e = if e.kind() == Kind::Bug { bug_report::report(e) } else { e };
            // No error is without a next step: where it knows none of its own, its explanation does.
            let e = match e.next_text() {
                Some(_) => e,
                None => {
                    let explain = format!("cellrefine explain {}", e.code());
                    e.next(explain)
                }
            };
            if cli.global.json && !ranks::is_follower() {
                print(&e.to_json().to_string());
            }
            if let Some(text) = ranks::said(&e) {
                complain(text);
            }
            e.kind().exit_code()
        }
    }
}

/// Prints clap's error in the form of ours; its own first line is the message.
fn wrong_usage(e: &clap::Error) -> u8 {
    let plain = e.render().to_string();
    let message = plain.lines().next().unwrap_or_default();
    // Help in place of a missing command is no error text.
    let Some(message) = message.strip_prefix("error: ") else {
        let _ = e.print();
        return Kind::Usage.exit_code();
    };
    let error = Error::new(Code::CommandLine, message).next("cellrefine COMMAND --help");
    if std::env::args_os().any(|a| a == "--json") {
        print(&error.to_json().to_string());
    }
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let text = if colour { e.render().ansi().to_string() } else { plain };
    complain(text.replacen("error:", &format!("error[{}]:", error.code()), 1).trim_end_matches('\n'));
    error.kind().exit_code()
}

/// A line on stderr. Whoever listened there may have gone (`2>&1 | head`): that ends no training, as `eprintln!` would.
pub(crate) fn complain(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes to stdout; a closed pipe (`cellrefine … | head`) is no failure.
fn print(text: &str) -> u8 {
    let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}{newline}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            let e = Error::io("stdout", "write the result", &e);
            complain(format_args!("error[{}]: {e}", e.code()));
            e.kind().exit_code()
        }
        _ => 0,
    }
}
