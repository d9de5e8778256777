//! A shard that shrinks between opening and reading, read by a child in one of four ways: the child ends with exit code 3 and the
//! name of the file, never by a bare signal, and never with cells. Where the cut leaves the page of what is read in place, the
//! kernel shows zeros, which the block's checksum must find.

use super::{batches, kinds};
use cellrefine::corpus::{Batch, BatchOptions, Corpus, Packer};
use cellrefine::error::Result;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const ORDER: &str = "CELLREFINE_SHRINK";
const WAYS: [&str; 4] = ["cells", "batches", "verify", "labels"];
/// The name of the test that a child runs.
const CHILD: &str = "shrink::child";

/// Cuts at `lengths` places, read in every way: how many were tried, and which were lost.
pub fn try_all(lengths: usize) -> (usize, Vec<String>) {
    let folder = batches::scratch();
    let kind = kinds::named("corpus_blocks");
    (kind.make)(folder.path());
    let whole = std::fs::read(folder.path().join(kind.damaged[0])).unwrap();
    let (mut tried, mut lost) = (0, Vec::new());
    for n in 0..lengths {
        // From nothing at all to all but the last byte.
        let len = if n + 1 == lengths { whole.len() - 1 } else { whole.len() * n / lengths };
        for way in WAYS {
            std::fs::write(folder.path().join(kind.damaged[0]), &whole).unwrap();
            let output = Command::new(std::env::current_exe().unwrap())
                .args([CHILD, "--exact", "--nocapture"])
                .env(ORDER, format!("{way} {len} {}", folder.path().display()))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let named = said.contains("shard-00000.safetensors") && said.contains("error[CR");
            tried += 1;
            // The labels lie before most cuts, and all but the last byte leaves what some ways read untouched.
            let untouched =
                output.status.code() == Some(9) && (way == "labels" || n + 1 == lengths && way != "verify");
            if !(output.status.code() == Some(3) && named || untouched) {
                lost.push(format!("{way} of {len} bytes: {}: {}", output.status, said.replace('\n', " ")));
            }
        }
    }
    (tried, lost)
}

/// The child's part; returns at once where there is no order.
#[test]
fn child() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let words: Vec<&str> = order.splitn(3, ' ').collect();
    let folder = Path::new(words[2]);
    let corpus = Corpus::open(&folder.join("x.cells")).unwrap();
    let shard = folder.join(kinds::named("corpus_blocks").damaged[0]);
    std::fs::OpenOptions::new().write(true).open(shard).unwrap().set_len(words[1].parse().unwrap()).unwrap();
    match read(words[0], corpus) {
        Ok(()) => std::process::exit(9),
        Err(e) => {
            eprintln!("error[{}]: {e}", e.code());
            std::process::exit(e.kind().exit_code().into());
        }
    }
}

fn read(way: &str, corpus: Corpus) -> Result<()> {
    match way {
        "cells" => (0..corpus.cells()).try_for_each(|cell| corpus.genes(cell).map(|_| ())),
        "verify" => corpus.verify(),
        "labels" => corpus.categorical("cell_type").and_then(|_| corpus.numeric("score")).map(|_| ()),
        _ => {
            let cells: Vec<u32> = (0..corpus.cells() as u32).collect();
            let options = BatchOptions {
                cells: 16,
                tokens: 1 << 16,
                max_tokens: 2048,
                cls: Some(1),
                eos: None,
                values: false,
            };
            let (mut packer, mut batch) =
                (Packer::in_order(Arc::new(corpus), cells, options)?, Batch::default());
            while packer.fill(&mut batch)? {}
            Ok(())
        }
    }
}
