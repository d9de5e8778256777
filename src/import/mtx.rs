//! 10x MTX folders: `matrix.mtx`, `barcodes.tsv` and `features.tsv` (version 3) or `genes.tsv` (version 2), each gzip or not.
//!
//! Cell Ranger writes entries by cell, so cells stream in order; but nothing in the format says so. A first pass therefore reads
//! every entry: indices in range, as many as the header says, counts that are counts, and in which order. Sorted files then
//! stream with the memory of one block; any other order goes through the disk ([`transpose`]). Genes are rows
//! and cells are columns; the other way round is seen by the lengths of the two name files and read as well. A name in front
//! (`GSM42_matrix.mtx.gz`, as in GEO) is expected in front of all three.

use super::features::Features;
use super::frame::Frame;
use super::matrix::{BLOCK_ROWS, NO_COUNTS, Pass, RowBlock, is_count};
use super::source::{CellSource, OpenOptions};
use super::text_lines::Lines;
use super::transpose;
use crate::error::{Code, Error, Result};
use crate::genes::mapping::NameColumn;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Names of cells or genes add up to this much text at most: 50 million barcodes.
const MAX_NAME_BYTES: usize = 1 << 30;

/// The three files of a matrix.
struct Trio {
    matrix: PathBuf,
    barcodes: PathBuf,
    features: PathBuf,
}

/// Is this a folder with a matrix, or the matrix itself?
pub(super) fn is_mtx(path: &Path) -> bool {
    if path.is_dir() { !matrices(path).is_empty() } else { prefix(path).is_some() }
}

/// The files that make up the input.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let trio = trio(path)?;
    Ok(vec![trio.matrix, trio.barcodes, trio.features])
}

/// What stands in front of `matrix.mtx`.
fn prefix(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_suffix(".gz").unwrap_or(name);
    name.strip_suffix("matrix.mtx").map(str::to_string)
}

fn matrices(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| prefix(p).is_some() && p.is_file()).collect();
    found.sort();
    found
}

fn trio(path: &Path) -> Result<Trio> {
    let matrix = if path.is_dir() {
        let all = matrices(path);
        let names = |all: &[PathBuf]| {
            all.iter().take(12).map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        match all.as_slice() {
            [one] => one.clone(),
            _ => {
                return Err(Error::new(Code::MtxFolder, "the folder does not hold one matrix")
                    .at(path.display())
                    .found(if all.is_empty() { "none".into() } else { names(&all) })
                    .wanted("one matrix.mtx or matrix.mtx.gz")
                    .next("name the file itself: each with its own barcodes and features beside it"));
            }
        }
    } else {
        path.to_path_buf()
    };
    let folder = matrix.parent().unwrap_or(Path::new("")).to_path_buf();
    let prefix = prefix(&matrix).unwrap_or_default();
    let beside = |names: &[&str]| {
        let tried: Vec<String> =
            names.iter().flat_map(|n| [format!("{prefix}{n}.gz"), format!("{prefix}{n}")]).collect();
        tried.iter().map(|n| folder.join(n)).find(|p| p.is_file()).ok_or_else(|| {
            Error::new(Code::MtxFolder, "a file is missing beside the matrix")
                .at(matrix.display())
                .wanted(tried.join(" or "))
                .next("copy all three files into one folder")
        })
    };
    let (barcodes, features) = (beside(&["barcodes.tsv"])?, beside(&["features.tsv", "genes.tsv"])?);
    Ok(Trio { barcodes, features, matrix })
}

/// What the header says.
struct Header {
    rows: u64,
    columns: u64,
    entries: u64,
    integer: bool,
}

/// What the first pass found.
struct Scan {
    /// Entries of each cell.
    cell_entries: Vec<u32>,
    /// Do cells come in ascending order?
    by_cell: bool,
}

/// An opened folder.
pub struct Mtx {
    trio: Trio,
    features: Features,
    feature_place: String,
    obs: Frame,
    header: Header,
    cells: u64,
    /// Cells are rows.
    turned: bool,
    scan: OnceLock<Result<Scan>>,
}

impl Mtx {
    /// Opens a folder, or its matrix.
    ///
    /// # Errors
    /// Input: a file is missing, no MatrixMarket header that 10x would write, names that do not fit the matrix.
    pub(super) fn open(path: &Path, options: &OpenOptions<'_>) -> Result<Mtx> {
        let trio = trio(path)?;
        let feature_place = trio.features.display().to_string();
        let barcodes = column(&trio.barcodes, 1)?.swap_remove(0);
        let mut columns = column(&trio.features, 3)?;
        let types =
            (columns.len() > 2).then(|| columns.swap_remove(2)).filter(|t| t.iter().any(|t| !t.is_empty()));
        let symbols =
            (columns.len() > 1).then(|| columns.swap_remove(1)).filter(|s| s.iter().any(|s| !s.is_empty()));
        let ids = columns.swap_remove(0);
        let header = header(&mut Lines::open(&trio.matrix)?)?;
        let (genes, cells) = (ids.len() as u64, barcodes.len() as u64);
        let turned = match (header.rows, header.columns) {
            shape if shape == (genes, cells) => false,
            shape if shape == (cells, genes) => true,
            (rows, columns) => {
                return Err(Error::new(Code::MtxNames, "the names do not fit the matrix")
                    .at(trio.matrix.display())
                    .found(format!("{rows} × {columns} in the matrix, {genes} features and {cells} barcodes"))
                    .wanted("features × barcodes")
                    .next("one of the three files is of another matrix or cut short: copy all three again"));
            }
        };
        if cells >= u64::from(u32::MAX) || genes >= u64::from(u32::MAX) {
            return Err(Error::new(Code::MatrixShape, "the matrix is too large")
                .at(trio.matrix.display())
                .found(format!("{genes} × {cells}")));
        }
        let features =
            Features::select(ids, symbols, types.as_deref(), None, options.genome, &feature_place)?;
        let obs = Frame::of_names(trio.barcodes.display().to_string(), barcodes);
        Ok(Mtx { trio, features, feature_place, obs, header, cells, turned, scan: OnceLock::new() })
    }

    /// Calls `each(cell, gene, count)` for every entry in file order, checked against the header.
    fn for_each_entry(&self, each: &mut transpose::Put<'_>) -> Result<()> {
        let mut lines = Lines::open(&self.trio.matrix)?;
        header(&mut lines)?;
        let genes = self.features.stored() as u64;
        let mut seen = 0u64;
        while let Some(line) = lines.next_line()? {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let entry = parse(line);
            let text = |lines: &Lines, what: &str, wanted: String| {
                Error::new(Code::MtxForm, what).at(lines.place()).wanted(wanted)
            };
            let Some((row, column, count)) = entry else {
                return Err(text(
                    &lines,
                    "a line of the matrix is no entry",
                    "row, column and count, from 1".into(),
                ));
            };
            let (gene, cell) = if self.turned { (column, row) } else { (row, column) };
            if gene == 0 || cell == 0 || gene > genes || cell > self.cells {
                let wanted = format!("genes 1 to {genes}, cells 1 to {}", self.cells);
                return Err(text(&lines, "an entry lies outside the matrix", wanted)
                    .found(format!("gene {gene}, cell {cell}")));
            }
            if !(count >= 0.0 && count.is_finite()) {
                return Err(text(&lines, "a value cannot be a count", "integers from 0".into()).found(count));
            }
            seen += 1;
            if seen > self.header.entries {
                break;
            }
            each(cell - 1, (gene - 1) as u32, count).map_err(|e| match e.place() {
                Some(_) => e,
                None => e.at(lines.place()),
            })?;
        }
        if seen != self.header.entries {
            let found = if seen > self.header.entries { "more".to_string() } else { seen.to_string() };
            return Err(Error::new(
                Code::MtxForm,
                "the matrix does not have the entries that its header says",
            )
            .at(self.trio.matrix.display())
            .found(found)
            .wanted(self.header.entries)
            .next("the file is cut short or damaged: copy or download it again"));
        }
        Ok(())
    }

    fn scan(&self, pass: &Pass<'_>) -> Result<&Scan> {
        let scan = || {
            let mut cell_entries = vec![0u32; self.cells as usize];
            let (mut by_cell, mut last) = (true, 0);
            self.for_each_entry(&mut |cell, _, count| {
                by_cell &= cell >= last;
                last = cell;
                let entries = &mut cell_entries[cell as usize];
                *entries = entries
                    .checked_add(1)
                    .ok_or_else(|| Error::new(Code::MtxForm, "a cell has too many entries"))?;
                if !pass.allow_non_integer && !is_count(count) {
                    return Err(Error::new(Code::NotRawCounts, NO_COUNTS)
                        .found(count)
                        .wanted("integers from 0 (ranks come from raw counts)")
                        .next(
                            "take the raw counts, or --allow-non-integer to rank these values as they are",
                        ));
                }
                Ok(())
            })?;
            Ok(Scan { cell_entries, by_cell })
        };
        self.scan.get_or_init(scan).as_ref().map_err(Clone::clone)
    }

    fn stream(&self, pass: &Pass<'_>, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        let mut block = RowBlock { first: 0, start: vec![0], ..RowBlock::default() };
        let limit = pass.block_entries() as usize;
        // Ends the open cell, and hands the block on where it is full.
        let mut end_cell = |block: &mut RowBlock, last: bool| -> Result<()> {
            block.start.push(block.column.len());
            if last || block.column.len() >= limit || block.rows() as u64 >= BLOCK_ROWS {
                each(block)?;
                block.first += block.rows() as u64;
                block.start.truncate(1);
                block.column.clear();
                block.count.clear();
            }
            Ok(())
        };
        let mut open = 0;
        self.for_each_entry(&mut |cell, gene, count| {
            while open < cell {
                end_cell(&mut block, false)?;
                open += 1;
            }
            block.column.push(gene);
            block.count.push(count);
            Ok(())
        })?;
        while open < self.cells {
            open += 1;
            end_cell(&mut block, open == self.cells)?;
        }
        Ok(())
    }
}

/// The header: the banner, comments, and the line of sizes.
fn header(lines: &mut Lines) -> Result<Header> {
    let wrong = |lines: &Lines, found: &[u8]| {
        Error::new(Code::MtxForm, "this is not a MatrixMarket file of counts")
            .at(lines.place())
            .found(format!("{:?}", String::from_utf8_lossy(&found[..found.len().min(80)])))
            .wanted("%%MatrixMarket matrix coordinate integer|real general, then rows, columns and entries")
    };
    let banner = lines.next_line()?.unwrap_or_default().to_vec();
    let words = String::from_utf8_lossy(&banner).to_lowercase();
    let integer = match words.split_whitespace().collect::<Vec<_>>()[..] {
        ["%%matrixmarket", "matrix", "coordinate", field @ ("integer" | "real"), "general"] => {
            field == "integer"
        }
        _ => return Err(wrong(lines, &banner)),
    };
    loop {
        let line = lines.next_line()?.map(<[u8]>::to_vec);
        let Some(line) = line else { return Err(wrong(lines, b"")) };
        if line.starts_with(b"%") || line.trim_ascii().is_empty() {
            continue;
        }
        let sizes: Option<Vec<u64>> =
            String::from_utf8_lossy(&line).split_whitespace().map(|n| n.parse().ok()).collect();
        return match sizes.as_deref() {
            Some(&[rows, columns, entries]) => Ok(Header { rows, columns, entries, integer }),
            _ => Err(wrong(lines, &line)),
        };
    }
}

/// `row column value`, separated by blanks.
fn parse(line: &[u8]) -> Option<(u64, u64, f64)> {
    fn whole(bytes: &[u8]) -> Option<u64> {
        if bytes.is_empty() || bytes.len() > 19 {
            return None;
        }
        bytes.iter().try_fold(0u64, |n, b| b.is_ascii_digit().then(|| n * 10 + u64::from(b - b'0')))
    }
    let mut fields = line.split(|b| *b == b' ' || *b == b'\t').filter(|f| !f.is_empty());
    let (row, column, value) = (fields.next()?, fields.next()?, fields.next()?);
    if fields.next().is_some() {
        return None;
    }
    let count = match whole(value) {
        Some(n) => n as f64,
        None => std::str::from_utf8(value).ok()?.parse().ok()?,
    };
    Some((whole(row)?, whole(column)?, count))
}

/// The first `columns` tab-separated columns of a file of names, as many as its first line has.
fn column(path: &Path, columns: usize) -> Result<Vec<Vec<String>>> {
    let mut lines = Lines::open(path)?;
    let mut out: Vec<Vec<String>> = Vec::new();
    let mut bytes = 0;
    while let Some(line) = lines.next_line()? {
        if line.is_empty() {
            continue;
        }
        bytes += line.len();
        let text = std::str::from_utf8(line).map(str::to_string);
        let Ok(text) = text else {
            return Err(Error::new(Code::NotText, "a name is not UTF-8").at(lines.place()));
        };
        if bytes > MAX_NAME_BYTES {
            return Err(Error::new(Code::MtxNames, "too much text for names of cells or genes")
                .at(lines.place())
                .wanted(format!("at most {MAX_NAME_BYTES} bytes")));
        }
        let fields: Vec<&str> = text.split('\t').map(|f| f.trim()).collect();
        if out.is_empty() {
            out.resize(fields.len().min(columns), Vec::new());
        }
        if fields.len() < out.len() {
            return Err(Error::new(Code::MtxNames, "a line has fewer columns than the first")
                .at(lines.place())
                .found(fields.len())
                .wanted(out.len()));
        }
        out.iter_mut().zip(fields).for_each(|(column, field)| column.push(field.to_string()));
    }
    if out.is_empty() {
        return Err(Error::new(Code::MtxNames, "the file of names is empty").at(path.display()));
    }
    Ok(out)
}

impl CellSource for Mtx {
    fn cells(&self) -> u64 {
        self.cells
    }
    fn entries(&self) -> u64 {
        self.header.entries
    }
    fn describe(&self) -> String {
        let field = if self.header.integer { "integer" } else { "real" };
        let left_out = self.features.left_out();
        let left_out = if left_out.is_empty() { String::new() } else { format!("; {left_out}") };
        format!("10x MTX, {field}{left_out}")
    }
    fn gene_place(&self) -> &str {
        &self.feature_place
    }
    fn gene_names(&self) -> Result<Vec<NameColumn>> {
        Ok(self.features.names())
    }
    fn obs(&self) -> &Frame {
        &self.obs
    }
    fn for_each_block(&self, pass: &Pass<'_>, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        let scan = self.scan(pass)?;
        let mut genes = |block: &RowBlock| self.features.filter(block, each);
        if scan.by_cell {
            return self.stream(pass, &mut genes);
        }
        let place = self.trio.matrix.display().to_string();
        transpose::turn(&place, &scan.cell_entries, &|put| self.for_each_entry(put), pass, &mut genes)
    }
}
