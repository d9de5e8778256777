//! `annotate`: a label for every cell without training on labels, written as a table.
//!
//! Types are those of the checkpoint's prototypes where the marker file speaks of them, else the sets of the marker file; then
//! prototypes are made from the markers by the encoder itself. The reference (what a full marker score is, and the centre of
//! prototypes made here) is the training part of the checkpoint's run where it divided this corpus, else all cells. Cells stream
//! through: memory does not grow with them, unless prototypes are made from cells.

use super::embed::{EmbedOptions, Embedder};
use super::npy::Pending;
use super::prototypes::{build_prototypes, origin};
use super::request::{MarkerChoice, recorded};
use super::rows::Rows;
use super::zero_shot::{Evidence, MarkerScale, TEMPERATURE, combine, cosines, posterior, top};
use crate::corpus::{Corpus, Split};
use crate::device::Act;
use crate::error::{Error, Result};
use crate::genes::marker_score::marker_scores;
use crate::genes::markers::MarkerSets;
use crate::objective::{PrototypeMode, StoredPrototypes};
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
    /// Softmax temperature; `None` = the checkpoint's, else [`TEMPERATURE`].
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

struct Types {
    sets: MarkerSets,
    vectors: Vec<f32>, // (P, D)
    centre: Vec<f32>,  // (D)
    origin: Option<&'static str>,
    temperature: f32,
}

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
        return Err(Error::usage("--top is the number of labels a cell: at least 1"));
    }
    let corpus = &request.corpus;
    let (reference, reference_name) = reference(request)?;
    let mut embedder = Embedder::<B, A>::open(dev, &request.checkpoint, corpus.clone(), &request.embed)?;
    let width = embedder.width();
    let types = types(request, &mut embedder, &reference, &progress)?;
    let names = &types.sets.names;
    let p = names.len();
    let scale = MarkerScale::fit(&marker_scores(corpus, &reference, &types.sets)?, p);
    let mut file = Pending::create(out)?;
    let mut header = "cell_id\tlabel\tprobability\tcosine\tmarker_score".to_string();
    (2..=request.top.min(p)).for_each(|r| write!(header, "\tlabel_{r}\tprobability_{r}").unwrap_or(()));
    file.write(format!("{header}\n").as_bytes())?;
    let mut counts = BTreeMap::new();
    let temperature = request.temperature.unwrap_or(types.temperature);
    let mut block = |cells: &[u32], cosine: Option<Vec<f32>>| -> Result<()> {
        let mut marker = marker_scores(corpus, cells, &types.sets)?;
        scale.apply(&mut marker);
        let mut scores = combine(request.evidence, cosine.as_deref(), Some(&marker))?;
        posterior(&mut scores, p, temperature);
        let mut text = String::new();
        for (i, &cell) in cells.iter().enumerate() {
            let row = &scores[i * p..(i + 1) * p];
            let best = top(row, request.top);
            let label = if row[best[0]] < request.unknown_below { UNKNOWN } else { &names[best[0]] };
            *counts.entry(label.to_string()).or_insert(0usize) += 1;
            let at = i * p + best[0];
            let cosine = cosine.as_ref().map_or("".to_string(), |c| format!("{:.5}", c[at]));
            let _ = write!(
                text,
                "{}\t{}\t{:.5}\t{cosine}\t{:.5}",
                field(corpus.cell_id(cell as usize)?),
                field(label),
                row[best[0]],
                marker[at]
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
        let prototypes = Rows::new(&types.vectors, width)?;
        embedder.each(&all, |cells, rows| {
            block(cells, Some(cosines(Rows::new(rows, width)?, prototypes, &types.centre)?))
        })?;
    }
    file.publish()?;
    let empty = types.sets.sets.iter().zip(names).filter(|(s, _)| s.is_empty());
    Ok(Annotation {
        cells: all.len(),
        without_markers: empty.map(|(_, n)| n.clone()).collect(),
        types: names.clone(),
        counts,
        prototypes: types.origin,
        reference: reference_name,
        temperature,
    })
}

/// A field of a TSV: tabs and line breaks, which ids may hold, would break the table.
fn field(text: &str) -> String {
    text.replace(['\t', '\n', '\r'], " ")
}

/// Reference cells and what they are.
fn reference(request: &Request) -> Result<(Vec<u32>, String)> {
    let corpus = &request.corpus;
    match recorded(&request.checkpoint)? {
        Some((place, record)) if record.corpus_digest == corpus.digest() => {
            let split = Split::restore(corpus, &record)?;
            Ok((split.train, format!("training cells of the split in {}", place.display())))
        }
        _ => Ok(((0..corpus.cells() as u32).collect(), "all cells".into())),
    }
}

/// The types with their marker sets, and their prototypes where the evidence needs them.
fn types<B: Backend<A>, A: Act>(
    request: &Request,
    embedder: &mut Embedder<B, A>,
    reference: &[u32],
    progress: &impl Fn(u64),
) -> Result<Types> {
    let width = embedder.width();
    let (raw, map) = request.markers.load(&request.corpus)?;
    let stored = StoredPrototypes::read(embedder.folder(), width)?.filter(|s| {
        request.prototypes.is_none() && s.layer == embedder.layer() && s.pooling == embedder.pooling()
    });
    if let Some(s) = stored {
        // The file may speak of other types than the checkpoint was refined towards: then they are new ones.
        if let Ok(sets) = raw.for_labels(&s.names, map.as_deref(), true) {
            let origin = Some("checkpoint");
            return Ok(Types {
                sets,
                vectors: s.vectors,
                centre: s.centre,
                origin,
                temperature: s.temperature,
            });
        }
    }
    let sets = raw.all()?;
    let temperature = TEMPERATURE;
    if request.evidence == Evidence::Markers {
        return Ok(Types { sets, vectors: Vec::new(), centre: Vec::new(), origin: None, temperature });
    }
    let mode = request.prototypes.unwrap_or(PrototypeMode::Cells);
    if mode == PrototypeMode::Labels {
        return Err(
            Error::usage("annotation has no labels to make prototypes from").next("--prototypes cells")
        );
    }
    let rows = embedder.collect(reference, progress)?;
    let scores = marker_scores(&request.corpus, reference, &sets)?;
    let unknown = vec![-1; reference.len()];
    let (vectors, centre) =
        build_prototypes(embedder, mode, Rows::new(&rows, width)?, &sets, Some(scores), &unknown)?;
    Ok(Types { sets, vectors, centre, origin: Some(origin(mode)), temperature })
}
