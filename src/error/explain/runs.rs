//! Runs, scores and reports.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::RunFolder,
        "this is no run folder",
        "A run folder has `settings.toml` and `metrics.jsonl`; the path has neither, or the run has not logged a step yet.",
        &["Name the `--out` of a training command."],
    ),
    code(
        Code::ChartData,
        "a file for a chart holds something else",
        "Charts are drawn from the JSON of `bench`, the file of `--trace` and the tables of `perturb`; this is none, or cut off.",
        &["Make it again with the command that the message names."],
    ),
    code(
        Code::BenchReport,
        "the earlier report holds none of these cases",
        "`--compare` sets the cases of two reports side by side, and they have none in common.",
        &["Compare with a report of the same command and flags."],
    ),
    code(
        Code::BenchLengths,
        "the file of lengths cannot be used",
        "It is a list of whole numbers from 1 to 65,536, one a line.",
        &["Write one length a line, as `awk` would, and nothing else."],
    ),
    code(
        Code::NoLabelledCells,
        "no cells with labels to score or learn from",
        "The chosen cells have no value in the label column, no gene to mask, or no type with a prototype.",
        &["Check `--label`, `--split`, and that labels and marker sets share names."],
    ),
    code(
        Code::TooFewCells,
        "too few cells for this measure",
        "k-means needs as many cells as clusters, kNN and a probe at least one training cell.",
        &["Score more cells, or ask for fewer clusters."],
    ),
    code(
        Code::EmbeddingNotFinite,
        "an embedding holds a value that is not finite",
        "NaN or infinity in a cell vector would spoil every score that touches it.",
        &[
            "Look where the checkpoint came from: its weights are not finite, or overflow bf16 (`--set train.precision=f32`).",
        ],
    ),
    code(
        Code::CellsUnmatched,
        "cells of the file and of the corpus do not match",
        "Rows are matched by cell id; names occur twice, or none is in both.",
        &["Use the file that the corpus was packed from; make `obs_names` unique before packing."],
    ),
    code(
        Code::H5adNotExtended,
        "this .h5ad cannot be added to",
        "The copy with embeddings keeps the file byte by byte and adds to it, which needs the form that anndata writes today.",
        &["`anndata.read_h5ad('OLD').write_h5ad('NEW')`, and use the new one."],
    ),
    code(
        Code::NoPrototypeSource,
        "a type has nothing to make its prototype from",
        "It has no known marker gene and no training cell.",
        &["Give the type a marker set, or leave its label out with `--exclude-label`."],
    ),
    code(
        Code::EmulatorLibrary,
        "the emulator's library cannot be loaded",
        "`CELLREFINE_EMULATOR_LIBRARY` names a library that is missing or lacks the kernels.",
        &["Unset the variable: the kernels that were built in are used."],
    ),
];
