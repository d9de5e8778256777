//! Embeddings as Parquet: `cell_id` (string) and `embedding` (fixed-size list of D float32), one row a cell.
//!
//! One column of vectors, not D columns of numbers: polars reads it as `Array(Float32, D)`, pyarrow as `FixedSizeList`,
//! `datasets` as `Sequence(length=D)`, pandas as one array a cell (`numpy.stack(df["embedding"])`), and a reader that wants a
//! few cells touches two column chunks instead of a thousand. Floats of an embedding neither repeat nor compress, so they are
//! stored plain; ids are compressed. Rows go out in groups of about [`GROUP_BYTES`]: memory does not grow with the cells.
//! The origin stands in the file's key-value metadata, each key with `cellrefine.` in front.

use super::npy::check_finite;
use super::provenance::Provenance;
use crate::disk::Pending;
use crate::error::{Code, Error, Result};
use arrow_array::{ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a row group.
pub const GROUP_BYTES: usize = 32 << 20;

/// Writes rows and ids, a block at a time.
pub struct ParquetWriter {
    writer: ArrowWriter<Pending>,
    schema: Arc<Schema>,
    item: Arc<Field>,
    width: usize,
}

impl ParquetWriter {
    /// Starts `path` for rows of `width` values.
    pub fn create(path: &Path, width: usize, provenance: &Provenance) -> Result<Self> {
        let item = Arc::new(Field::new("element", DataType::Float32, false));
        let list = DataType::FixedSizeList(item.clone(), width as i32);
        // Once for readers of Arrow schemas (pyarrow, polars), once as plain key-value metadata for all others.
        let origin = || provenance.pairs().into_iter().map(|(k, v)| (format!("cellrefine.{k}"), v));
        let columns =
            vec![Field::new("cell_id", DataType::Utf8, false), Field::new("embedding", list, false)];
        let schema = Arc::new(Schema::new(columns).with_metadata(origin().collect::<HashMap<_, _>>()));
        let pairs: Vec<KeyValue> = origin().map(|(k, v)| KeyValue::new(k, v)).collect();
        let vectors = ColumnPath::from(vec!["embedding".to_string(), "list".into(), "element".into()]);
        let properties = WriterProperties::builder()
            .set_created_by(concat!("cellrefine ", env!("CARGO_PKG_VERSION")).into())
            .set_max_row_group_row_count(Some((GROUP_BYTES / (4 * width.max(1))).max(1)))
            .set_dictionary_enabled(false)
            .set_compression(Compression::SNAPPY)
            .set_column_compression(vectors.clone(), Compression::UNCOMPRESSED)
            .set_column_encoding(vectors.clone(), Encoding::PLAIN)
            .set_column_statistics_enabled(vectors, EnabledStatistics::None)
            .set_key_value_metadata(Some(pairs))
            .build();
        let writer =
            ArrowWriter::try_new(Pending::create(path)?, schema.clone(), Some(properties)).map_err(failed)?;
        Ok(ParquetWriter { writer, schema, item, width })
    }

    /// Appends rows (n, D) with their n ids. Refuses values that are not finite.
    pub fn append<S: AsRef<str>>(&mut self, values: &[f32], ids: &[S]) -> Result<()> {
        if values.len() != ids.len() * self.width {
            return Err(Error::bug("rows and ids differ in number")
                .found(values.len())
                .wanted(ids.len() * self.width));
        }
        check_finite(values, self.width, ids)?;
        let numbers: ArrayRef = Arc::new(Float32Array::from(values.to_vec()));
        let vectors = FixedSizeListArray::try_new(self.item.clone(), self.width as i32, numbers, None);
        let ids = StringArray::from_iter_values(ids.iter().map(S::as_ref));
        let batch = vectors
            .and_then(|v| RecordBatch::try_new(self.schema.clone(), vec![Arc::new(ids), Arc::new(v)]))
            .map_err(|e| Error::bug(format!("a record batch of embeddings: {e}")))?;
        self.writer.write(&batch).map_err(failed)
    }

    /// Ends the file and gives it its name.
    pub fn finish(self) -> Result<()> {
        self.writer.into_inner().map_err(failed)?.publish()
    }
}

fn failed(e: parquet::errors::ParquetError) -> Error {
    Error::new(Code::WriteFailed, "cannot write the Parquet file").found(e).next("is the disk full?")
}
