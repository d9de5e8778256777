//! One corpus over the shards of several, packed apart.
//!
//! A shard knows its own category names, so merging rewrites nothing: the files are linked (or copied, across file systems) into
//! the new folder, and one manifest with the union of the categories is written over them.

use super::format::*;
use super::part::PartRecord;
use super::partial_folder::PartialFolder;
use super::reader::Corpus;
use crate::disk;
use crate::error::{Code, Error, Result};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Merges `inputs`, in order, into a new corpus at `out`; `progress` is called per shard.
///
/// # Errors
/// Input: an input that does not open, another vocabulary, values here and none there, other obs columns, one shard twice.
pub fn merge(inputs: &[PathBuf], out: &Path, progress: &dyn Fn(u64)) -> Result<Manifest> {
    let mut corpora = inputs.iter().map(|p| Corpus::open(p)).collect::<Result<Vec<_>>>()?;
    order_parts(&mut corpora)?;
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
            disk::link(&source, &target)
                .map_err(|e| folder.failed("link a shard into the merged corpus", &e))?;
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

/// Puts the parts of `pack --shard` in their order, whatever the order of the names; refuses some of them, or two of one.
fn order_parts(corpora: &mut [Corpus]) -> Result<()> {
    let record = |c: &Corpus| c.manifest().provenance.get("part").cloned();
    let records = corpora
        .iter()
        .filter_map(|c| Some((c.path().to_path_buf(), record(c)?)))
        .map(|(path, value)| match serde_json::from_value::<PartRecord>(value) {
            Ok(record) => Ok((path, record)),
            Err(e) => Err(Error::new(Code::ManifestDamaged, "the record of a part cannot be read")
                .at(path.join(MANIFEST).display())
                .found(e)),
        })
        .collect::<Result<Vec<_>>>()?;
    let Some((first, wanted)) = records.first() else { return Ok(()) };
    let refuse = |what: &str| Err(Error::new(Code::PartsIncomplete, what));
    if records.len() < corpora.len() {
        let whole = corpora.iter().find(|c| record(c).is_none()).map(|c| c.path().display().to_string());
        return refuse("parts are merged among themselves").map_err(|e| {
            e.at(whole.unwrap_or_default()).found("a whole corpus").next("merge the parts first")
        });
    }
    if let Some((path, other)) =
        records.iter().find(|(_, r)| r.job != wanted.job || r.part.of != wanted.part.of)
    {
        return refuse("these are parts of different corpora").map_err(|e| {
            e.at(path.display())
                .found(format!("part {} of {}, job {:.12}", other.part.index, other.part.of, other.job))
                .wanted(format!(
                    "a part of {}, job {:.12}, as {}",
                    wanted.part.of,
                    wanted.job,
                    first.display()
                ))
                .next("pack all parts with the same inputs, vocabulary and options")
        });
    }
    let mut of_index: BTreeMap<u64, &Path> = BTreeMap::new();
    for (path, r) in &records {
        if let Some(twice) = of_index.insert(r.part.index, path) {
            return refuse("a part is named twice").map_err(|e| {
                e.at(path.display())
                    .found(format!("part {}, as {}", r.part.index, twice.display()))
                    .next("name each part once")
            });
        }
    }
    let absent: Vec<String> = (0..wanted.part.of)
        .filter(|i| !of_index.contains_key(i))
        .take(20)
        .map(|i| format!("{i}/{}", wanted.part.of))
        .collect();
    if !absent.is_empty() {
        return refuse("parts are missing").map_err(|e| {
            e.found(format!("{} of {}", records.len(), wanted.part.of))
                .wanted(absent.join(", "))
                .next(format!("cellrefine pack … --shard {}, with the flags of the others", absent[0]))
        });
    }
    let index_of: HashMap<PathBuf, u64> =
        records.iter().map(|(path, r)| (path.clone(), r.part.index)).collect();
    corpora.sort_by_key(|c| index_of.get(c.path()).copied());
    one_input_once(corpora)
}

/// Each part digested the inputs that it read; one file under two names shows here.
fn one_input_once(parts: &[Corpus]) -> Result<()> {
    let mut at: HashMap<String, usize> = HashMap::new();
    for part in parts {
        let sources = part.manifest().provenance.get("sources").and_then(|s| s.as_array());
        for (n, source) in sources.into_iter().flatten().enumerate() {
            let Some(sha256) = source.get("sha256").and_then(|s| s.as_str()) else { continue };
            if *at.entry(sha256.into()).or_insert(n) != n {
                return Err(Error::new(Code::MergeTwice, "two inputs of the parts have the same bytes")
                    .at(part.path().display())
                    .found(format!("input {} is input {} under another name", n + 1, at[sha256] + 1))
                    .next("leave one of them out, and pack the parts again"));
            }
        }
    }
    Ok(())
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
