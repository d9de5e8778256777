//! Embeddings into a copy of the `.h5ad` file that the cells came from, where scanpy looks for them.
//!
//! | slot | what |
//! |---|---|
//! | `obsm/X_cellrefine` | float32 (rows of the file, D); NaN for a row that the corpus lacks |
//! | `obs/cellrefine_label` | categorical: the best zero-shot label; missing for a row that the corpus lacks |
//! | `obs/cellrefine_score` | float32: its probability |
//! | `uns/cellrefine` | where this comes from |
//!
//! The source is copied byte by byte and the copy added to in place, so everything that this program does not know (pictures,
//! graphs, foreign encodings, compression) stays bit for bit; what this program wrote earlier under the same names is replaced.
//! Memory holds the new matrix and never the file: see [`superblock`]. The copy takes its name when it is whole.

mod cells;
mod superblock;

pub use cells::ABSENT;

use super::provenance::Provenance;
use crate::corpus::Corpus;
use crate::disk::Pending;
use crate::error::{Code, Error, Result};
use crate::import::hdf5::{H5Source, PureFile};
use hdf5_pure::{AttrValue, DatasetBuilder, FileAccessProperties, SyncPolicy};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EMBEDDING: &str = "obsm/X_cellrefine";
const LABEL: &str = "cellrefine_label";
const SCORE: &str = "cellrefine_score";
const ORIGIN: &str = "uns/cellrefine";
/// Labels that an earlier run left in the source are kept, like all else; this says that they are not of these rows.
const NO_LABELS: &str = "none of this run";

/// A source file and the place of its copy, with the rows met with the cells of a corpus.
pub struct H5adCopy {
    source: PathBuf,
    out: PathBuf,
    cells: Vec<u32>,
}

/// Labels of the rows of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowLabels {
    /// The categories.
    pub names: Vec<String>,
    /// Index into `names` per row, −1 = none.
    pub codes: Vec<i32>,
    /// Probability of the label per row, NaN = none.
    pub scores: Vec<f32>,
    /// What they go by, in words.
    pub origin: String,
}

impl H5adCopy {
    /// Reads the names of `source` and meets them with `corpus`. Nothing is written yet.
    ///
    /// # Errors
    /// Usage: `out` is the source itself. Input: no such file, no usable `obs`, names that do not fit the corpus.
    pub fn plan(source: &Path, out: &Path, corpus: &Corpus) -> Result<Self> {
        if same_file(source, out) {
            return Err(Error::new(Code::OutputExists, "the source is never changed in place")
                .found(format!("--out {}", out.display()))
                .wanted("another file than --h5ad")
                .next("write beside it and move the copy over it when you are content"));
        }
        let file: Arc<dyn H5Source> = Arc::new(PureFile::open(source)?);
        let stem = source.file_stem().map_or(String::new(), |s| s.to_string_lossy().into_owned());
        let cells = cells::match_cells(corpus, &cells::open_obs(&file)?, &stem)?;
        Ok(H5adCopy { source: source.to_path_buf(), out: out.to_path_buf(), cells })
    }

    /// Corpus cell of each row, [`ABSENT`] where there is none.
    pub fn cells(&self) -> &[u32] {
        &self.cells
    }

    /// The file that is copied.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Rows that are no cell of the corpus.
    pub fn absent(&self) -> usize {
        self.cells.iter().filter(|c| **c == ABSENT).count()
    }

    /// Copies the source and adds `rows` (little-endian f32, (rows of the file, `width`)), labels and their origin.
    ///
    /// # Errors
    /// Input: a file that cannot be added to. Environment: no space.
    pub fn write(
        &self,
        rows: Vec<u8>,
        width: usize,
        labels: Option<&RowLabels>,
        provenance: &Provenance,
    ) -> Result<()> {
        if rows.len() != self.cells.len() * width * 4 {
            return Err(Error::bug("an embedding of another size than the file's cells"));
        }
        let mut copy = self.copied()?;
        let path = copy.close_writer()?;
        let place = self.out.display().to_string();
        self.add(path, rows, width, labels, provenance).map_err(|e| refused(&self.source, &place, e))?;
        // Read back what the next program will read, before the file gets its name.
        let check = PureFile::open(path)?;
        let shape = check.array(EMBEDDING)?.shape().to_vec();
        if shape != [self.cells.len() as u64, width as u64] {
            return Err(Error::bug("the copy does not read back").at(place).found(format!("{shape:?}")));
        }
        drop(check);
        copy.publish()
    }

    /// The bytes of the source under a hidden name, superblock modernised.
    fn copied(&self) -> Result<Pending> {
        let failed = |e: std::io::Error| Error::io(&self.source, "copy the file", &e);
        let mut source = std::fs::File::open(&self.source).map_err(failed)?;
        let mut copy = Pending::create(&self.out)?;
        let mut head = [0; superblock::HEAD_BYTES];
        source.read_exact(&mut head).map_err(failed)?;
        copy.write(&superblock::modernised(&head).unwrap_or(head))?;
        let mut block = vec![0; 1 << 20];
        loop {
            match source.read(&mut block).map_err(failed)? {
                0 => return Ok(copy),
                n => copy.write(&block[..n])?,
            }
        }
    }

    fn add(
        &self,
        path: &Path,
        rows: Vec<u8>,
        width: usize,
        labels: Option<&RowLabels>,
        provenance: &Provenance,
    ) -> std::result::Result<(), hdf5_pure::Error> {
        // One fsync comes with the new name; a crash before leaves nothing that anyone sees.
        let options = FileAccessProperties::new().with_sync_policy(SyncPolicy::OnClose);
        let file = hdf5_pure::File::open_rw_with_options(path, options)?;
        let root = file.root();
        let groups = root.groups()?;
        for group in ["obsm", "uns"] {
            if !groups.iter().any(|g| g == group) {
                root.create_group_with(group, |g| {
                    g.set_attr("encoding-type", text("dict"));
                    g.set_attr("encoding-version", text("0.1.0"));
                })?;
            }
        }
        for old in [EMBEDDING.to_string(), ORIGIN.into(), format!("obs/{LABEL}"), format!("obs/{SCORE}")] {
            let written = labels.is_some() || !old.starts_with("obs/");
            if written && (file.dataset(&old).is_ok() || file.group(&old).is_ok()) {
                root.delete(&old)?;
            }
        }
        root.create_dataset(EMBEDDING, |d| {
            d.with_raw_data(hdf5_pure::make_f32_type(), rows, (self.cells.len() * width) as u64)
                .with_shape(&[self.cells.len() as u64, width as u64]);
            encoded(d, "array", "0.2.0");
        })?;
        let mut origin = provenance.pairs();
        origin.push(("cells_absent", self.absent().to_string()));
        origin.push(("labels", labels.map_or(NO_LABELS.into(), |l| l.origin.clone())));
        root.create_group_with(ORIGIN, |g| {
            g.set_attr("encoding-type", text("dict"));
            g.set_attr("encoding-version", text("0.1.0"));
            for (key, value) in origin {
                g.create_dataset(key, |d| {
                    d.with_vlen_strings(&[&value]).with_shape(&[]);
                    encoded(d, "string", "0.2.0");
                });
            }
        })?;
        if let Some(labels) = labels {
            add_labels(&file, labels)?;
        }
        file.close()
    }
}

/// Adds the two columns of `obs`.
fn add_labels(file: &hdf5_pure::File, labels: &RowLabels) -> std::result::Result<(), hdf5_pure::Error> {
    let root = file.root();
    let obs = file.group("obs")?;
    let mut columns: Vec<String> = obs
        .attrs()?
        .get("column-order")
        .and_then(|v| v.as_strings().map(<[String]>::to_vec))
        .unwrap_or_default();
    for column in [LABEL, SCORE] {
        if !columns.iter().any(|c| c == column) {
            columns.push(column.into());
        }
    }
    obs.set_attr("column-order", AttrValue::VarLenStringArray(columns))?;
    root.create_group_with(&format!("obs/{LABEL}"), |g| {
        g.set_attr("encoding-type", text("categorical"));
        g.set_attr("encoding-version", text("0.2.0"));
        g.set_attr("ordered", AttrValue::U8(0));
        g.create_dataset("categories", |d| {
            d.with_vlen_strings(&labels.names.iter().map(String::as_str).collect::<Vec<_>>());
            encoded(d, "string-array", "0.2.0");
        });
        g.create_dataset("codes", |d| {
            // The narrowest type that holds them, as pandas does.
            match labels.names.len() {
                0..=127 => d.with_i8_data(&labels.codes.iter().map(|c| *c as i8).collect::<Vec<_>>()),
                128..=32_767 => d.with_i16_data(&labels.codes.iter().map(|c| *c as i16).collect::<Vec<_>>()),
                _ => d.with_i32_data(&labels.codes),
            };
            encoded(d, "array", "0.2.0");
        });
    })?;
    root.create_dataset(&format!("obs/{SCORE}"), |d| {
        d.with_f32_data(&labels.scores);
        encoded(d, "array", "0.2.0");
    })?;
    Ok(())
}

fn text(value: &str) -> AttrValue {
    AttrValue::VarLenString(value.into())
}

/// Marks a dataset as anndata does.
fn encoded(dataset: &mut DatasetBuilder, kind: &str, version: &str) {
    dataset.set_attr("encoding-type", text(kind)).set_attr("encoding-version", text(version));
}

/// Are these one file, by whatever name?
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |p: &Path| std::fs::metadata(p).map(|m| (m.dev(), m.ino())).ok();
    matches!((identity(a), identity(b)), (Some(a), Some(b)) if a == b)
}

fn refused(source: &Path, out: &str, e: hdf5_pure::Error) -> Error {
    match e {
        hdf5_pure::Error::Io(e) => Error::io(out, "write the copy", &e),
        other => Error::new(Code::H5adNotExtended, "this file cannot be added to").at(source.display()).found(other).next(
            "write it again: anndata.read_h5ad(FILE).write_h5ad(NEW); or take the rows as --out FILE.parquet",
        ),
    }
}
