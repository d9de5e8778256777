//! One corpus over the shards of several, packed apart.
//!
//! A shard knows its own category names, so merging rewrites nothing: the files are linked (or copied, across file systems) into
//! the new folder, and one manifest with the union of the categories is written over them.

use super::format::*;
use super::partial_folder::PartialFolder;
use super::reader::Corpus;
use crate::error::{Code, Error, Result};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Merges `inputs`, in order, into a new corpus at `out`; `progress` is called per shard.
///
/// # Errors
/// Input: an input that does not open, another vocabulary, values here and none there, other obs columns, one shard twice.
pub fn merge(inputs: &[PathBuf], out: &Path, progress: &dyn Fn(u64)) -> Result<Manifest> {
    let corpora = inputs.iter().map(|p| Corpus::open(p)).collect::<Result<Vec<_>>>()?;
    let Some(first) = corpora.first() else {
        return Err(Error::new(Code::NoInputs, "there is nothing to merge").wanted("at least one corpus"));
    };
    corpora.iter().try_for_each(|c| fits(first, c))?;
    let model = first.manifest();
    let columns = model
        .columns
        .iter()
        .map(|column| {
            let parts = corpora.iter().flat_map(|c| &c.manifest().columns).filter(|c| c.name == column.name);
            let union: BTreeSet<String> = parts.flat_map(|c| c.categories.iter().cloned()).collect();
            Column { categories: union.into_iter().collect(), ..column.clone() }
        })
        .collect();
    let folder = PartialFolder::create(out)?;
    if model.vocab_sha256.is_some() {
        folder.write_file(VOCAB, &first.vocab_file()?)?;
    }
    let mut shards = Vec::new();
    let mut from: HashMap<&str, PathBuf> = HashMap::new();
    for corpus in &corpora {
        for entry in &corpus.manifest().shards {
            let source = corpus.path().join(&entry.file);
            if let Some(other) = from.insert(&entry.sha256, source.clone()) {
                return Err(Error::new(Code::MergeTwice, "the same cells would be in the corpus twice")
                    .at(source.display())
                    .found(format!("equal to {}", other.display()))
                    .next("name each corpus once"));
            }
            let file = shard_name(shards.len());
            let target = folder.path.join(&file);
            link(&source, &target).map_err(|e| folder.failed("link a shard into the merged corpus", &e))?;
            shards.push(ShardEntry { file, ..entry.clone() });
            progress(1);
        }
    }
    let parts: Vec<_> = corpora
        .iter()
        .map(|c| json!({"digest": c.digest(), "cells": c.cells(), "provenance": c.manifest().provenance}))
        .collect();
    let manifest = Manifest::seal(
        model.vocabulary.clone(),
        model.vocab_sha256.clone(),
        model.values,
        columns,
        shards,
        json!({"merged": parts}),
    );
    manifest.check_size(out)?;
    folder.write_file(MANIFEST, &manifest.to_bytes())?;
    folder.publish()?;
    Ok(manifest)
}

/// May the cells of `other` stand behind those of `first`?
fn fits(first: &Corpus, other: &Corpus) -> Result<()> {
    let (a, b) = (first.manifest(), other.manifest());
    let refuse = |what: &str, found: String, wanted: String| {
        Err(Error::new(Code::MergeMismatch, what)
            .at(other.path().display())
            .found(found)
            .wanted(format!("{wanted}, as in {}", first.path().display()))
            .next("pack the inputs with one vocabulary and the same options"))
    };
    if a.vocabulary != b.vocabulary {
        let name = |v: &VocabIdentity| format!("{} ids, digest {}", v.len, v.digest);
        return refuse("the corpora have different vocabularies", name(&b.vocabulary), name(&a.vocabulary));
    }
    if a.values != b.values {
        let name = |v| if v { "values" } else { "no values" }.to_string();
        return refuse("only some of the corpora store values", name(b.values), name(a.values));
    }
    let list = |m: &Manifest| {
        let mut columns: Vec<String> =
            m.columns.iter().map(|c| format!("{} ({:?})", c.name, c.kind)).collect();
        columns.sort();
        columns.join(", ").to_lowercase()
    };
    if list(a) != list(b) {
        return refuse("the corpora have different obs columns", list(b), list(a));
    }
    Ok(())
}

fn link(source: &Path, target: &Path) -> std::io::Result<()> {
    if fs::hard_link(source, target).is_err() {
        fs::copy(source, target)?;
        File::open(target)?.sync_all()?;
    }
    Ok(())
}
