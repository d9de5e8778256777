//! HDF5 as this crate needs it: groups, attributes, and arrays read by row windows.
//!
//! [`H5Source`] is the border to the HDF5 library: everything above it knows paths, shapes and element kinds only. The file is
//! read with positioned reads, never mapped (a file cut short under a map is a signal, here it is an error), and soft or
//! external links are never followed. Claimed sizes are checked against the file's length before anything is allocated.

pub use super::number::{NumberKind, NumberType};
use crate::error::{Code, Error, Result};
use hdf5_pure::{AttrValue, ChunkCacheConfig, DatasetAccessProperties, Datatype, FormatError, Source};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;

/// A file may claim at most this many times its own size: deflate reaches 1,032, so a true file never gets there.
const MAX_EXPANSION: u64 = 2048;
/// A chunk is decoded in one piece; beyond this it is no chunk but an attack or a mistake.
const MAX_CHUNK_BYTES: u64 = 1 << 30;

/// What lies at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A group.
    Group,
    /// An array.
    Array,
}

/// How elements are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// Numbers and booleans.
    Number(NumberType),
    /// Strings of a fixed number of bytes.
    FixedText(usize),
    /// Strings of any length, in the file's heap.
    HeapText,
    /// A record (legacy data frames).
    Record(Vec<Field>, usize),
    /// Anything else, by name.
    Other(String),
}

/// A field of a record.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Name.
    pub name: String,
    /// First byte within the record.
    pub offset: usize,
    /// Storage.
    pub stored: Stored,
}

/// An attribute, as far as AnnData uses them.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// One string.
    Text(String),
    /// Strings.
    Texts(Vec<String>),
    /// Integers.
    Integers(Vec<i64>),
}

/// A tree of groups and arrays.
pub trait H5Source: Send + Sync {
    /// The file, for messages.
    fn name(&self) -> &str;
    /// Its length in bytes.
    fn len_bytes(&self) -> u64;
    /// What lies at `path`; `None` for nothing (or a link, which is not followed).
    fn node(&self, path: &str) -> Result<Option<Node>>;
    /// Names of the arrays and groups in a group, sorted.
    fn children(&self, path: &str) -> Result<Vec<String>>;
    /// An attribute of a group or array.
    fn attribute(&self, path: &str, name: &str) -> Result<Option<Attribute>>;
    /// Opens an array.
    fn array(&self, path: &str) -> Result<Box<dyn H5Array>>;
    /// A string in the file's heap: the bytes of a 16-byte reference as found in records.
    fn heap_text(&self, reference: &[u8]) -> Result<String>;
}

/// An array of any rank; rows run along the first dimension.
pub trait H5Array: Send + Sync {
    /// `file:path`, for messages.
    fn place(&self) -> &str;
    /// Extents.
    fn shape(&self) -> &[u64];
    /// Element storage.
    fn stored(&self) -> &Stored;
    /// Rows in a chunk, 0 where storage is not chunked: windows aligned to it are decoded once.
    fn chunk_rows(&self) -> u64;
    /// The bytes of rows `start .. start + rows`.
    fn rows(&self, start: u64, rows: u64) -> Result<Vec<u8>>;
    /// The strings of rows `start .. start + rows`.
    fn texts(&self, start: u64, rows: u64) -> Result<Vec<String>>;
}

/// Positioned reads of a file, from several threads at once.
struct Reader {
    file: std::fs::File,
    len: u64,
}

impl Source for Reader {
    fn len(&self) -> u64 {
        self.len
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::result::Result<(), FormatError> {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(buf, offset).map_err(|e| FormatError::Source(e.to_string()))
    }
}

/// [`H5Source`] by the `hdf5-pure` crate.
pub struct PureFile {
    file: hdf5_pure::File,
    raw: Reader,
    name: String,
    /// Arrays whose chunks were found to lie within the file.
    sound: Mutex<HashSet<String>>,
}

impl PureFile {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// Input: missing, a folder, empty, not HDF5, truncated.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let fail = |e: std::io::Error| Error::io(path, "read the file", &e);
        let file = std::fs::File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if metadata.is_dir() {
            return Err(Error::new(Code::FileKind, "an HDF5 file was wanted, this is a folder")
                .at(&name)
                .next("zarr stores and matrix folders: convert to .h5ad with anndata first"));
        }
        if metadata.len() == 0 {
            return Err(Error::new(Code::FileEmpty, "the file is empty")
                .at(&name)
                .next("copy or download it again"));
        }
        let reader = |file: &std::fs::File| {
            Ok::<_, Error>(Reader { file: file.try_clone().map_err(fail)?, len: metadata.len() })
        };
        let open = hdf5_pure::File::from_source(reader(&file)?).map_err(|e| {
            let hdf5 = hdf5_pure::is_hdf5(path).unwrap_or(false);
            let (what, next) = if hdf5 {
                ("the HDF5 file cannot be opened: it is damaged or cut short", "copy or download it again")
            } else {
                (
                    "this is not an HDF5 file",
                    "give an .h5ad or 10x .h5 file (gunzip it first if it ends in .gz)",
                )
            };
            Error::new(Code::Hdf5Damaged, what)
                .at(&name)
                .found(format!("{e}; {} bytes", metadata.len()))
                .next(next)
        })?;
        let end = open.superblock().eof_address;
        if end > metadata.len() {
            return Err(Error::new(Code::Hdf5Cut, "the HDF5 file is cut short")
                .at(&name)
                .found(format!("{} bytes", metadata.len()))
                .wanted(format!("{end} bytes, as its header says"))
                .next("copy or download it again"));
        }
        Ok(PureFile { file: open, raw: reader(&file)?, name, sound: Mutex::default() })
    }

    /// Holds where each chunk lies against the file: the library makes room for what a chunk's entry claims, up to 4 GiB, before
    /// it reads. Once for each array, since the index of a large one is long; one that cannot be listed fails when it is read.
    fn check_chunks(&self, path: &str, place: &str, dataset: &hdf5_pure::Dataset) -> Result<()> {
        let sound = || self.sound.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if sound().contains(path) {
            return Ok(());
        }
        let beyond =
            |c: &hdf5_pure::Chunk| c.address.checked_add(c.storage_size).is_none_or(|end| end > self.raw.len);
        if let Some(chunk) = dataset.chunks().unwrap_or_default().iter().find(|c| beyond(c)) {
            return Err(Error::new(Code::Hdf5Claims, "a chunk of the array lies beyond the file")
                .at(place)
                .found(format!(
                    "{} bytes from byte {}, in a file of {} bytes",
                    chunk.storage_size, chunk.address, self.raw.len
                ))
                .next("the file is damaged or cut short: copy or download it again"));
        }
        sound().insert(path.to_string());
        Ok(())
    }

    fn damaged(&self, path: &str, e: &hdf5_pure::Error) -> Error {
        damaged(&format!("{}:{path}", self.name), e)
    }
}

fn damaged(place: &str, e: &hdf5_pure::Error) -> Error {
    let text = e.to_string();
    if let hdf5_pure::Error::Format(FormatError::UnsupportedFilter(id)) = e {
        return Error::new(Code::Hdf5Filter, "the array is compressed with a filter that is not supported")
            .at(place)
            .found(format!("HDF5 filter {id}"))
            .wanted("gzip, lzf, shuffle, or none")
            .next("write the file again: anndata.read_h5ad(F).write_h5ad(F2, compression=\"gzip\")");
    }
    Error::new(Code::Hdf5Damaged, "the HDF5 data cannot be read")
        .at(place)
        .found(text)
        .next("the file is damaged or cut short: copy or download it again")
}

fn classify(t: &Datatype) -> Stored {
    let big = |order: &hdf5_pure::DatatypeByteOrder| format!("{order:?}").starts_with("Big");
    let whole = |size: u32, offset: u16, precision: u16| offset == 0 && u32::from(precision) == 8 * size;
    match t {
        Datatype::FixedPoint { size: size @ (1 | 2 | 4 | 8), byte_order, layout }
            if whole(*size, layout.bit_offset, layout.bit_precision) =>
        {
            let kind = if layout.signed { NumberKind::Signed } else { NumberKind::Unsigned };
            Stored::Number(NumberType { kind, bytes: *size as usize, big_endian: big(byte_order) })
        }
        Datatype::FloatingPoint { size: size @ (2 | 4 | 8), byte_order, layout }
            if whole(*size, layout.bit_offset, layout.bit_precision)
                && layout.exponent_size == [0, 0, 5, 0, 8, 0, 0, 0, 11][*size as usize] =>
        {
            Stored::Number(NumberType {
                kind: NumberKind::Float,
                bytes: *size as usize,
                big_endian: big(byte_order),
            })
        }
        Datatype::Enumeration { size: 1, members, .. } if members.len() == 2 => {
            Stored::Number(NumberType { kind: NumberKind::Bool, bytes: 1, big_endian: false })
        }
        Datatype::String { size, .. } => Stored::FixedText(*size as usize),
        Datatype::VariableLength { is_string: true, .. } => Stored::HeapText,
        Datatype::Compound { size, members } => {
            let fields = members.iter().map(|m| Field {
                name: m.name.clone(),
                offset: usize::try_from(m.byte_offset).unwrap_or(usize::MAX),
                stored: classify(&m.datatype),
            });
            Stored::Record(fields.collect(), *size as usize)
        }
        other => Stored::Other(format!("{other}")),
    }
}

impl H5Source for PureFile {
    fn name(&self) -> &str {
        &self.name
    }
    fn len_bytes(&self) -> u64 {
        self.raw.len
    }

    fn node(&self, path: &str) -> Result<Option<Node>> {
        match self.file.dataset(path) {
            Ok(_) => Ok(Some(Node::Array)),
            Err(hdf5_pure::Error::NotADataset(_)) => Ok(Some(Node::Group)),
            Err(hdf5_pure::Error::Format(FormatError::PathNotFound(_)) | hdf5_pure::Error::NotAGroup(_)) => {
                Ok(None)
            }
            Err(e) => Err(self.damaged(path, &e)),
        }
    }

    fn children(&self, path: &str) -> Result<Vec<String>> {
        let list = || -> std::result::Result<Vec<String>, hdf5_pure::Error> {
            let group = self.file.group(path)?;
            let mut names = group.datasets()?;
            names.extend(group.groups()?);
            names.sort();
            Ok(names)
        };
        list().map_err(|e| self.damaged(path, &e))
    }

    fn attribute(&self, path: &str, name: &str) -> Result<Option<Attribute>> {
        let attributes = match self.node(path)? {
            None => return Ok(None),
            Some(Node::Array) => self.file.dataset(path).and_then(|d| d.attrs()),
            Some(Node::Group) if path.is_empty() || path == "/" => self.file.root().attrs(),
            Some(Node::Group) => self.file.group(path).and_then(|g| g.attrs()),
        };
        let mut attributes = attributes.map_err(|e| self.damaged(path, &e))?;
        Ok(attributes.remove(name).and_then(attribute))
    }

    fn array(&self, path: &str) -> Result<Box<dyn H5Array>> {
        let fail = |e: hdf5_pure::Error| self.damaged(path, &e);
        // Windows are aligned to chunks, so no decoded chunk is worth keeping; the chunk index is.
        let cache = ChunkCacheConfig::new().with_max_bytes(0).with_max_slots(0);
        let options = DatasetAccessProperties::new().with_chunk_cache(cache);
        let dataset = self.file.dataset_with_options(path, options).map_err(fail)?;
        let place = format!("{}:{path}", self.name);
        let shape = dataset.shape().map_err(fail)?;
        let datatype = dataset.datatype().map_err(fail)?;
        let element_bytes = dataset.element_size().map_err(fail)?;
        let claimed = shape.iter().try_fold(element_bytes, |n, &d| n.checked_mul(d));
        if claimed.is_none_or(|n| n > self.raw.len.saturating_mul(MAX_EXPANSION)) {
            return Err(Error::new(Code::Hdf5Claims, "the array claims more data than the file can hold")
                .at(&place)
                .found(format!(
                    "shape {shape:?} of {element_bytes} bytes each, in a file of {} bytes",
                    self.raw.len
                ))
                .next("the file is damaged: copy or download it again"));
        }
        let chunk = dataset.chunk_shape().map_err(fail)?;
        if let Some(chunk) = &chunk {
            let bytes = chunk.iter().try_fold(element_bytes, |n, &d| n.checked_mul(d));
            if bytes.is_none_or(|n| n > MAX_CHUNK_BYTES) || chunk.contains(&0) {
                return Err(Error::new(Code::Hdf5Claims, "the array's chunks are too large")
                    .at(&place)
                    .found(format!("chunks of {chunk:?} elements of {element_bytes} bytes"))
                    .wanted(format!("chunks of at most {MAX_CHUNK_BYTES} bytes"))
                    .next("write the file again with anndata.write_h5ad"));
            }
        }
        if chunk.is_some() {
            self.check_chunks(path, &place, &dataset)?;
        }
        let stored = classify(&datatype);
        if stored == Stored::HeapText {
            // References may all point at one large string: what they add up to is bounded as well.
            let bytes = dataset.vlen_string_payload_size().map_err(fail)?;
            if bytes > self.raw.len.saturating_mul(16) {
                return Err(Error::new(
                    Code::Hdf5Claims,
                    "the strings claim more data than the file can hold",
                )
                .at(&place)
                .found(format!("{bytes} bytes of text in a file of {} bytes", self.raw.len)));
            }
        }
        let chunk_rows = chunk.and_then(|c| c.first().copied()).unwrap_or(0);
        Ok(Box::new(PureArray { dataset, place, shape, stored, chunk_rows }))
    }

    /// Layout: a reference is length u32, heap address u64, object index u32; a heap is `GCOL`, version, 3 reserved bytes, size
    /// u64, then objects of index u16, count u16, 4 reserved bytes, size u64 and the bytes, padded to 8.
    fn heap_text(&self, reference: &[u8]) -> Result<String> {
        let wrong = |what: &str| {
            Error::new(Code::Hdf5Damaged, "a string reference in a record is broken")
                .at(&self.name)
                .found(what)
                .next("copy or download the file again")
        };
        let [l0, l1, l2, l3, address @ .., i0, i1, i2, i3] = reference else {
            return Err(wrong("a short reference"));
        };
        let wanted = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
        let index = u32::from_le_bytes([*i0, *i1, *i2, *i3]);
        let address =
            u64::from_le_bytes(address.try_into().map_err(|_| wrong("a reference that is not 16 bytes"))?);
        if wanted == 0 {
            return Ok(String::new());
        }
        let read = |at: u64, n: usize| {
            let mut bytes = vec![0; n];
            self.raw.read_at(at, &mut bytes).map(|()| bytes).map_err(|_| wrong("an address beyond the file"))
        };
        let header = read(address, 16)?;
        if &header[..4] != b"GCOL" {
            return Err(wrong("an address without a heap"));
        }
        let u64_at =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let end = address.saturating_add(u64_at(&header, 8)).min(self.raw.len);
        let mut at = address + 16;
        while at + 16 <= end {
            let object = read(at, 16)?;
            let (found, size) = (u32::from(u16::from_le_bytes([object[0], object[1]])), u64_at(&object, 8));
            if found == index && wanted as u64 <= size && size <= end - at {
                let bytes = read(at + 16, wanted)?;
                let text = String::from_utf8(bytes).map_err(|_| wrong("bytes that are not UTF-8"))?;
                return Ok(text.trim_end_matches('\0').to_string());
            }
            if found == 0 {
                break;
            }
            at = at.saturating_add(16).saturating_add(size.div_ceil(8).saturating_mul(8));
        }
        Err(wrong("an object that the heap lacks"))
    }
}

fn attribute(value: AttrValue) -> Option<Attribute> {
    use AttrValue as A;
    Some(match value {
        A::String(s) | A::AsciiString(s) | A::VarLenString(s) | A::VarLenAsciiString(s) => Attribute::Text(s),
        A::StringSized { value, .. } | A::AsciiStringSized { value, .. } => Attribute::Text(value),
        A::StringArray(v)
        | A::AsciiStringArray(v)
        | A::VarLenStringArray(v)
        | A::VarLenAsciiStringArray(v)
        | A::VarLenAsciiCharArray(v) => Attribute::Texts(v),
        A::StringArraySized { values, .. } | A::AsciiStringArraySized { values, .. } => {
            Attribute::Texts(values)
        }
        A::I8(v) => Attribute::Integers(vec![v.into()]),
        A::I16(v) => Attribute::Integers(vec![v.into()]),
        A::I32(v) => Attribute::Integers(vec![v.into()]),
        A::I64(v) => Attribute::Integers(vec![v]),
        A::U8(v) => Attribute::Integers(vec![v.into()]),
        A::U16(v) => Attribute::Integers(vec![v.into()]),
        A::U32(v) => Attribute::Integers(vec![v.into()]),
        A::U64(v) => Attribute::Integers(vec![i64::try_from(v).ok()?]),
        A::I8Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::I16Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::I32Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::I64Array(v) => Attribute::Integers(v),
        A::U8Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::U16Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::U32Array(v) => Attribute::Integers(v.into_iter().map(i64::from).collect()),
        A::U64Array(v) => {
            Attribute::Integers(v.into_iter().map(i64::try_from).collect::<std::result::Result<_, _>>().ok()?)
        }
        _ => return None,
    })
}

struct PureArray {
    dataset: hdf5_pure::Dataset,
    place: String,
    shape: Vec<u64>,
    stored: Stored,
    chunk_rows: u64,
}

impl H5Array for PureArray {
    fn place(&self) -> &str {
        &self.place
    }
    fn shape(&self) -> &[u64] {
        &self.shape
    }
    fn stored(&self) -> &Stored {
        &self.stored
    }
    fn chunk_rows(&self) -> u64 {
        self.chunk_rows
    }
    fn rows(&self, start: u64, rows: u64) -> Result<Vec<u8>> {
        self.dataset.read_raw_rows(start, rows).map_err(|e| damaged(&self.place, &e))
    }
    fn texts(&self, start: u64, rows: u64) -> Result<Vec<String>> {
        self.dataset.read_string_rows(start, rows).map_err(|e| damaged(&self.place, &e))
    }
}
