//! What deleting or overexpressing genes does: the strongest of a `perturb` table, gene by prototype.

use super::matrix::{Shade, matrix};
use crate::error::{Code, Error, Result};
use crate::report::html::{escape, folded_table, number};
use crate::whole_file;
use std::collections::HashMap;
use std::path::Path;

/// A table of all genes by a hundred prototypes has half of it.
const MAX_BYTES: u64 = 256 << 20;
/// Genes drawn, and rows of the table below.
const DRAWN: usize = 25;
const TABLED: usize = 100;

/// One set of genes.
struct Effect {
    name: String,
    cells: u64,
    similarity: f64,
    /// (P), as the prototypes stand in the file.
    shift: Vec<f64>,
}

impl Effect {
    fn strongest(&self) -> f64 {
        self.shift.iter().fold(0.0, |most, s| most.max(s.abs()))
    }
}

/// The section for the table at `path`.
///
/// # Errors
/// Input, with the line: not a table that `perturb` wrote with prototypes.
pub fn html(path: &Path) -> Result<String> {
    let text = whole_file::read_text(path, "read the table", MAX_BYTES)?;
    let (prototypes, mut effects) = read(&text).map_err(|e| e.at(path.display()))?;
    effects.retain(|e| e.cells > 0);
    effects.sort_by(|a, b| b.strongest().total_cmp(&a.strongest()).then(a.name.cmp(&b.name)));
    let most = effects.first().map_or(1.0, Effect::strongest).max(f64::MIN_POSITIVE);
    let drawn = &effects[..effects.len().min(DRAWN)];
    let names: Vec<String> = drawn.iter().map(|e| e.name.clone()).collect();
    let shift = |e: &Effect, k: usize| number(Some(e.shift[k]), 4);
    let chart = matrix(
        (&names, &prototypes),
        |r, c| drawn[r].shift[c] / most,
        |r, c| {
            let e = &drawn[r];
            format!("{} · {}: shift {} over {} cells", e.name, prototypes[c], shift(e, c), e.cells)
        },
        Shade::Relative,
        ("gene", "prototype"),
        "Shift of the cosine to each prototype, by perturbed gene",
    );
    let mut head = vec!["gene".to_string(), "cells".into(), "similarity".into()];
    head.extend(prototypes.iter().map(|p| escape(p)));
    let rows: Vec<Vec<String>> = effects
        .iter()
        .take(TABLED)
        .map(|e| {
            let mut row = vec![escape(&e.name), e.cells.to_string(), number(Some(e.similarity), 4)];
            row.extend((0..prototypes.len()).map(|k| shift(e, k)));
            row
        })
        .collect();
    Ok(format!(
        "<p class=\"note\">Mean change of a cell's cosine to each prototype when the gene is perturbed, over the cells that it changes; the {} of {} \
         genes with the strongest shift, the deepest colour being {}. An effect on the embedding, not a test: genes in few cells have unsure means.</p>\
         <figure>{chart}<figcaption>Towards (warm) and away from (cold) each prototype.</figcaption></figure>{}",
        drawn.len(),
        effects.len(),
        number(Some(most), 3),
        folded_table("Perturbations as a table", &head, &rows)
    ))
}

/// Prototypes in the order of the file, and the genes.
fn read(text: &str) -> Result<(Vec<String>, Vec<Effect>)> {
    const HEADER: &str = "gene_id\tsymbol\tcells\tsimilarity\tprototype\tshift\tshift_sd\ttowards";
    let mut lines = text.lines().enumerate();
    let header = lines.next().map_or("", |(_, line)| line);
    if header != HEADER {
        let e = Error::new(Code::ChartData, "not a table of perturbations by prototype");
        return Err(e.found(header.chars().take(80).collect::<String>()).wanted(HEADER.replace('\t', ", ")));
    }
    let (mut prototypes, mut effects): (Vec<String>, Vec<Effect>) = (Vec::new(), Vec::new());
    let (mut column, mut row): (HashMap<String, usize>, HashMap<String, usize>) = Default::default();
    for (i, line) in lines {
        let bad = |what: &str| Error::new(Code::ChartData, what.to_string()).at(format!("line {}", i + 1));
        let fields: Vec<&str> = line.split('\t').collect();
        let [id, symbol, cells, similarity, prototype, shift, ..] = fields[..] else {
            return Err(bad("a line with too few columns"));
        };
        // `NA` where no cell speaks.
        let float = |text: &str| match text {
            "NA" => Ok(f64::NAN),
            text => text.parse::<f64>().map_err(|_| bad("no number").found(text)),
        };
        let k = *column.entry(prototype.to_string()).or_insert_with(|| {
            prototypes.push(prototype.to_string());
            prototypes.len() - 1
        });
        let g = match row.get(id) {
            Some(g) => *g,
            None => {
                let name = if symbol.is_empty() { id } else { symbol }.to_string();
                let cells = cells.parse().map_err(|_| bad("no number of cells").found(cells))?;
                effects.push(Effect { name, cells, similarity: float(similarity)?, shift: Vec::new() });
                row.insert(id.to_string(), effects.len() - 1);
                effects.len() - 1
            }
        };
        let shifts = &mut effects[g].shift;
        if shifts.len() != k {
            return Err(bad("the prototypes of a gene are not those of the first").found(prototype));
        }
        shifts.push(float(shift)?);
    }
    if let Some(short) = effects.iter().find(|e| e.shift.len() != prototypes.len()) {
        return Err(Error::new(Code::ChartData, "a gene without all prototypes: the table is cut off")
            .found(&short.name));
    }
    Ok((prototypes, effects))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "gene_id\tsymbol\tcells\tsimilarity\tprototype\tshift\tshift_sd\ttowards\n\
        E1\tPAX6\t7\t0.91\talpha\t-0.2\t0.1\t0\nE1\tPAX6\t7\t0.91\tbeta\t0.05\t0.1\t1\n\
        E2\t<b>\t9\t0.99\talpha\t0.01\t0.1\t1\nE2\t<b>\t9\t0.99\tbeta\t-0.4\tNA\t0\n\
        E3\tGCG\t0\tNA\talpha\tNA\tNA\tNA\nE3\tGCG\t0\tNA\tbeta\tNA\tNA\tNA\n";

    #[test]
    fn the_strongest_comes_first_and_names_are_escaped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.tsv");
        std::fs::write(&path, TABLE).unwrap();
        let page = html(&path).unwrap();
        let (b, pax6) = (page.find("&lt;b&gt;").unwrap(), page.find("PAX6").unwrap());
        assert!(b < pax6 && !page.contains("<b>") && !page.contains("GCG"), "{page}");
        assert!(page.contains("2 of 2") && page.contains("−0.4000"));
    }

    #[test]
    fn what_perturb_did_not_write_is_refused() {
        let fails = |text: &str| read(text).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(fails("gene_id\tsymbol\tcells\tsimilarity\n").contains("by prototype"));
        assert!(fails("").contains("by prototype"));
        assert!(fails(&TABLE.replace("0.05", "x")).contains("line 3"));
        assert!(fails(&TABLE[..TABLE.find("E2\t<b>\t9\t0.99\tbeta").unwrap()]).contains("cut off"));
        assert!(fails(&format!("{TABLE}E4\n")).contains("too few"));
        assert!(read(TABLE).is_ok());
    }
}
