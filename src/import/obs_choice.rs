//! Which `obs` columns a corpus keeps: the wanted ones, which every input must have, or all suitable ones of any input.

use super::frame::{Column, Frame};
use crate::corpus::format::ObsKind;
use crate::corpus::writer::ObsSpec;
use crate::error::{Code, Error, Result};

/// Without `--obs`, a text column is kept up to this many distinct values: more is a name, not a label.
pub const MAX_CATEGORIES: usize = 1_000;

/// The obs columns that all inputs agree on.
#[derive(Default)]
pub(super) struct ObsChoice {
    specs: Vec<ObsSpec>,
    /// Columns left out, with the reason.
    left_out: Vec<(String, String)>,
}

impl ObsChoice {
    /// Takes one input's columns into account: the wanted ones, or all that are suitable.
    pub fn add(&mut self, obs: &Frame, wanted: &[String]) -> Result<()> {
        if !wanted.is_empty() {
            for name in wanted {
                let column = obs.column(name).map_err(|e| {
                    e.next("name one of these with --obs, or leave --obs out to keep all suitable ones")
                })?;
                let kind = kind_of(column);
                match self.specs.iter().find(|s| s.name == *name) {
                    Some(spec) if spec.kind != kind => {
                        return Err(Error::new(
                            Code::ColumnUnusable,
                            format!(
                                "column {name:?} is {kind:?} here and {:?} in an earlier input",
                                spec.kind
                            ),
                        )
                        .at(column.place())
                        .wanted("one kind of values in all inputs")
                        .next("store it as strings (or numbers) in all files, or leave it out of --obs"));
                    }
                    Some(_) => {}
                    None => self.specs.push(ObsSpec { name: name.clone(), kind }),
                }
            }
            return Ok(());
        }
        for column in obs.columns() {
            match unsuitable(obs, column)? {
                Some(why) => self.leave_out(&column.name, why),
                None => {
                    let kind = kind_of(column);
                    match self.specs.iter().find(|s| s.name == column.name) {
                        Some(spec) if spec.kind != kind => {
                            self.leave_out(&column.name, "numbers in one input and names in another".into())
                        }
                        Some(_) => {}
                        None => self.specs.push(ObsSpec { name: column.name.clone(), kind }),
                    }
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, name: &str, why: String) {
        if self.left_out.iter().all(|(n, _)| n != name) {
            self.left_out.push((name.to_string(), why));
        }
    }

    /// The columns, and notes on those left out.
    pub fn finish(mut self) -> (Vec<ObsSpec>, Vec<String>) {
        self.specs.retain(|s| self.left_out.iter().all(|(n, _)| *n != s.name));
        let notes = self.left_out.into_iter().map(|(name, why)| format!("obs column {name} left out: {why}"));
        (self.specs, notes.collect())
    }
}

fn kind_of(column: &Column) -> ObsKind {
    if column.is_number() { ObsKind::Numeric } else { ObsKind::Categorical }
}

/// Why a column is not kept unless asked for.
fn unsuitable(obs: &Frame, column: &Column) -> Result<Option<String>> {
    if !column.is_readable() {
        return Ok(Some("it cannot be read".into()));
    }
    let too_many = |n: usize| {
        format!("more than {MAX_CATEGORIES} distinct values ({n}); --obs {} keeps it", column.name)
    };
    if let Some(names) = column.categories() {
        return Ok((names.len() > MAX_CATEGORIES).then(|| too_many(names.len())));
    }
    if column.is_text() {
        let mut distinct = std::collections::HashSet::new();
        for (start, rows) in obs.windows() {
            distinct.extend(obs.read_texts(column, start, rows)?);
            if distinct.len() > MAX_CATEGORIES {
                return Ok(Some(too_many(distinct.len())));
            }
        }
    }
    Ok(None)
}
