//! The elements of a column: an array of their own, or a field of an array of records.

use super::hdf5::{Field, H5Array, H5Source, Stored};
use crate::error::Result;
use std::sync::Arc;

/// Where the elements of a column lie.
pub(super) struct Cells {
    pub place: Place,
    pub mask: Option<Box<dyn H5Array>>,
}

pub(super) enum Place {
    Array(Box<dyn H5Array>),
    Field(Arc<dyn H5Array>, Field, usize),
}

impl Cells {
    pub fn array(array: Box<dyn H5Array>) -> Self {
        Cells { place: Place::Array(array), mask: None }
    }
    pub fn stored(&self) -> &Stored {
        match &self.place {
            Place::Array(a) => a.stored(),
            Place::Field(_, field, _) => &field.stored,
        }
    }
    pub fn rows(&self) -> Option<u64> {
        let shape = match &self.place {
            Place::Array(a) => a.shape(),
            Place::Field(a, ..) => a.shape(),
        };
        (shape.len() == 1).then(|| shape[0])
    }
    pub fn width(stored: &Stored) -> usize {
        match stored {
            Stored::Number(t) => t.bytes,
            Stored::FixedText(n) => *n,
            Stored::HeapText => 16,
            _ => 0,
        }
    }

    pub fn raw(&self, start: u64, rows: u64) -> Result<Vec<u8>> {
        match &self.place {
            Place::Array(a) => a.rows(start, rows),
            Place::Field(a, field, record) => {
                let width = Self::width(&field.stored);
                let records = a.rows(start, rows)?;
                Ok(records
                    .chunks_exact(*record)
                    .flat_map(|r| &r[field.offset..field.offset + width])
                    .copied()
                    .collect())
            }
        }
    }

    pub fn texts(&self, source: &dyn H5Source, start: u64, rows: u64) -> Result<Vec<String>> {
        match &self.place {
            Place::Array(a) => a.texts(start, rows),
            Place::Field(_, field, _) => {
                let width = Self::width(&field.stored).max(1);
                let raw = self.raw(start, rows)?;
                let text = |bytes: &[u8]| match field.stored {
                    Stored::HeapText => source.heap_text(bytes),
                    _ => Ok(String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string()),
                };
                raw.chunks_exact(width).map(text).collect()
            }
        }
    }

    /// One flag per row; empty without a mask.
    pub fn missing(&self, start: u64, rows: u64) -> Result<Vec<bool>> {
        match &self.mask {
            None => Ok(Vec::new()),
            Some(mask) => Ok(mask.rows(start, rows)?.iter().map(|&b| b != 0).collect()),
        }
    }
}
