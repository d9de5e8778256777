//! 10x Genomics HDF5, as Cell Ranger writes it.
//!
//! | version | matrix | names |
//! |---|---|---|
//! | 3 | `matrix/{data,indices,indptr,shape}` | `matrix/features/{id,name,feature_type,genome}` |
//! | 2 | `GENOME/{data,indices,indptr,shape}` | `GENOME/genes`, `GENOME/gene_names` |
//!
//! `shape` is genes × cells and the storage is by columns, which is by cells: the same arrays read as cells × genes are CSR, so
//! cells stream in order and nothing is turned. Of version 3, features of type `Gene Expression` alone are taken.

use super::features::Features;
use super::frame::Frame;
use super::hdf5::{H5Source, Node, Stored};
use super::matrix::{Matrix, NO_COUNTS, Pass, RowBlock};
use super::source::{CellSource, OpenOptions};
use crate::error::{Code, Error, Result};
use crate::genes::mapping::NameColumn;
use std::sync::Arc;

/// Where the matrix and its names lie.
pub(super) struct Layout {
    group: String,
    version: u8,
}

/// Finds the matrix of a 10x file; `None` where the file is not one.
///
/// # Errors
/// Input: several genomes and no choice, or a choice that is not there.
pub(super) fn layout(source: &dyn H5Source, genome: Option<&str>) -> Result<Option<Layout>> {
    for anndata in ["X", "raw", "layers", "obs"] {
        if source.node(anndata)?.is_some() {
            return Ok(None);
        }
    }
    if source.node("matrix/barcodes")?.is_some() {
        return Ok(Some(Layout { group: "matrix".into(), version: 3 }));
    }
    let mut genomes = Vec::new();
    for group in source.children("/")? {
        let has = |name: &str| Ok::<_, Error>(source.node(&format!("{group}/{name}"))? == Some(Node::Array));
        if source.node(&group)? == Some(Node::Group) && has("barcodes")? && has("genes")? {
            genomes.push(group);
        }
    }
    let group = match (genome, genomes.as_slice()) {
        (_, []) => return Ok(None),
        (None, [one]) => one.clone(),
        (Some(wanted), all) if all.iter().any(|g| g == wanted) => wanted.to_string(),
        (wanted, all) => {
            let what = match wanted {
                Some(wanted) => format!("the file has no genome {wanted:?}"),
                None => "the file holds several genomes".into(),
            };
            return Err(Error::new(Code::TenxFeatures, what)
                .at(source.name())
                .found(all.join(", "))
                .wanted("one genome, whose genes the vocabulary knows")
                .next(format!("--genome {}", all[0])));
        }
    };
    Ok(Some(Layout { group, version: 2 }))
}

/// An opened 10x HDF5 file.
pub struct TenxH5 {
    matrix: Matrix,
    features: Features,
    obs: Frame,
    place: String,
    version: u8,
}

impl TenxH5 {
    /// Opens the matrix that [`layout`] found.
    ///
    /// # Errors
    /// Input: names that do not fit the matrix, no gene expression in it, values that are no counts (unless allowed), damage.
    pub(super) fn open(file: Arc<dyn H5Source>, layout: Layout, options: &OpenOptions<'_>) -> Result<Self> {
        let source = file.as_ref();
        let Layout { group, version } = layout;
        let (genes, cells) = shape(source, &group)?;
        let matrix = Matrix::open_rows(source, &group, cells, genes)?;
        let texts = |name: &str| -> Result<Option<Vec<String>>> {
            let path = format!("{group}/{name}");
            if source.node(&path)? != Some(Node::Array) {
                return Ok(None);
            }
            let array = source.array(&path)?;
            if !matches!(array.stored(), Stored::FixedText(_) | Stored::HeapText) || array.shape() != [genes]
            {
                return Err(Error::new(Code::NamesUnusable, "the names of the genes cannot be used")
                    .at(array.place())
                    .found(format!("{:?} of shape {:?}", array.stored(), array.shape()))
                    .wanted(format!("{genes} strings, one per gene of the matrix")));
            }
            array.texts(0, genes).map(Some)
        };
        let names = if version == 3 { ["features/id", "features/name"] } else { ["genes", "gene_names"] };
        let place = format!("{}:{group}/{}", source.name(), names[0]);
        let Some(ids) = texts(names[0])? else {
            return Err(Error::new(Code::GeneNamesMissing, "the matrix has no gene ids")
                .at(place)
                .next("write the file again with Cell Ranger"));
        };
        let symbols = texts(names[1])?;
        let (types, genomes) = match version {
            3 => (texts("features/feature_type")?, texts("features/genome")?),
            _ => (None, None),
        };
        let genome = if version == 3 { options.genome } else { None };
        let features = Features::select(ids, symbols, types.as_deref(), genomes.as_deref(), genome, &place)?;
        if !options.allow_non_integer
            && let Some(bad) = matrix.sample_non_count()?
        {
            return Err(no_counts(
                Error::new(Code::NotRawCounts, NO_COUNTS).at(matrix.place()).found(format!("a value {bad}")),
            ));
        }
        let obs = Frame::of_array(&file, &format!("{group}/barcodes"), cells)?;
        Ok(TenxH5 { matrix, features, obs, place, version })
    }
}

fn no_counts(e: Error) -> Error {
    e.wanted("integers from 0 (ranks come from raw counts)")
        .next("take the raw or filtered feature matrix of Cell Ranger, or --allow-non-integer to rank these values as they are")
}

/// Genes and cells, from the array `shape`.
fn shape(source: &dyn H5Source, group: &str) -> Result<(u64, u64)> {
    let path = format!("{group}/shape");
    let wrong = |found: String| {
        Error::new(Code::MatrixShape, "the 10x matrix has no usable shape")
            .at(format!("{}:{path}", source.name()))
            .found(found)
            .wanted("two integers: genes, cells")
    };
    if source.node(&path)? != Some(Node::Array) {
        return Err(wrong(format!("members {}", source.children(group)?.join(", "))));
    }
    let array = source.array(&path)?;
    let (Stored::Number(number), [2]) = (array.stored(), array.shape()) else {
        return Err(wrong(format!("{:?} of shape {:?}", array.stored(), array.shape())));
    };
    let mut values = Vec::new();
    number.decode_i64(&array.rows(0, 2)?, &mut values);
    match values[..] {
        [genes, cells] if genes >= 0 && cells >= 0 => Ok((genes as u64, cells as u64)),
        _ => Err(wrong(format!("{values:?}"))),
    }
}

impl CellSource for TenxH5 {
    fn cells(&self) -> u64 {
        self.matrix.rows()
    }
    fn entries(&self) -> u64 {
        self.matrix.entries()
    }
    fn describe(&self) -> String {
        let left_out = self.features.left_out();
        let left_out = if left_out.is_empty() { String::new() } else { format!("; {left_out}") };
        format!("10x HDF5 version {}, {}{left_out}", self.version, self.matrix.describe())
    }
    fn gene_place(&self) -> &str {
        &self.place
    }
    fn gene_names(&self) -> Result<Vec<NameColumn>> {
        Ok(self.features.names())
    }
    fn obs(&self) -> &Frame {
        &self.obs
    }
    fn for_each_block(&self, pass: &Pass<'_>, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        self.matrix
            .for_each_block(pass, &mut |block| self.features.filter(block, each))
            .map_err(|e| if e.what() == NO_COUNTS { no_counts(e) } else { e })
    }
}
