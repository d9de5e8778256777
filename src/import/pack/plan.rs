//! What is packed: inputs that agree, and the cells and columns of each.

use super::{FileReport, PackOptions, map, open};
use crate::corpus::part::within;
use crate::corpus::writer::ObsSpec;
use crate::digest::sha256;
use crate::error::{Code, Error, Result};
use crate::genes::vocab::Vocab;
use crate::import::names::name_hashes;
use crate::import::obs_choice::ObsChoice;
use crate::import::source::{Source, digest, stem};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What all inputs agree on.
pub(super) struct Plan {
    pub(super) files: Vec<FileReport>,
    pub(super) obs: Vec<ObsSpec>,
    /// Hashes of names that come more than once within an input, per input; sorted.
    pub(super) repeated: Vec<Vec<u64>>,
    /// What stands in front of names, per input, if anything does.
    pub(super) prefixes: Vec<String>,
    pub(super) prefixed: bool,
    pub(super) notes: Vec<String>,
    /// Rows to take, per input.
    pub(super) wanted: Vec<Range<u64>>,
}

impl Plan {
    pub(super) fn new(inputs: &[PathBuf], vocab: &Vocab, options: &PackOptions<'_>) -> Result<Plan> {
        if inputs.is_empty() {
            return Err(Error::new(Code::NoInputs, "no input files"));
        }
        let counts: Vec<u64> =
            inputs.iter().map(|p| open(p, options).map(|s| s.cells())).collect::<Result<_>>()?;
        let all = 0..counts.iter().sum::<u64>();
        let rows = match options.part {
            Some(part) => part.rows(all.end, options.shard_cells() as u64)?,
            None => all,
        };
        let mut first = 0;
        let wanted: Vec<Range<u64>> = counts
            .iter()
            .map(|&n| {
                let own = within(&rows, first, n);
                first += n;
                own
            })
            .collect();
        // An input that no cell is taken from is another part's to read.
        let digests: Vec<Result<Option<String>>> = inputs
            .par_iter()
            .zip(&wanted)
            .map(|(p, w)| if w.is_empty() && options.part.is_some() { Ok(None) } else { digest(p).map(Some) })
            .collect();
        let mut plan = Plan {
            wanted,
            files: Vec::new(),
            obs: Vec::new(),
            repeated: Vec::new(),
            prefixes: Vec::new(),
            prefixed: false,
            notes: Vec::new(),
        };
        let mut seen: HashMap<String, &PathBuf> = HashMap::new();
        let mut names: Vec<u64> = Vec::new();
        let mut columns = ObsChoice::default();
        for (path, digest) in inputs.iter().zip(digests) {
            let source = open(path, options)?;
            let digest = digest?;
            if let Some(digest) = &digest
                && let Some(first) = seen.insert(digest.clone(), path)
            {
                return Err(Error::new(Code::InputTwice, "an input is given twice")
                    .at(path.display())
                    .found(format!("the same bytes as {}", first.display()))
                    .next("leave one out: the same cells in two splits would spoil every score"));
            }
            let genes = match &source {
                Source::Counts(source) => Some(map(source.as_ref(), vocab, options)?.report),
                Source::Tokens(source) => {
                    if options.values {
                        return Err(Error::new(
                            Code::FlagConflict,
                            "--values needs counts, and a tokenised data set has none",
                        )
                        .at(path.display())
                        .next("leave --values out, or pack the file that the data set was made from"));
                    }
                    source.check_vocabulary(vocab)?;
                    None
                }
            };
            plan.files.push(FileReport {
                file: path.display().to_string(),
                sha256: digest,
                counts: source.describe(),
                cells: source.cells(),
                empty: 0,
                dropped: 0,
                genes,
            });
            columns.add(source.obs(), &options.obs)?;
            for (column, _) in &options.drop {
                source.obs().column(column)?;
            }
            let (own, repeated) = name_hashes(source.obs())?;
            names.extend(own);
            plan.repeated.push(repeated);
        }
        (plan.obs, plan.notes) = columns.finish();
        names.par_sort_unstable();
        plan.prefixed = names.windows(2).any(|w| w[0] == w[1]);
        let stems: Vec<String> = inputs.iter().map(|p| stem(p)).collect();
        plan.prefixes = (0..stems.len())
            .map(|n| {
                let shared = stems.iter().filter(|s| **s == stems[n]).count() > 1;
                if shared { format!("{}.{}", stems[n], n + 1) } else { stems[n].clone() }
            })
            .collect();
        Ok(plan)
    }

    /// What all parts of one corpus have in common, digested.
    pub(super) fn job(
        &self,
        vocab: &Vocab,
        options: &PackOptions<'_>,
        written: &serde_json::Value,
    ) -> Result<String> {
        let file = |f: &FileReport| {
            let path = Path::new(&f.file);
            let bytes =
                std::fs::metadata(path).map(|m| m.len()).map_err(|e| Error::io(path, "read the size", &e))?;
            Ok(serde_json::json!([
                path.file_name().map(|n| n.to_string_lossy()),
                bytes,
                f.cells,
                f.counts,
                f.genes
            ]))
        };
        let files = self.files.iter().map(file).collect::<Result<Vec<_>>>()?;
        let obs: Vec<_> = self.obs.iter().map(|o| serde_json::json!([o.name, o.kind])).collect();
        let job =
            serde_json::json!([vocab.digest(), files, obs, written, options.shard_cells(), self.prefixed]);
        Ok(sha256(job.to_string()))
    }
}
