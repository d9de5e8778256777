//! What `eval` found: as one JSON object for programs, as a table for people.

use super::frozen::Frozen;
use super::metrics::{Classification, RecallAt, ShareThresholds, group_f1};
use super::mixing::Mixing;
use super::zero_shot::Evidence;
use crate::corpus::splits::SplitRecord;
use crate::genes::markers::MarkerSets;
use serde_json::{Value, json};
use std::path::PathBuf;

/// The answer.
pub struct Evaluation {
    /// Class names; after the label column's own, types of prototypes that are no label.
    pub classes: Vec<String>,
    /// Which method `own` is.
    pub predictor: &'static str,
    /// The checkpoint's own answer.
    pub own: Classification,
    /// Name and score of every method that applies.
    pub methods: Vec<(&'static str, Classification)>,
    /// Probe, kNN, clustering.
    pub frozen: Frozen,
    /// Evidence of `recall` (and of the `prototype` predictor).
    pub evidence: Option<Evidence>,
    /// recall@k by evidence.
    pub recall: Vec<(Evidence, RecallAt)>,
    /// Where prototypes came from.
    pub prototypes: Option<&'static str>,
    /// Batch mixing.
    pub mixing: Option<Mixing>,
    /// Cells of each class in training, hidden labels included.
    pub train_counts: Vec<usize>,
    /// Thresholds of head and tail.
    pub thresholds: ShareThresholds,
    /// Where the split came from, for people.
    pub split_origin: String,
    /// The cells that were scored.
    pub part: super::request::Part,
    /// The split.
    pub split: SplitRecord,
    /// Labelled training cells used.
    pub train_cells: usize,
    /// Cells scored.
    pub test_cells: usize,
    /// The model folder.
    pub checkpoint: PathBuf,
    /// Layer of the rows.
    pub layer: i32,
    /// Types without a prototype or marker set.
    pub notes: Vec<String>,
    /// What the scores were made from.
    pub scored: Scored,
}

/// What the scores were made from, cell by cell: for intervals and pictures.
pub struct Scored {
    /// Corpus indices, (C).
    pub cells: Vec<u32>,
    /// True classes, (C).
    pub truth: Vec<usize>,
    /// Class that each method calls each cell, (C) each.
    pub called: Vec<(&'static str, Vec<usize>)>,
    /// Embeddings, (C, D).
    pub rows: Vec<f32>,
    /// D.
    pub width: usize,
    /// Names of the types of prototypes and marker sets, (P).
    pub types: Vec<String>,
    /// Prototypes (P, D) and their centre (D).
    pub prototypes: Option<(Vec<f32>, Vec<f32>)>,
    /// Marker sets, (P).
    pub sets: Option<MarkerSets>,
}

impl Evaluation {
    /// Scores of one method, with head, medium and tail.
    fn scores(&self, c: &Classification) -> Value {
        let g = group_f1(c, &self.train_counts, self.thresholds);
        json!({"accuracy": c.accuracy, "macro_f1": c.macro_f1, "head_f1": g.head, "medium_f1": g.medium, "tail_f1": g.tail})
    }

    /// The object of `eval --json`.
    pub fn to_json(&self) -> Value {
        let groups = group_f1(&self.own, &self.train_counts, self.thresholds);
        let per_class: serde_json::Map<String, Value> = (self.own.per_class.iter())
            .map(|c| {
                let scores = json!({"f1": c.f1, "precision": c.precision, "recall": c.recall, "support": c.support,
                    "train_cells": self.train_counts.get(c.class).copied().unwrap_or(0)});
                (self.classes[c.class].clone(), scores)
            })
            .collect();
        let by_k = |k: &[usize], v: &[f64]| -> Value {
            k.iter().zip(v).map(|(k, v)| (k.to_string(), json!(v))).collect::<serde_json::Map<_, _>>().into()
        };
        let chosen =
            self.evidence.and_then(|e| self.recall.iter().find(|(have, _)| *have == e)).map(|(_, r)| r);
        let zero_shot: serde_json::Map<String, Value> = (self.recall.iter())
            .map(|(e, r)| {
                let scores = json!({"recall_at": by_k(&r.k, &r.micro), "macro_recall_at": by_k(&r.k, &r.macro_), "cells": r.cells});
                (e.name().to_string(), scores)
            })
            .collect();
        let methods: serde_json::Map<String, Value> =
            self.methods.iter().map(|(name, c)| (name.to_string(), self.scores(c))).collect();
        let f = &self.frozen;
        json!({
            "checkpoint": self.checkpoint,
            "cells": self.test_cells,
            "scored": self.part,
            "split": {"source": self.split_origin, "spec": self.split.spec, "train": self.split.cells[0],
                "val": self.split.cells[1], "test": self.split.cells[2], "labelled_train": self.train_cells},
            "metrics": {
                "predictor": self.predictor,
                "accuracy": self.own.accuracy,
                "macro_f1": self.own.macro_f1,
                "per_class": per_class,
                "head_f1": groups.head,
                "medium_f1": groups.medium,
                "tail_f1": groups.tail,
                "thresholds": self.thresholds,
                "linear_probe_macro_f1": f.linear_probe.macro_f1,
                "linear_probe_accuracy": f.linear_probe.accuracy,
                "knn_macro_f1": f.knn.macro_f1,
                "knn_accuracy": f.knn.accuracy,
                "evidence": self.evidence,
                "prototypes": self.prototypes,
                "recall_at": chosen.map(|r| by_k(&r.k, &r.micro)),
                "macro_recall_at": chosen.map(|r| by_k(&r.k, &r.macro_)),
                "ari": f.ari,
                "nmi": f.nmi,
                "silhouette": f.silhouette,
                "nc1": f.nc1,
                "methods": methods,
                "zero_shot": zero_shot,
                "batch_mixing": self.mixing,
            },
            "layer": self.layer,
            "notes": self.notes,
        })
    }

    /// The table for people.
    pub fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let number = |x: Option<f64>| x.map_or("–".to_string(), |x| format!("{x:.3}"));
        let _ = writeln!(out, "{}", self.checkpoint.display());
        let _ = writeln!(out, "split   {}", self.split_origin);
        let [train, val, test] = self.split.cells;
        let _ = writeln!(
            out,
            "cells   {train} train ({} labelled), {val} validation, {test} test; scored: {} labelled {} cells\n",
            self.train_cells,
            self.test_cells,
            match self.part {
                super::request::Part::Test => "test",
                super::request::Part::Val => "validation",
            }
        );
        let _ = writeln!(
            out,
            "{:<22}{:>9}{:>10}{:>8}{:>8}{:>8}",
            "", "accuracy", "macro-F1", "head", "medium", "tail"
        );
        for (name, c) in &self.methods {
            let g = group_f1(c, &self.train_counts, self.thresholds);
            let mark = if name == &self.predictor { " *" } else { "" };
            let _ = writeln!(
                out,
                "{:<22}{:>9.3}{:>10.3}{:>8}{:>8}{:>8}",
                format!("{}{mark}", name.replace('_', " ")),
                c.accuracy,
                c.macro_f1,
                number(g.head),
                number(g.medium),
                number(g.tail)
            );
        }
        let _ = writeln!(
            out,
            "* the checkpoint's own answer; head: ≥ {} of training cells, tail: < {}\n",
            self.thresholds.head, self.thresholds.tail
        );
        for (e, r) in &self.recall {
            let at: Vec<String> =
                (0..r.k.len()).map(|i| format!("@{} {:.3}/{:.3}", r.k[i], r.micro[i], r.macro_[i])).collect();
            let _ = writeln!(out, "recall by {:<12} {}   (cells/classes)", e.name(), at.join("  "));
        }
        if let Some(origin) = self.prototypes {
            let _ = writeln!(out, "prototypes from      {origin}");
        }
        let f = &self.frozen;
        let _ = writeln!(
            out,
            "silhouette {}  ARI {}  NMI {}  NC1 {}",
            number(f.silhouette),
            number(f.ari),
            number(f.nmi),
            number(f.nc1)
        );
        if let Some(m) = &self.mixing {
            let _ = writeln!(
                out,
                "mixing of {} batches: batch-ASW {}  iLISI {}",
                m.batches,
                number(m.batch_asw),
                number(m.ilisi)
            );
        }
        let _ = writeln!(
            out,
            "\n{:<34}{:>8}{:>11}{:>8}{:>8}{:>8}",
            format!("by {}", self.predictor.replace('_', " ")),
            "F1",
            "precision",
            "recall",
            "test",
            "train"
        );
        for c in &self.own.per_class {
            let train = self.train_counts.get(c.class).copied().unwrap_or(0);
            let _ = writeln!(
                out,
                "{:<34}{:>8.3}{:>11.3}{:>8.3}{:>8}{:>8}",
                self.classes[c.class], c.f1, c.precision, c.recall, c.support, train
            );
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}
