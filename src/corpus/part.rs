//! `pack --shard i/n`: one part of a corpus, as a pure function of the inputs and options, for array jobs.
//!
//! Cells are cut where a shard file would end, counted in rows of the inputs one after the other. So every part knows its rows
//! without talking to the others, and where no cell is left out, the shard files of all parts are byte for byte those of one run
//! over everything: `merge` then gives the same corpus digest. Names, columns and the gene mapping are agreed on over all inputs in
//! each part alike; only the inputs that a part takes cells from are read and digested.

use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Which part of how many; counted from 0, as Slurm arrays and Indexed Jobs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// From 0.
    pub index: u64,
    /// Number of parts.
    pub of: u64,
}

/// What a part's manifest says of it, for `merge`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartRecord {
    /// Which part.
    #[serde(flatten)]
    pub part: Part,
    /// Digest over the inputs' names, sizes and cells and all options: equal for parts of one corpus.
    pub job: String,
}

impl Part {
    /// `3/16`.
    pub fn parse(text: &str) -> std::result::Result<Part, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Part { index, of }),
            Some((index, of)) if of > 0 && index == of => {
                Err(format!("parts are counted from 0: {of} parts are 0/{of} to {}/{of}", of - 1))
            }
            _ => Err("give I/N, such as 0/16, the first of 16".into()),
        }
    }

    /// The rows of this part, of `rows` in all, in whole shards of `shard_cells`.
    ///
    /// # Errors
    /// Usage: fewer shards than parts.
    pub fn rows(self, rows: u64, shard_cells: u64) -> Result<Range<u64>> {
        let shards = rows.div_ceil(shard_cells.max(1));
        if shards < self.of {
            return Err(Error::new(Code::FlagValue, "more parts than shards of cells")
                .at(format!("--shard {}/{}", self.index, self.of))
                .found(format!("{rows} cells, {shards} shards of {shard_cells}"))
                .wanted(format!("at most {shards} parts"))
                .next(
                    "ask for fewer parts, or for smaller shards with --shard-cells, the same in all parts",
                ));
        }
        let cut = |i: u64| {
            // Products of a shard number and a part number fit 128 bits whatever they are.
            let shard = (i as u128 * shards as u128 / self.of as u128) as u64;
            (shard * shard_cells).min(rows)
        };
        Ok(cut(self.index)..cut(self.index + 1))
    }
}

/// The rows of `wanted` that lie in an input of `rows` rows, the first of which has the number `first`; from 0 in the input.
pub fn within(wanted: &Range<u64>, first: u64, rows: u64) -> Range<u64> {
    let clip = |at: u64| at.clamp(first, first + rows) - first;
    clip(wanted.start)..clip(wanted.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_row_once_and_end_with_shards() {
        for (rows, shard_cells, of) in [(1, 7, 1), (100, 7, 3), (100, 7, 15), (65_536 * 5 + 1, 65_536, 6)] {
            let mut next = 0;
            for index in 0..of {
                let r = Part { index, of }.rows(rows, shard_cells).unwrap();
                assert_eq!(r.start, next);
                assert!(r.end > r.start && (r.end == rows || r.end.is_multiple_of(shard_cells)));
                next = r.end;
            }
            assert_eq!(next, rows);
        }
        assert!(Part { index: 0, of: 16 }.rows(100, 7).is_err());
    }

    #[test]
    fn the_rows_of_a_part_in_each_input() {
        let wanted = 10..25;
        let of: Vec<_> = [(0, 8), (8, 12), (20, 3), (23, 9)].map(|(f, n)| within(&wanted, f, n)).into();
        assert_eq!(of, [8..8, 2..12, 0..3, 0..2]);
    }

    #[test]
    fn text_of_a_part() {
        assert_eq!(Part::parse("3/16"), Ok(Part { index: 3, of: 16 }));
        for bad in ["16/16", "0/0", "3", "a/b", "-1/4", "1/4/2", ""] {
            assert!(Part::parse(bad).is_err(), "{bad}");
        }
    }
}
