//! `bench cpu --h5ad FILE`: a file of cells to a corpus, as `pack` does it, with a vocabulary made from the file itself.

use super::{Effort, round4, time};
use crate::cli::Progress;
use crate::error::{Error, Result};
use crate::import::medians::{BuildOptions, build};
use crate::import::pack::{PackOptions, pack};
use serde_json::{Value, json};
use std::path::Path;

/// Times the packing of `file`; the vocabulary is made before the clock starts.
pub fn run(file: &Path, effort: Effort) -> Result<Value> {
    let inputs = [file.to_path_buf()];
    let vocab = build(&inputs, &BuildOptions::default())?.vocab;
    let out = std::env::temp_dir().join(format!("cellrefine-bench-{}.cells", std::process::id()));
    let remove = || match std::fs::remove_dir_all(&out) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&out, "remove", &e)),
        _ => Ok(()),
    };
    let mut packed = (0, 0);
    let timing = time(effort, || {
        remove()?;
        let report = pack(&inputs, &vocab, &out, &PackOptions::default(), &Progress::silent())?;
        packed = (report.manifest.cells, report.manifest.tokens);
        Ok(())
    });
    remove()?;
    let timing = timing?;
    let (cells, tokens) = packed;
    Ok(json!({
        "bench": "pack",
        "file": file.file_name().map(|n| n.to_string_lossy().into_owned()),
        "cells": cells,
        "tokens": tokens,
        "threads": rayon::current_num_threads(),
        "ms_median": round4(timing.median_ms()),
        "ms_min": round4(timing.min_ms()),
        "runs": timing.ms.len(),
        "cells_per_s": round4(cells as f64 / timing.median_ms() * 1e3),
        "other_load": round4(timing.other_load),
    }))
}
