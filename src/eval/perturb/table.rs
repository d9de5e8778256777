//! Effects as a table: one line per set of genes and prototype, tidy, for pandas and R.

use super::Effect;
use crate::disk::Pending;
use crate::error::Result;
use std::fmt::Write;
use std::path::Path;

/// Writes `effects` to `out` (TSV: gene_id, symbol, cells, similarity, prototype, shift, shift_sd, towards). `names` are each set's
/// gene ids and symbols, `prototypes` their names; without prototypes the last four columns are missing. Numbers that no cell speaks
/// for are `NA`.
pub fn write(
    out: &Path,
    names: &[(String, String)],
    prototypes: &[String],
    effects: &[Effect],
) -> Result<()> {
    let mut file = Pending::create(out)?;
    let more = if prototypes.is_empty() { "" } else { "\tprototype\tshift\tshift_sd\ttowards" };
    file.write(format!("gene_id\tsymbol\tcells\tsimilarity{more}\n").as_bytes())?;
    for ((id, symbol), effect) in names.iter().zip(effects) {
        let n = effect.cells;
        let start = format!("{id}\t{symbol}\t{n}\t{}", number(effect.similarity.mean(n)));
        let mut text = String::new();
        for (prototype, shift) in prototypes.iter().zip(&effect.shift) {
            let (mean, sd, towards) = (shift.mean(n), shift.deviation(n), shift.share_above(n));
            let prototype = prototype.replace(['\t', '\n', '\r'], " ");
            let _ =
                writeln!(text, "{start}\t{prototype}\t{}\t{}\t{}", number(mean), number(sd), number(towards));
        }
        if prototypes.is_empty() {
            let _ = writeln!(text, "{start}");
        }
        file.write(text.as_bytes())?;
    }
    file.publish()
}

fn number(x: f64) -> String {
    if x.is_finite() { format!("{x:.6}") } else { "NA".into() }
}
