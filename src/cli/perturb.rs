//! `cellrefine perturb`.

use super::annotate::MarkerFlags;
use super::embed::EncoderFlags;
use super::{Global, Output};
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Code, Error, Result, nearest};
use crate::eval::annotate;
use crate::eval::embed::Embedder;
use crate::eval::labeller::Labeller;
use crate::eval::perturb::{Effect, Kind, Request, perturb, present, rows, write};
use crate::eval::zero_shot::Evidence;
use crate::genes::Vocab;
use crate::genes::vocab::Match;
use crate::on_backend;
use crate::ops::Backend;
use crate::rng::Philox;
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// Flags of `perturb`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Deletes genes from cells, or puts them at the front of the rank order, and writes how far the cell's embedding moves (similarity: \
cosine with the unperturbed cell) and whether towards or away from each prototype (shift: change of the cosine, mean over the cells; \
towards: share of the cells where it rises). One line per gene and prototype. Every row is a pass through the encoder: `--max-cells`, \
`--genes` and `--where` keep it short.

Examples:
  cellrefine perturb --corpus X.cells --checkpoint RUN --kind delete --out deletions.tsv
  cellrefine perturb --corpus X.cells --checkpoint RUN --kind overexpress --genes PAX6,NKX2-2 --together --where cell_type=alpha --out pax6.tsv")]
pub struct Flags {
    /// Corpus, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run folder, checkpoint folder or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// The table to write.
    #[arg(long, value_name = "FILE.tsv")]
    out: PathBuf,
    /// What happens to the genes.
    #[arg(long, value_enum)]
    kind: Kind,
    /// Genes, by Ensembl id or symbol, with commas between [default: every gene that --min-cells of the cells hold].
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    genes: Vec<String>,
    /// Genes, one a line.
    #[arg(long, value_name = "FILE", conflicts_with = "genes")]
    genes_file: Option<PathBuf>,
    /// Perturb all the genes at once instead of one by one.
    #[arg(long)]
    together: bool,
    /// Only cells with this value in this obs column.
    #[arg(long = "where", value_name = "COL=VALUE")]
    only: Option<String>,
    /// Cells looked at, drawn by --seed; 0 = all.
    #[arg(long, default_value_t = 500, value_name = "N")]
    max_cells: usize,
    /// Without --genes: leave out genes that fewer of the cells hold.
    #[arg(long, default_value_t = 10, value_name = "N")]
    min_cells: u32,
    /// Marker sets, GMT or TSV, to make prototypes from [default: the checkpoint's prototypes].
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    #[command(flatten)]
    marker: MarkerFlags,
    #[command(flatten)]
    encoder: EncoderFlags,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let corpus = Arc::new(Corpus::open(&flags.corpus)?);
    let cells = cells(&corpus, flags, global.seed.unwrap_or(0))?;
    on_backend!(global.device, flags.encoder.dtype, |dev: B, A| with::<B, A>(
        dev, global, flags, corpus, cells
    ))
}

fn with<B: Backend<A>, A: Act>(
    dev: &B,
    global: &Global,
    flags: &Flags,
    corpus: Arc<Corpus>,
    cells: Vec<u32>,
) -> Result<Output> {
    let vocab = corpus.vocab()?;
    let options = flags.encoder.options(&flags.checkpoint);
    let mut embedder = Embedder::<B, A>::open(dev, &flags.checkpoint, corpus.clone(), &options)?;
    let genes = match named(flags)? {
        Some(names) => resolve(&vocab, &names)?,
        None if flags.together => {
            return Err(Error::new(
                Code::FlagConflict,
                "--together perturbs the genes that --genes names, at once",
            ));
        }
        None => present(&corpus, &cells, embedder.context(), flags.min_cells)?,
    };
    if genes.is_empty() {
        return Err(Error::new(Code::GeneUnknown, "no gene to perturb")
            .at(corpus.path().display())
            .found(format!(
                "{} cells, and none of their genes is in {} of them",
                cells.len(),
                flags.min_cells
            ))
            .next("lower --min-cells, or name --genes"));
    }
    let sets = if flags.together { vec![genes] } else { genes.into_iter().map(|g| vec![g]).collect() };
    let labeller = labeller(flags, &corpus, &mut embedder)?;
    let request = Request { corpus, cells, kind: flags.kind, sets };
    let passes = rows(&request, embedder.context())?;
    global.note(format!(
        "{} of {} cells, {} {}: {passes} passes through the encoder",
        request.cells.len(),
        request.corpus.cells(),
        request.sets.len(),
        if flags.together { "set of genes" } else { "genes" }
    ));
    let progress = global.progress("perturb", Some(passes));
    let effects = perturb(&mut embedder, labeller.as_ref(), &request, |n| progress.add(n))?;
    progress.finish();
    let names: Vec<(String, String)> = request.sets.iter().map(|set| joined(&vocab, set)).collect();
    let prototypes = labeller.as_ref().map_or(Vec::new(), |l| l.names.clone());
    write(&flags.out, &names, &prototypes, &effects)?;
    Ok(output(flags, &request, labeller.as_ref(), &names, &effects, passes))
}

/// Cells of `--where`, at most `--max-cells` of them, in corpus order.
fn cells(corpus: &Corpus, flags: &Flags, seed: u64) -> Result<Vec<u32>> {
    let mut cells: Vec<u32> = (0..corpus.cells() as u32).collect();
    if let Some(only) = &flags.only {
        let (column, value) = only.split_once('=').ok_or_else(|| {
            Error::new(Code::FlagValue, "--where needs an obs column and a value")
                .found(only)
                .wanted("COL=VALUE")
        })?;
        let all = corpus.categorical(column)?;
        let Some(code) = all.categories.iter().position(|c| c == value) else {
            let e = Error::new(Code::ObsValueMissing, format!("no cell has this value of {column}"))
                .at(corpus.path().display());
            let near = nearest(value, all.categories.iter().map(String::as_str));
            return Err(e.found(value).wanted(match near {
                Some(near) if all.categories.len() > 20 => {
                    format!("one of {} values; the nearest is {near:?}", all.categories.len())
                }
                _ => all.categories.join(", "),
            }));
        };
        cells.retain(|c| all.codes[*c as usize] == code as i32);
    }
    if flags.max_cells > 0 && cells.len() > flags.max_cells {
        Philox::new(seed, 0, 0).shuffle(&mut cells);
        cells.truncate(flags.max_cells);
        cells.sort_unstable();
    }
    Ok(cells)
}

/// What `--genes` or `--genes-file` name.
fn named(flags: &Flags) -> Result<Option<Vec<String>>> {
    let Some(file) = &flags.genes_file else {
        return Ok((!flags.genes.is_empty()).then(|| flags.genes.clone()));
    };
    let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, "read the genes", &e))?;
    let names = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    Ok(Some(names.map(String::from).collect()))
}

/// Tokens of `names`, in their order, each once.
fn resolve(vocab: &Vocab, names: &[String]) -> Result<Vec<u32>> {
    let mut genes = Vec::new();
    for name in names {
        match vocab.resolve(name) {
            Match::One(gene) if genes.contains(&gene) => {}
            Match::One(gene) => genes.push(gene),
            Match::Unknown => {
                let e = Error::new(Code::GeneUnknown, "a gene that the vocabulary does not have").found(name);
                return Err(match vocab.has_symbols() {
                    true => e.wanted("an Ensembl id or a symbol of the vocabulary"),
                    false => e.wanted("an Ensembl id: this vocabulary has no symbols"),
                });
            }
            Match::Ambiguous(ids) => {
                let ids: Vec<&str> = ids.iter().map(|id| vocab.token(*id)).collect();
                return Err(Error::new(Code::GeneAmbiguous, "a symbol that several genes have")
                    .found(name)
                    .wanted(format!("one of {}", ids.join(", "))));
            }
        }
    }
    Ok(genes)
}

/// The checkpoint's prototypes, or those that `--markers` make; `None` where there are neither.
fn labeller<B: Backend<A>, A: Act>(
    flags: &Flags,
    corpus: &Arc<Corpus>,
    embedder: &mut Embedder<B, A>,
) -> Result<Option<Labeller>> {
    let Some(markers) = &flags.markers else { return Labeller::from_checkpoint(embedder) };
    let request = annotate::Request {
        corpus: corpus.clone(),
        checkpoint: flags.checkpoint.clone(),
        markers: flags.marker.choice(markers),
        evidence: Evidence::Prototype,
        prototypes: flags.marker.mode(),
        top: 1,
        unknown_below: 0.0,
        temperature: None,
        embed: flags.encoder.options(&flags.checkpoint),
    };
    Labeller::from_markers(&request, embedder, &|_| ()).map(Some)
}

/// Ids and names of a set.
fn joined(vocab: &Vocab, set: &[u32]) -> (String, String) {
    let join = |name: &dyn Fn(u32) -> String| set.iter().map(|g| name(*g)).collect::<Vec<_>>().join(",");
    (join(&|g| vocab.token(g).to_string()), join(&|g| vocab.name(g).to_string()))
}

/// Lines of the summary: the strongest shifts.
const STRONGEST: usize = 10;

fn output(
    flags: &Flags,
    request: &Request,
    labeller: Option<&Labeller>,
    names: &[(String, String)],
    effects: &[Effect],
    passes: u64,
) -> Output {
    let prototypes: &[String] = labeller.map_or(&[], |l| &l.names);
    let mut text = format!(
        "{}: {} of {} sets of genes changed a cell\n",
        flags.out.display(),
        effects.iter().filter(|e| e.cells > 0).count(),
        effects.len()
    );
    let mut strongest: Vec<(f64, usize, usize)> = effects
        .iter()
        .enumerate()
        .filter(|(_, e)| e.cells > 0)
        .flat_map(|(g, e)| e.shift.iter().enumerate().map(move |(k, s)| (s.mean(e.cells), g, k)))
        .collect();
    strongest.sort_by(|a, b| b.0.abs().total_cmp(&a.0.abs()).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    strongest.truncate(STRONGEST);
    if prototypes.is_empty() {
        text += "no prototypes: the checkpoint has none, and --markers makes them\n";
    } else {
        let _ =
            writeln!(text, "prototypes from the {}\n", labeller.and_then(|l| l.origin).unwrap_or("markers"));
        let _ = writeln!(text, "{:>8}  {:>6}  {:<20}  prototype", "shift", "cells", "gene");
        for (shift, g, k) in &strongest {
            let (cells, gene) = (effects[*g].cells, &names[*g].1);
            let _ = writeln!(text, "{shift:>+8.4}  {cells:>6}  {gene:<20}  {}", prototypes[*k]);
        }
    }
    let strongest: Vec<_> = strongest
        .iter()
        .map(|(shift, g, k)| {
            json!({"gene_id": names[*g].0, "symbol": names[*g].1, "prototype": prototypes[*k], "shift": shift,
            "cells": effects[*g].cells})
        })
        .collect();
    Output {
        text,
        json: json!({"out": flags.out, "kind": request.kind, "cells": request.cells.len(), "sets": effects.len(),
            "passes": passes, "prototypes": prototypes, "strongest": strongest}),
    }
}
