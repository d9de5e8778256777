//! Where the buffers of a stream's batches lie, and what its columns are.

use super::super::hdf5::{NumberKind, NumberType};
use super::{ArrowColumn, Batch, Storage, broken};
use crate::error::{Error, Result};
use arrow_ipc::{Field, MessageHeader, Precision, Type};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Metadata of one message at most.
const MAX_METADATA_BYTES: u64 = 64 << 20;
/// Nested types deeper than this are no table of cells.
const MAX_DEPTH: usize = 16;

/// Columns and metadata of a schema.
type Described = (Vec<ArrowColumn>, Vec<(String, String)>);
/// A schema, and the batches behind it.
type Indexed = (Vec<ArrowColumn>, Vec<(String, String)>, Vec<Batch>);

/// Reads the messages of a file.
pub(super) struct Index<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
    pub(super) len: u64,
}

impl Index<'_> {
    fn read_at(&self, at: u64, out: &mut [u8]) -> Result<()> {
        if at.checked_add(out.len() as u64).is_none_or(|end| end > self.len) {
            return Err(
                broken(self.path, at, "the Arrow stream is cut short").found(format!("{} bytes", self.len))
            );
        }
        self.file.read_exact_at(out, at).map_err(|e| Error::io(self.path, "read the file", &e))
    }

    pub(super) fn read(&self) -> Result<Indexed> {
        let mut at = 0;
        let mut schema: Option<Described> = None;
        let mut batches = Vec::new();
        let mut storage: Vec<u64> = Vec::new();
        while at < self.len {
            let mut word = [0u8; 4];
            self.read_at(at, &mut word)?;
            if at == 0 && &word == b"ARRO" {
                return Err(broken(self.path, 0, "this is an Arrow file, not an Arrow stream")
                    .wanted("what datasets' save_to_disk writes"));
            }
            // Streams before Arrow 0.15 have no continuation marker.
            let marked = word == [0xff; 4];
            if marked {
                self.read_at(at + 4, &mut word)?;
            }
            let metadata = u64::from(u32::from_le_bytes(word));
            let start = at + if marked { 8 } else { 4 };
            if metadata == 0 {
                break;
            }
            if metadata > MAX_METADATA_BYTES || metadata > self.len - start.min(self.len) {
                return Err(broken(self.path, at, "a message does not fit the file").found(format!(
                    "metadata of {metadata} bytes, {} left",
                    self.len - start.min(self.len)
                )));
            }
            // Flatbuffers want their start aligned.
            storage.clear();
            storage.resize(metadata.div_ceil(8) as usize, 0);
            let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut storage)[..metadata as usize];
            self.read_at(start, bytes)?;
            let message = arrow_ipc::root_as_message(bytes)
                .map_err(|e| broken(self.path, at, "the Arrow metadata cannot be read").found(e))?;
            let body = start + metadata;
            let body_len = u64::try_from(message.bodyLength())
                .ok()
                .filter(|n| *n <= self.len - body)
                .ok_or_else(|| {
                    broken(self.path, at, "a message does not fit the file").found(format!(
                        "a body of {} bytes, {} left",
                        message.bodyLength(),
                        self.len - body
                    ))
                })?;
            match (message.header_type(), &schema) {
                (MessageHeader::Schema, None) => {
                    schema = Some(self.schema(at, message.header_as_schema())?);
                }
                (MessageHeader::RecordBatch, Some(_)) => {
                    batches.push(self.batch(at, body, body_len, message.header_as_record_batch())?);
                }
                // Of columns that are not read.
                (MessageHeader::DictionaryBatch, Some(_)) => {}
                (other, _) => {
                    return Err(broken(self.path, at, "a message where none may stand")
                        .found(other.variant_name().unwrap_or("an unknown kind"))
                        .wanted("a schema, then record batches"));
                }
            }
            at = body + body_len;
        }
        let (columns, metadata) = schema.ok_or_else(|| {
            broken(self.path, 0, "this is not an Arrow stream").found(format!("{} bytes", self.len))
        })?;
        Ok((columns, metadata, batches))
    }

    fn schema(&self, at: u64, schema: Option<arrow_ipc::Schema<'_>>) -> Result<Described> {
        let schema = schema.ok_or_else(|| broken(self.path, at, "an empty schema"))?;
        if schema.endianness() != arrow_ipc::Endianness::Little {
            return Err(broken(self.path, at, "numbers with the most significant byte first")
                .wanted("little-endian data"));
        }
        let mut columns: Vec<ArrowColumn> = Vec::new();
        let (mut node, mut buffer) = (0, 0);
        for field in schema.fields().into_iter().flatten() {
            let name = field.name().unwrap_or_default().to_string();
            let Some((nodes, buffers)) = extent(&field, 0) else {
                return Err(broken(self.path, at, "a column is of a type that cannot be skipped")
                    .found(format!("{name}: {}", type_name(&field)))
                    .next(format!("leave it out: dataset.remove_columns({name:?}).save_to_disk(…)")));
            };
            columns.push(ArrowColumn { name, storage: storage_of(&field), first: (node, buffer) });
            (node, buffer) = (node + nodes, buffer + buffers);
        }
        let metadata = schema.custom_metadata().into_iter().flatten();
        let metadata = metadata.filter_map(|kv| Some((kv.key()?.to_string(), kv.value()?.to_string())));
        Ok((columns, metadata.collect()))
    }

    fn batch(
        &self,
        at: u64,
        body: u64,
        body_len: u64,
        batch: Option<arrow_ipc::RecordBatch<'_>>,
    ) -> Result<Batch> {
        let batch = batch.ok_or_else(|| broken(self.path, at, "an empty record batch"))?;
        if batch.compression().is_some() {
            return Err(broken(self.path, at, "the record batches are compressed")
                .wanted("plain buffers, as save_to_disk writes them")
                .next("open it with pyarrow and write it again without compression"));
        }
        let count = |n: i64, what: &str| {
            // A row or a node is at least a bit of the body somewhere, or nothing is read of it.
            u64::try_from(n).ok().filter(|n| *n <= 8 * self.len).ok_or_else(|| {
                broken(self.path, at, "a record batch claims more than the file can hold")
                    .found(format!("{n} {what}"))
            })
        };
        let rows = count(batch.length(), "rows")?;
        let mut missing = Vec::new();
        for node in batch.nodes().into_iter().flatten() {
            missing.push(count(node.null_count(), "missing values")?);
        }
        let mut buffers = Vec::new();
        for buffer in batch.buffers().into_iter().flatten() {
            let (offset, len) = (buffer.offset(), buffer.length());
            let fits = u64::try_from(offset).ok().zip(u64::try_from(len).ok());
            let fits = fits.filter(|(o, n)| o.checked_add(*n).is_some_and(|end| end <= body_len));
            buffers.push(fits.ok_or_else(|| {
                broken(self.path, at, "a buffer lies outside its message")
                    .found(format!("{len} bytes from byte {offset} of {body_len}"))
            })?);
        }
        Ok(Batch { rows, body, buffers, missing })
    }
}

fn number_of(field: &Field<'_>) -> Option<NumberType> {
    let number = |kind, bytes| Some(NumberType { kind, bytes, big_endian: false });
    if let Some(int) = field.type_as_int() {
        let kind = if int.is_signed() { NumberKind::Signed } else { NumberKind::Unsigned };
        return match int.bitWidth() {
            8 => number(kind, 1),
            16 => number(kind, 2),
            32 => number(kind, 4),
            64 => number(kind, 8),
            _ => None,
        };
    }
    match field.type_as_floating_point()?.precision() {
        Precision::HALF => number(NumberKind::Float, 2),
        Precision::SINGLE => number(NumberKind::Float, 4),
        Precision::DOUBLE => number(NumberKind::Float, 8),
        _ => None,
    }
}

fn type_name(field: &Field<'_>) -> String {
    field.type_type().variant_name().unwrap_or("an unknown type").to_lowercase()
}

fn storage_of(field: &Field<'_>) -> Storage {
    if field.dictionary().is_some() {
        return Storage::Other("dictionary-encoded values".into());
    }
    let list = |wide: bool| {
        let child = field.children().filter(|c| c.len() == 1).map(|c| c.get(0));
        let item = child.filter(|c| c.dictionary().is_none()).and_then(|c| number_of(&c));
        match item {
            Some(item) => Storage::List { wide, item },
            None => Storage::Other("lists of something else than numbers".into()),
        }
    };
    match field.type_type() {
        Type::Int | Type::FloatingPoint => {
            number_of(field).map_or_else(|| Storage::Other(type_name(field)), Storage::Number)
        }
        Type::Bool => Storage::Bool,
        Type::Utf8 => Storage::Text { wide: false },
        Type::LargeUtf8 => Storage::Text { wide: true },
        Type::List => list(false),
        Type::LargeList => list(true),
        _ => Storage::Other(type_name(field)),
    }
}

/// Nodes and buffers that a column takes in a batch; `None` where the schema does not say.
fn extent(field: &Field<'_>, depth: usize) -> Option<(usize, usize)> {
    if depth > MAX_DEPTH {
        return None;
    }
    let own = match field.type_type() {
        // A dictionary's indices lie like numbers, whatever its values are.
        _ if field.dictionary().is_some() => return Some((1, 2)),
        Type::Null => 0,
        Type::Int
        | Type::FloatingPoint
        | Type::Bool
        | Type::Decimal
        | Type::Date
        | Type::Time
        | Type::Timestamp => 2,
        Type::Interval
        | Type::Duration
        | Type::FixedSizeBinary
        | Type::List
        | Type::LargeList
        | Type::Map => 2,
        Type::Binary | Type::Utf8 | Type::LargeBinary | Type::LargeUtf8 => 3,
        Type::Struct_ | Type::FixedSizeList => 1,
        _ => return None,
    };
    let mut sum = (1, own);
    for child in field.children().into_iter().flatten() {
        let (nodes, buffers) = extent(&child, depth + 1)?;
        sum = (sum.0 + nodes, sum.1 + buffers);
    }
    Some(sum)
}
