//! Unique names of cells over all inputs.
//!
//! Cell names are those of `obs`. If a name occurs in several inputs, all names get the input's file name in front
//! (`pbmc8k:AAACCTG-1`); a name that comes again within one input gets `-1`, `-2`, … behind, as anndata's
//! `obs_names_make_unique` does. Both are said in the report.

use super::frame::Frame;
use crate::error::Result;
use rayon::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

/// Distinct name hashes of one input, and those that come more than once; both sorted.
pub(super) fn name_hashes(obs: &Frame) -> Result<(Vec<u64>, Vec<u64>)> {
    let mut all = Vec::new();
    for (start, rows) in obs.windows() {
        all.extend(obs.read_texts(obs.index(), start, rows)?.iter().map(|name| name_hash(name)));
    }
    all.par_sort_unstable();
    let mut repeated: Vec<u64> = all.windows(2).filter(|w| w[0] == w[1]).map(|w| w[0]).collect();
    repeated.dedup();
    all.dedup();
    Ok((all, repeated))
}

fn name_hash(name: &str) -> u64 {
    // SipHash with fixed keys: the same in every run.
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// Gives cells their final names.
pub(super) struct Names {
    /// Hashes of names that come more than once within an input, per input; sorted.
    repeated: Vec<Vec<u64>>,
    /// What stands in front, per input; absent where names do not meet.
    prefixes: Option<Vec<String>>,
    input: usize,
    /// How often a repeated name of this input has come.
    times: HashMap<String, u64>,
    renamed: u64,
}

impl Names {
    pub fn new(repeated: Vec<Vec<u64>>, prefixes: Option<Vec<String>>) -> Self {
        Names { repeated, prefixes, input: 0, times: HashMap::new(), renamed: 0 }
    }

    /// The next names are of input `n`.
    pub fn enter(&mut self, n: usize) {
        self.input = n;
        self.times.clear();
    }

    /// The next cell is not taken here, but its name counts for those that come again.
    pub fn pass_over(&mut self, name: &str) {
        let renamed = self.renamed;
        self.unique(name);
        self.renamed = renamed;
    }

    /// Names that got a number.
    pub fn renamed(&self) -> u64 {
        self.renamed
    }

    /// The name of the next cell.
    pub fn unique(&mut self, name: &str) -> String {
        let mut unique = name.to_string();
        if self.repeated[self.input].binary_search(&name_hash(name)).is_ok() {
            let times = self.times.entry(unique.clone()).or_insert(0);
            if *times > 0 {
                unique = format!("{name}-{times}");
                self.renamed += 1;
            }
            *times += 1;
        }
        match &self.prefixes {
            Some(prefixes) => format!("{}:{unique}", prefixes[self.input]),
            None => unique,
        }
    }
}
