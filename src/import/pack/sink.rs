//! Rows ranked by threads, pushed to the corpus in order.

use super::{EmptyCells, FileReport, PackOptions};
use crate::corpus::writer::{CellRecord, CorpusWriter, ObsSpec, ObsValue};
use crate::error::{Code, Error, Result};
use crate::genes::tokenize::{Scratch, Tokenizer};
use crate::import::frame::{Column, ColumnValues, Frame};
use crate::import::hf_dataset::TokenBlock;
use crate::import::matrix::RowBlock;
use crate::import::names::Names;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows ranked by one task.
const ROWS_PER_TASK: usize = 64;

/// Some consecutive cells, ranked.
pub(super) struct Ranked {
    gene: Vec<u32>,
    value: Vec<f16>,
    /// End of each cell in `gene`.
    end: Vec<usize>,
    total: Vec<f32>,
}

impl Ranked {
    /// Cells that were ranked before.
    pub(super) fn of(block: &TokenBlock) -> Ranked {
        Ranked {
            gene: block.gene.clone(),
            value: Vec::new(),
            end: block.end.clone(),
            total: block.total.clone(),
        }
    }
}

pub(super) fn rank(block: &RowBlock, tokenizer: &Tokenizer, values: bool) -> Vec<Ranked> {
    let tasks = block.rows().div_ceil(ROWS_PER_TASK);
    let one = |scratch: &mut Scratch, task: usize| {
        let rows = task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(block.rows());
        let entries = block.start[rows.end] - block.start[rows.start];
        let mut out = Ranked {
            gene: Vec::with_capacity(entries),
            value: Vec::with_capacity(if values { entries } else { 0 }),
            end: Vec::with_capacity(rows.len()),
            total: Vec::with_capacity(rows.len()),
        };
        for row in rows {
            let (columns, counts) = block.row(row);
            let total: f64 = counts.iter().sum();
            tokenizer.rank(columns, counts, total, scratch, &mut out.gene, values.then_some(&mut out.value));
            out.end.push(out.gene.len());
            out.total.push(total as f32);
        }
        out
    };
    (0..tasks).into_par_iter().map_init(Scratch::default, |scratch, task| one(scratch, task)).collect()
}

/// Where ranked cells go, in order.
pub(super) struct Sink<'a> {
    pub(super) writer: CorpusWriter,
    pub(super) names: Names,
    pub(super) specs: &'a [ObsSpec],
    pub(super) options: &'a PackOptions<'a>,
    /// Cells that each drop rule took.
    pub(super) drop_hits: Vec<u64>,
    /// Rows of the present input to take.
    pub(super) wanted: Range<u64>,
}

impl Sink<'_> {
    /// Is one of these rows to be taken?
    pub(super) fn wants(&self, first: u64, rows: usize) -> bool {
        first < self.wanted.end && first + rows as u64 > self.wanted.start
    }

    /// Counts the names of the rows before the wanted ones, so that names that come again get the numbers that they would have
    /// in one run over everything.
    pub(super) fn skip_names(&mut self, obs: &Frame) -> Result<()> {
        for (start, rows) in obs.windows() {
            let rows = rows.min(self.wanted.start.saturating_sub(start));
            if rows > 0 {
                for name in obs.read_texts(obs.index(), start, rows)? {
                    self.names.pass_over(&name);
                }
            }
        }
        Ok(())
    }

    /// Pushes the cells of a block, `first` the first of them, in order; counts in `report` those without tokens and those left out.
    pub(super) fn push(
        &mut self,
        first: u64,
        ranked: &[Ranked],
        obs: &Frame,
        report: &mut FileReport,
    ) -> Result<()> {
        let rows = ranked.iter().map(|part| part.end.len() as u64).sum();
        let cell_names = obs.read_texts(obs.index(), first, rows)?;
        // A column that this input lacks is missing for all its cells.
        let columns: Vec<Option<(&Column, ColumnValues)>> = self
            .specs
            .iter()
            .map(|s| match obs.columns().iter().find(|c| c.name == s.name) {
                Some(column) => Ok(Some((column, obs.read(column, first, rows)?))),
                None => Ok(None),
            })
            .collect::<Result<_>>()?;
        let drops = self
            .options
            .drop
            .iter()
            .map(|(column, _)| obs.read_texts(obs.column(column)?, first, rows))
            .collect::<Result<Vec<_>>>()?;
        let mut row = 0usize;
        let mut values: Vec<ObsValue<'_>> = Vec::with_capacity(self.specs.len());
        for part in ranked {
            let mut from = 0;
            for (&end, &total) in part.end.iter().zip(&part.total) {
                let cell = std::mem::replace(&mut from, end)..end;
                if !self.wanted.contains(&(first + row as u64)) {
                    row += 1;
                    continue;
                }
                let name = self.names.unique(&cell_names[row]);
                let dropped =
                    self.options.drop.iter().zip(&drops).position(|((_, value), texts)| texts[row] == *value);
                if let Some(rule) = dropped {
                    self.drop_hits[rule] += 1;
                    report.dropped += 1;
                    row += 1;
                    continue;
                }
                if cell.is_empty() {
                    report.empty += 1;
                    if self.options.empty_cells == EmptyCells::Error {
                        return Err(Error::new(Code::EmptyCell, "a cell has no gene of the vocabulary")
                            .at(format!("{}, row {} (from 0), cell {name}", obs.place(), first + row as u64))
                            .found(format!("a total count of {total}"))
                            .next("--empty-cells skip leaves such cells out, and counts them"));
                    }
                }
                if !cell.is_empty() || self.options.empty_cells == EmptyCells::Keep {
                    values.clear();
                    values.extend(columns.iter().map(|column| match column {
                        None => ObsValue::Missing,
                        Some((_, ColumnValues::Number(v))) if v[row].is_nan() => ObsValue::Missing,
                        Some((_, ColumnValues::Number(v))) => ObsValue::Number(v[row]),
                        Some((_, ColumnValues::Text(v))) if v[row].is_empty() => ObsValue::Missing,
                        Some((_, ColumnValues::Text(v))) => ObsValue::Category(&v[row]),
                        Some((column, ColumnValues::Codes(v))) => match usize::try_from(v[row]) {
                            Ok(code) => match column.categories().and_then(|names| names.get(code)) {
                                Some(name) if !name.is_empty() => ObsValue::Category(name),
                                _ => ObsValue::Missing,
                            },
                            Err(_) => ObsValue::Missing,
                        },
                    }));
                    self.writer.push(&CellRecord {
                        id: &name,
                        gene: &part.gene[cell.clone()],
                        value: self.options.values.then(|| &part.value[cell]),
                        total_count: total,
                        obs: &values,
                    })?;
                }
                row += 1;
            }
        }
        Ok(())
    }
}
