//! `cellrefine demo`: the before/after table on the bundled real cells.

use super::{Global, Output};
use crate::config::Sources;
use crate::demo::{Epochs, MEASURES, Options, REPORT, SeedResult, mean_and_spread, run as run_demo, to_json};
use crate::error::Result;
use std::fmt::Write;
use std::path::PathBuf;

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  cellrefine demo\n  cellrefine demo --out /tmp/demo --seeds 5 --json")]
pub struct Flags {
    /// Folder for data, corpora, runs and tables; an earlier demo there is replaced.
    #[arg(long, value_name = "DIR", default_value = "cellrefine-demo")]
    out: PathBuf,
    /// Seeds 0, 1, …: each its own split, weights and order.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Passes over the training cells in pretraining.
    #[arg(long, value_name = "N", default_value_t = 12)]
    pretrain_epochs: u32,
    /// Passes in refine.
    #[arg(long, value_name = "N", default_value_t = 4)]
    refine_epochs: u32,
    /// Passes in fine-tuning after refine.
    #[arg(long, value_name = "N", default_value_t = 6)]
    finetune_epochs: u32,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let first = global.seed.unwrap_or(0);
    let options = Options {
        out: flags.out.clone(),
        seeds: (first..first + flags.seeds).collect(),
        epochs: Epochs {
            pretrain: flags.pretrain_epochs,
            refine: flags.refine_epochs,
            finetune: flags.finetune_epochs,
        },
        sources: Sources::of_process(global.config.clone(), global.set.clone(), None),
    };
    let start = std::time::Instant::now();
    let results =
        run_demo(&options, |what| global.note(format!("{:4.0} s  {what}", start.elapsed().as_secs_f64())))?;
    let json = to_json(&options, &results);
    let table = options.out.join("table.json");
    crate::disk::replace(&table, format!("{json:#}\n").as_bytes())?;
    Ok(Output { text: text(&options, &results, start.elapsed().as_secs_f64()), json })
}

fn text(options: &Options, results: &[SeedResult], seconds: f64) -> String {
    let mut t = String::new();
    let _ = writeln!(
        t,
        "700 blood cells, 10 types, mean ± standard deviation over {} seeds ({seconds:.0} s)\n",
        results.len()
    );
    let _ = writeln!(t, "{:<28} {:>15} {:>15} {:>8}", "", "before refine", "after refine", "change");
    for (i, name) in MEASURES.iter().enumerate() {
        let (before, spread_before) = mean_and_spread(results.iter().map(|r| r.before[i]));
        let (after, spread_after) = mean_and_spread(results.iter().map(|r| r.after[i]));
        let cell = |mean: f64, spread: f64| format!("{mean:.3} ± {spread:.3}");
        let _ = writeln!(
            t,
            "{name:<28} {:>15} {:>15} {:>+8.3}",
            cell(before, spread_before),
            cell(after, spread_after),
            after - before
        );
    }
    let (macro_f1, _) = mean_and_spread(results.iter().map(|r| r.regression[0]));
    let (tail, _) = mean_and_spread(results.iter().map(|r| r.regression[1]));
    let _ = writeln!(
        t,
        "\nbeside them, logistic regression on expression: macro-F1 {macro_f1:.3}, tail F1 {tail:.3}"
    );
    let e = options.epochs;
    let _ = writeln!(
        t,
        "equal compute: {} epochs of fine-tuning before, {} of refine and {} of fine-tuning after; same class weights",
        e.refine + e.finetune,
        e.refine,
        e.finetune
    );
    let out = options.out.display();
    let seed = options.seeds[0];
    let _ = writeln!(t, "\nreport:  {out}/{REPORT}  (before and after, cell by cell: open it in a browser)");
    let _ = writeln!(t, "outputs: {out}  (runs, corpora, table.json)");
    let _ = writeln!(
        t,
        "look:    cellrefine eval --corpus {out}/seed-{seed}/pbmc700.cells --checkpoint {out}/seed-{seed}/refined --label cell_type"
    );
    let _ = writeln!(t, "your own file:");
    let _ = writeln!(t, "  cellrefine vocab build cells.h5ad --out vocab.tsv");
    let _ = writeln!(t, "  cellrefine pack cells.h5ad --vocab vocab.tsv --out cells.cells");
    t
}
