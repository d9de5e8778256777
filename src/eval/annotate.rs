//! `annotate`: a label for every cell without training on labels, written as a table.
//!
//! Types are those of the checkpoint's prototypes where the marker file speaks of them, else the sets of the marker file; then
//! prototypes are made from the markers by the encoder itself. The reference (what a full marker score is, and the centre of
//! prototypes made here) is the training part of the checkpoint's run where it divided this corpus, else all cells. Cells stream
//! through: memory does not grow with them, unless prototypes are made from cells.

use super::embed::{EmbedOptions, Embedder};
use super::labeller::{Labeller, Scores};
use super::request::MarkerChoice;
use super::zero_shot::{Evidence, top};
use crate::corpus::Corpus;
use crate::device::Act;
use crate::disk::Pending;
use crate::error::{Code, Error, Result};
use crate::objective::PrototypeMode;
use crate::ops::Backend;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What to annotate, and by what.
pub struct Request {
    /// The cells.
    pub corpus: Arc<Corpus>,
    /// Run, checkpoint or Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Marker sets.
    pub markers: MarkerChoice,
    /// What speaks for a label.
    pub evidence: Evidence,
    /// Make prototypes in this way instead of taking the checkpoint's.
    pub prototypes: Option<PrototypeMode>,
    /// Labels a cell.
    pub top: usize,
    /// A cell whose best probability is below this is called unknown.
    pub unknown_below: f32,
    /// Softmax temperature; `None` = the checkpoint's, else [`TEMPERATURE`](super::zero_shot::TEMPERATURE).
    pub temperature: Option<f32>,
    /// How cells become rows.
    pub embed: EmbedOptions,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Annotation {
    /// Cells.
    pub cells: usize,
    /// Names of the types.
    pub types: Vec<String>,
    /// Cells by label, `unknown` included.
    pub counts: BTreeMap<String, usize>,
    /// Where prototypes came from; `None` where none were used.
    pub prototypes: Option<&'static str>,
    /// What the marker scale and the centre were taken from.
    pub reference: String,
    /// Temperature used.
    pub temperature: f32,
    /// Types without a usable marker set.
    pub without_markers: Vec<String>,
}

/// Name of the label that says "none of these".
pub const UNKNOWN: &str = "unknown";

/// Annotates every cell of the corpus into `out` (TSV: cell_id, label, probability, cosine, marker_score, label_2, …).
///
/// # Errors
/// Usage: no labels asked for. Input: what corpus, checkpoint and markers can be guilty of.
pub fn annotate<B: Backend<A>, A: Act>(
    dev: &B,
    request: &Request,
    out: &Path,
    progress: impl Fn(u64),
) -> Result<Annotation> {
    if request.top == 0 {
        return Err(Error::new(Code::FlagValue, "--top is the number of labels a cell: at least 1"));
    }
    let corpus = &request.corpus;
    let mut embedder = Embedder::<B, A>::open(dev, &request.checkpoint, corpus.clone(), &request.embed)?;
    let labeller = Labeller::from_markers(request, &mut embedder, &progress)?;
    let names = &labeller.names;
    let p = names.len();
    let mut file = Pending::create(out)?;
    let mut header = "cell_id\tlabel\tprobability\tcosine\tmarker_score".to_string();
    (2..=request.top.min(p)).for_each(|r| write!(header, "\tlabel_{r}\tprobability_{r}").unwrap_or(()));
    file.write(format!("{header}\n").as_bytes())?;
    let mut counts = BTreeMap::new();
    let mut block = |cells: &[u32], rows: Option<&[f32]>| -> Result<()> {
        let Scores { probability, cosine, marker } = labeller.scores(corpus, cells, rows)?;
        let number = |table: &Option<Vec<f32>>, at: usize| {
            table.as_ref().map_or(String::new(), |t| format!("{:.5}", t[at]))
        };
        let mut text = String::new();
        for (i, &cell) in cells.iter().enumerate() {
            let row = &probability[i * p..(i + 1) * p];
            let best = top(row, request.top);
            let label = if row[best[0]] < request.unknown_below { UNKNOWN } else { &names[best[0]] };
            *counts.entry(label.to_string()).or_insert(0usize) += 1;
            let at = i * p + best[0];
            let _ = write!(
                text,
                "{}\t{}\t{:.5}\t{}\t{}",
                field(corpus.cell_id(cell as usize)?),
                field(label),
                row[best[0]],
                number(&cosine, at),
                number(&marker, at)
            );
            for &k in &best[1..] {
                let _ = write!(text, "\t{}\t{:.5}", field(&names[k]), row[k]);
            }
            text.push('\n');
        }
        file.write(text.as_bytes())?;
        progress(cells.len() as u64);
        Ok(())
    };
    let all: Vec<u32> = (0..corpus.cells() as u32).collect();
    if request.evidence == Evidence::Markers {
        for cells in all.chunks(1024) {
            block(cells, None)?;
        }
    } else {
        embedder.each(&all, |cells, rows| block(cells, Some(rows)))?;
    }
    file.publish()?;
    Ok(Annotation {
        cells: all.len(),
        without_markers: labeller.without_markers,
        types: labeller.names,
        counts,
        prototypes: labeller.origin,
        reference: labeller.reference,
        temperature: labeller.temperature,
    })
}

/// A field of a TSV: tabs and line breaks, which ids may hold, would break the table.
fn field(text: &str) -> String {
    text.replace(['\t', '\n', '\r'], " ")
}
