//! Safetensors files: named tensors after a JSON header. Read with every offset checked before any allocation, a tensor at a
//! time; written a tensor at a time, byte for byte as the reference writer would (largest types first, then by name).

use crate::disk::Output;
use crate::error::{Code, Error, Result, nearest};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Largest header that is read, as in the reference reader.
const HEADER_MAX: u64 = 100_000_000;

/// An open file whose header has been checked against its size.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    header: Metadata,
}

impl TensorFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// Input: missing, empty, truncated, no safetensors at all, offsets that overlap, leave holes or do not fit the shapes.
    pub fn open(path: &Path) -> Result<Self> {
        let broken = |what: &str, found: String| {
            Error::new(Code::TensorFile, what)
                .at(path.display())
                .found(found)
                .wanted("a complete safetensors file")
                .next("copy or save the file again")
        };
        let file = File::open(path).map_err(|e| Error::io(path, "open the tensors", &e))?;
        let size = file.metadata().map_err(|e| Error::io(path, "read the size", &e))?.len();
        let mut word = [0u8; 8];
        if size < 8 {
            return Err(broken("not a safetensors file", format!("{size} bytes")));
        }
        file.read_exact_at(&mut word, 0).map_err(|e| Error::io(path, "read the header", &e))?;
        let header_len = u64::from_le_bytes(word);
        if header_len > HEADER_MAX || header_len > size - 8 {
            return Err(broken(
                "the header does not fit the file",
                format!("{size} bytes, a header of {header_len}"),
            ));
        }
        let mut header = vec![0u8; header_len as usize];
        file.read_exact_at(&mut header, 8).map_err(|e| Error::io(path, "read the header", &e))?;
        let unreadable = |e: serde_json::Error| broken("the header cannot be read", e.to_string());
        let _: DistinctNames = serde_json::from_slice(&header).map_err(unreadable)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(unreadable)?;
        let data_start = 8 + header_len;
        let end = data_start.saturating_add(header.data_len() as u64);
        if end != size {
            let what = if end > size { "truncated" } else { "bytes after the last tensor" };
            return Err(broken(what, format!("{size} bytes, the header says {end}")));
        }
        Ok(TensorFile { path: path.to_path_buf(), file, data_start, header })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.header.tensors().into_keys().collect();
        names.sort();
        names
    }
    /// Type and shape of a tensor, if there is one of this name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }
    /// The free-form strings of the header.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// Input: no such tensor (with the nearest name).
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.info(name).ok_or_else(|| {
            let e = Error::new(Code::TensorMissing, format!("no tensor `{name}`")).at(self.path.display());
            let names = self.names();
            match nearest(name, names.iter().map(String::as_str)) {
                Some(near) => e.found(format!("{} tensors, the nearest is `{near}`", names.len())),
                None => e.found(names.join(", ")),
            }
        })?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        self.file
            .read_exact_at(&mut bytes, self.data_start + start as u64)
            .map_err(|e| Error::io(&self.path, &format!("read tensor `{name}`"), &e))?;
        Ok(bytes)
    }

    /// A floating-point tensor of this shape, widened to f32 (f32, f16 and bf16 are read).
    ///
    /// # Errors
    /// Input: absent, of another shape or type.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let bytes = self.bytes(name)?;
        let info = self.info(name).ok_or_else(|| Error::bug("a tensor vanished"))?;
        let place = format!("{}:{name}", self.path.display());
        if info.shape != shape {
            return Err(Error::new(Code::TensorShape, "a tensor of another shape")
                .at(place)
                .found(format!("{:?}", info.shape))
                .wanted(format!("{shape:?}")));
        }
        let halves = |widen: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|b| widen(*b)).collect();
        match info.dtype {
            Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::F16 => Ok(halves(|b| half::f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Ok(halves(|b| half::bf16::from_le_bytes(b).to_f32())),
            other => Err(Error::new(Code::TensorShape, "a tensor of another type")
                .at(place)
                .found(format!("{other:?}"))
                .wanted("F32, F16 or BF16")),
        }
    }
}

/// An object that names nothing twice: of two tensors of one name, a map would keep the last and say nothing.
struct DistinctNames;

impl<'de> serde::Deserialize<'de> for DistinctNames {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> serde::de::Visitor<'de> for Names {
            type Value = DistinctNames;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<DistinctNames, A::Error> {
                let mut seen = std::collections::HashSet::new();
                while let Some((name, _)) = map.next_entry::<String, serde::de::IgnoredAny>()? {
                    if let Some(name) = seen.replace(name) {
                        return Err(serde::de::Error::custom(format!("`{name}` is named twice")));
                    }
                }
                Ok(DistinctNames)
            }
        }
        from.deserialize_map(Names)
    }
}

/// A tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Declared {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl Declared {
    /// An f32 tensor.
    pub fn f32(name: impl Into<String>, shape: &[usize]) -> Self {
        Declared { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec() }
    }
    /// Size in the file.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Sorts `tensors` into file order and returns the bytes before the data: header length, header, padding to 8 bytes.
pub fn header(tensors: &mut [Declared], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        let strings = metadata.iter().map(|(k, v)| (k.to_string(), (*v).into()));
        map.insert("__metadata__".into(), serde_json::Value::Object(strings.collect()));
    }
    let mut offset = 0;
    for t in tensors.iter() {
        let info =
            TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (offset, offset + t.bytes()) };
        offset += t.bytes();
        let info = serde_json::to_value(&info).map_err(|e| Error::bug(format!("a tensor header: {e}")))?;
        if map.insert(t.name.clone(), info).is_some() {
            return Err(Error::bug("two tensors of one name").found(&t.name));
        }
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

/// Writes a file and syncs it to disk. `fill` is asked for the little-endian bytes of one tensor at a time, in file order, so
/// a checkpoint never stands in host memory as a whole.
///
/// # Errors
/// Environment: the disk. Bug: bytes that do not fit the shape.
pub fn write(
    path: &Path,
    metadata: &[(&str, &str)],
    mut tensors: Vec<Declared>,
    mut fill: impl FnMut(&Declared) -> Result<Vec<u8>>,
) -> Result<()> {
    let io = |e: std::io::Error| Error::io(path, "write the tensors", &e);
    let header = header(&mut tensors, metadata)?;
    let mut out = BufWriter::with_capacity(1 << 20, Output::create(path).map_err(io)?);
    out.write_all(&header).map_err(io)?;
    for tensor in &tensors {
        let bytes = fill(tensor)?;
        if bytes.len() != tensor.bytes() {
            return Err(Error::bug(format!("tensor `{}` has the wrong size", tensor.name))
                .found(bytes.len())
                .wanted(tensor.bytes()));
        }
        out.write_all(&bytes).map_err(io)?;
    }
    let file = out.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync().map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(dir: &Path) -> PathBuf {
        let path = dir.join("t.safetensors");
        let tensors = vec![
            Declared::f32("b", &[2, 3]),
            Declared { name: "a".into(), dtype: Dtype::BF16, shape: vec![2] },
            Declared { name: "z".into(), dtype: Dtype::I64, shape: vec![1] },
        ];
        write(&path, &[("format", "pt")], tensors, |t| {
            Ok(match t.name.as_str() {
                "b" => bytemuck::cast_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]).to_vec(),
                "a" => {
                    bytemuck::cast_slice(&[half::bf16::from_f32(1.5), half::bf16::from_f32(-2.0)]).to_vec()
                }
                _ => 7i64.to_le_bytes().to_vec(),
            })
        })
        .unwrap();
        path
    }

    #[test]
    fn the_reference_reader_and_ours_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(reference.len(), 3);
        let f = TensorFile::open(&path).unwrap();
        assert_eq!(f.floats("b", &[2, 3]).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(f.floats("a", &[2]).unwrap(), [1.5, -2.0]);
        assert_eq!(f.metadata()["format"], "pt");
        // The reference writer makes the same file of the same views.
        let views = reference.tensors();
        let again = safetensors::serialize(views, Some(f.metadata())).unwrap();
        assert_eq!(again, bytes);
    }

    #[test]
    fn every_truncation_and_every_broken_header_byte_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        let cut = dir.path().join("cut.safetensors");
        for len in 0..bytes.len() {
            std::fs::write(&cut, &bytes[..len]).unwrap();
            let e = TensorFile::open(&cut).err().unwrap_or_else(|| panic!("{len} bytes were taken"));
            assert_eq!(e.kind().exit_code(), 3, "{e}");
        }
        for at in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 0x80;
            std::fs::write(&cut, &bad).unwrap();
            assert!(TensorFile::open(&cut).is_err(), "byte {at}");
        }
        let e = TensorFile::open(&dir.path().join("none")).unwrap_err();
        assert_eq!(e.kind().exit_code(), 3);
    }

    #[test]
    fn errors_name_tensor_shape_and_type() {
        let dir = tempfile::tempdir().unwrap();
        let f = TensorFile::open(&sample(dir.path())).unwrap();
        assert!(f.floats("bb", &[1]).unwrap_err().to_string().contains("nearest is `b`"));
        let e = f.floats("b", &[3, 2]).unwrap_err().to_string();
        assert!(e.contains("[2, 3]") && e.contains("[3, 2]") && e.contains(":b"));
        assert!(f.floats("z", &[1]).unwrap_err().to_string().contains("I64"));
    }
}
