//! Columns of a frame that lie elsewhere than in an HDF5 file: names held in memory, scalars in Arrow files.

use super::frame::ColumnValues;
use crate::error::Result;

/// A column that reads itself.
pub trait ColumnReader: Send + Sync {
    /// Values of rows `start .. start + rows`, which exist.
    fn read(&self, start: u64, rows: u64) -> Result<ColumnValues>;
    /// Category names, where values are codes.
    fn categories(&self) -> Option<&[String]> {
        None
    }
    /// Are values numbers?
    fn is_number(&self) -> bool {
        false
    }
    /// Are the numbers floats: 2 is written `2.0` where it becomes a name?
    fn is_float(&self) -> bool {
        false
    }
}

/// Strings in memory.
pub(super) struct HeldTexts(pub Vec<String>);

impl ColumnReader for HeldTexts {
    fn read(&self, start: u64, rows: u64) -> Result<ColumnValues> {
        let span = start as usize..(start + rows) as usize;
        Ok(ColumnValues::Text(self.0.get(span).unwrap_or_default().to_vec()))
    }
}
