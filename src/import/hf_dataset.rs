//! Geneformer's tokenised data sets: a folder that Hugging Face's `Dataset.save_to_disk` wrote.
//!
//! `state.json` names the Arrow streams, `dataset_info.json` (or the streams' own metadata) the features. Headers with `Sequence`
//! (datasets before 4) and with `List` describe the same arrays. Tokens are taken as they are: `<cls>`, `<eos>` and `<pad>` are
//! left out, as a corpus stores none. Columns of strings, numbers, booleans and class labels become obs columns.
//!
//! | column | becomes |
//! |---|---|
//! | `input_ids` | the tokens of the cell |
//! | `length` | checked against the number of tokens |
//! | `cell_id`, else `cell_name`, `barcode`, `obs_names`, `index`, `__index_level_0__` | the cell's name; without one, its row |
//! | `total_count`, else `n_counts` | the cell's total count; without one, 0 |
//!
//! Nothing outside the folder is ever opened: names with a path in them and links that lead out are refused.

use super::arrow_stream::{ArrowColumn, ArrowFile, Storage};
use super::column_reader::ColumnReader;
use super::frame::{Column, ColumnValues, Frame};
use super::matrix::{BLOCK_ROWS, Pass};
use crate::error::{Code, Error, Result};
use crate::genes::vocab::{Vocab, clip};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names of columns that hold a cell's name, best first.
const NAME_COLUMNS: [&str; 6] =
    ["cell_id", "cell_name", "barcode", "obs_names", "index", "__index_level_0__"];
const STATE: &str = "state.json";
const INFO: &str = "dataset_info.json";
/// `state.json` and `dataset_info.json` at most.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Key of the schema's metadata under which our own export names the vocabulary.
pub(crate) const VOCABULARY_KEY: &str = "cellrefine.vocabulary";

/// Is this such a folder?
pub(super) fn is_dataset(path: &Path) -> bool {
    path.is_dir() && (path.join(STATE).is_file() || path.join(INFO).is_file())
}

/// The Arrow files, in order.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let state = path.join(STATE);
    let json = json(&state)?;
    let wrong = |found: String| {
        Error::new(Code::DatasetFolder, "the data set does not list its files")
            .at(state.display())
            .found(found)
            .wanted(
                "\"_data_files\": [{\"filename\": \"data-00000-of-00001.arrow\"}], as save_to_disk writes it",
            )
    };
    let entries = json["_data_files"].as_array().ok_or_else(|| wrong(clip(&json.to_string(), 80)))?;
    let folder = path.canonicalize().map_err(|e| Error::io(path, "open the folder", &e))?;
    let mut files = Vec::new();
    for entry in entries {
        let name = entry["filename"].as_str().ok_or_else(|| wrong(clip(&entry.to_string(), 80)))?;
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
        if !plain {
            return Err(Error::new(Code::NameLeadsOut, "a data file's name leads out of the folder")
                .at(state.display())
                .found(format!("{:?}", clip(name, 80)))
                .wanted("the name of a file in the folder"));
        }
        let file = folder.join(name);
        let true_place = file.canonicalize().map_err(|e| {
            Error::io(&file, "open a file of the data set", &e).wanted("every file that state.json names")
        })?;
        if files.contains(&file) {
            return Err(Error::new(Code::DatasetFolder, "the data set names a file twice")
                .at(state.display())
                .found(format!("{:?}", clip(name, 80)))
                .wanted("each file once")
                .next("save the data set again with save_to_disk"));
        }
        if true_place.parent() != Some(&folder) {
            return Err(Error::new(Code::NameLeadsOut, "a data file is a link that leads out of the folder")
                .at(file.display())
                .found(true_place.display())
                .next("copy the data set with its files: cp -rL FOLDER COPY"));
        }
        files.push(file);
    }
    Ok(files)
}

fn json(path: &Path) -> Result<Value> {
    let fail = |e: std::io::Error| {
        Error::io(path, "read the data set's description", &e).wanted("a folder that save_to_disk wrote")
    };
    let bytes = std::fs::metadata(path).map_err(fail)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(Error::new(Code::FileTooLarge, "the data set's description is too large")
            .at(path.display())
            .found(format!("{bytes} bytes"))
            .wanted(format!("at most {MAX_JSON_BYTES}")));
    }
    let text = std::fs::read(path).map_err(fail)?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::new(Code::NotJson, "the data set's description is not valid JSON")
            .at(path.display())
            .found(e)
            .next("copy the folder again, or save it again with save_to_disk")
    })
}

/// The rows of all files, one after the other.
struct Files {
    files: Vec<ArrowFile>,
    /// First row of each file, and the number of rows at the end.
    first_row: Vec<u64>,
}

impl Files {
    fn rows(&self) -> u64 {
        self.first_row[self.files.len()]
    }
    fn column(&self, name: &str) -> Option<(usize, &ArrowColumn)> {
        self.files[0].columns().iter().enumerate().find(|(_, c)| c.name == name)
    }
    /// `read(file, start, rows)` over every file that rows `start .. start + rows` touch.
    fn each<T>(
        &self,
        start: u64,
        rows: u64,
        read: impl Fn(&ArrowFile, u64, u64) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let end = (start + rows).min(self.rows());
        let mut out = Vec::new();
        for (n, file) in self.files.iter().enumerate() {
            let (first, last) = (self.first_row[n], self.first_row[n + 1]);
            let (from, to) = (start.max(first), end.min(last));
            if from < to {
                out.extend(read(file, from - first, to - from)?);
            }
        }
        Ok(out)
    }
    fn numbers(&self, column: usize, start: u64, rows: u64) -> Result<Vec<f64>> {
        self.each(start, rows, |file, start, rows| file.numbers(column, start, rows))
    }
    fn texts(&self, column: usize, start: u64, rows: u64) -> Result<Vec<String>> {
        self.each(start, rows, |file, start, rows| file.texts(column, start, rows))
    }
}

/// A column of the files as a column of a frame.
struct Reader {
    files: Arc<Files>,
    column: usize,
    kind: Kind,
}

enum Kind {
    Text,
    Number { float: bool },
    Codes(Vec<String>),
}

impl ColumnReader for Reader {
    fn read(&self, start: u64, rows: u64) -> Result<ColumnValues> {
        Ok(match &self.kind {
            Kind::Text => ColumnValues::Text(self.files.texts(self.column, start, rows)?),
            Kind::Number { .. } => ColumnValues::Number(self.files.numbers(self.column, start, rows)?),
            Kind::Codes(names) => {
                let numbers = self.files.numbers(self.column, start, rows)?;
                let code = |(n, v): (usize, f64)| match v {
                    v if v.is_nan() || v == -1.0 => Ok(-1),
                    v if v >= 0.0 && v < names.len() as f64 => Ok(v as i32),
                    v => Err(Error::new(Code::ColumnDamaged, "a class label is out of range")
                        .at(format!(
                            "{}, row {} (from 0)",
                            self.files.files[0].path().display(),
                            start + n as u64
                        ))
                        .found(v)
                        .wanted(format!("-1 to {}", names.len() as i64 - 1))),
                };
                ColumnValues::Codes(numbers.into_iter().enumerate().map(code).collect::<Result<_>>()?)
            }
        })
    }
    fn categories(&self) -> Option<&[String]> {
        match &self.kind {
            Kind::Codes(names) => Some(names),
            _ => None,
        }
    }
    fn is_number(&self) -> bool {
        matches!(self.kind, Kind::Number { .. })
    }
    fn is_float(&self) -> bool {
        matches!(self.kind, Kind::Number { float: true })
    }
}

/// Names of cells that have none: their row, from 0.
struct RowNumbers;

impl ColumnReader for RowNumbers {
    fn read(&self, start: u64, rows: u64) -> Result<ColumnValues> {
        Ok(ColumnValues::Text((start..start + rows).map(|row| row.to_string()).collect()))
    }
}

/// Consecutive cells, ranked before.
pub struct TokenBlock {
    /// Index of the first cell.
    pub first: u64,
    /// Gene ids of all cells, special tokens left out.
    pub gene: Vec<u32>,
    /// End of each cell in `gene`.
    pub end: Vec<usize>,
    /// Total count of each cell, 0 where the file has none.
    pub total: Vec<f32>,
}

/// An opened data set.
pub struct HfDataset {
    path: PathBuf,
    files: Arc<Files>,
    tokens: usize,
    length: Option<usize>,
    total: Option<usize>,
    obs: Frame,
}

impl HfDataset {
    /// Opens a folder and every file of it.
    ///
    /// # Errors
    /// Input: no such folder, a file outside it, files of different columns, no `input_ids` of integers, damage.
    pub fn open(path: &Path) -> Result<HfDataset> {
        let mut opened = Vec::new();
        for file in files(path)? {
            opened.push(ArrowFile::open(&file)?);
        }
        let Some(first) = opened.first() else {
            return Err(
                Error::new(Code::DatasetFolder, "the data set has no files").at(path.join(STATE).display())
            );
        };
        let shape = |f: &ArrowFile| {
            f.columns().iter().map(|c| (c.name.clone(), c.storage.clone())).collect::<Vec<_>>()
        };
        if let Some(other) = opened.iter().find(|f| shape(f) != shape(first)) {
            let names = |f: &ArrowFile| {
                shape(f).into_iter().map(|(n, s)| format!("{n} {s:?}")).collect::<Vec<_>>().join(", ")
            };
            return Err(Error::new(Code::DatasetFolder, "the files of the data set have different columns")
                .at(other.path().display())
                .found(clip(&names(other), 400))
                .wanted(clip(&names(first), 400)));
        }
        let info = match path.join(INFO) {
            info if info.is_file() => json(&info)?,
            // Old versions leave the file out; the streams carry the same object.
            _ => first
                .metadata("huggingface")
                .and_then(|t| serde_json::from_str::<Value>(t).ok())
                .map_or(Value::Null, |v| v["info"].clone()),
        };
        let mut first_row = vec![0];
        for file in &opened {
            first_row.push(first_row[first_row.len() - 1] + file.rows());
        }
        let files = Arc::new(Files { files: opened, first_row });
        let tokens = match files.column("input_ids") {
            Some((at, ArrowColumn { storage: Storage::List { item, .. }, .. }))
                if item.kind != super::hdf5::NumberKind::Float =>
            {
                at
            }
            other => {
                let names =
                    files.files[0].columns().iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
                let found = other.map_or(format!("columns {names}"), |(_, c)| format!("{:?}", c.storage));
                return Err(Error::new(Code::DatasetFolder, "the data set has no lists of token ids")
                    .at(path.display())
                    .found(clip(&found, 400))
                    .wanted("a column input_ids of lists of integers, as Geneformer's tokenizer writes it"));
            }
        };
        let number = |name: &str| {
            files.column(name).filter(|(_, c)| matches!(c.storage, Storage::Number(_))).map(|(at, _)| at)
        };
        let (length, total) = (number("length"), number("total_count").or_else(|| number("n_counts")));
        let obs = frame(path, &files, &info);
        Ok(HfDataset { path: path.to_path_buf(), tokens, length, total, obs, files })
    }

    /// Cells.
    pub fn cells(&self) -> u64 {
        self.files.rows()
    }
    /// Cell names and annotations.
    pub fn obs(&self) -> &Frame {
        &self.obs
    }
    /// What the cells come from, for notes.
    pub fn describe(&self) -> String {
        let n = self.files.files.len();
        format!("tokenised data set, {n} Arrow file{}", if n == 1 { "" } else { "s" })
    }

    /// Refuses a data set that says itself that its ids belong to another vocabulary; most say nothing.
    pub fn check_vocabulary(&self, vocab: &Vocab) -> Result<()> {
        match self.files.files[0].metadata(VOCABULARY_KEY) {
            Some(digest) if digest != vocab.digest() => Err(Error::new(
                Code::VocabularyMismatch,
                "the data set's token ids belong to another vocabulary",
            )
            .at(self.path.display())
            .found(format!("vocabulary {digest}"))
            .wanted(format!("{}, as given with --vocab", vocab.digest()))
            .next("give the vocabulary that the data set was made with")),
            _ => Ok(()),
        }
    }

    /// All cells in order; `max_tokens` = 0 keeps all tokens.
    ///
    /// # Errors
    /// Input, naming the row: an id that the vocabulary does not have, a masked gene, a `length` that is another; and whatever
    /// `each` returns.
    pub fn for_each_block(
        &self,
        vocab: &Vocab,
        max_tokens: usize,
        pass: &Pass<'_>,
        each: &mut dyn FnMut(&TokenBlock) -> Result<()>,
    ) -> Result<()> {
        let special: Vec<bool> = (0..vocab.len() as u32).map(|id| vocab.is_special(id)).collect();
        let mask = i64::from(vocab.specials().mask);
        let keep = if max_tokens == 0 { usize::MAX } else { max_tokens };
        let limit = pass.block_entries();
        let mut ids = Vec::new();
        for (n, file) in self.files.files.iter().enumerate() {
            let mut row = self.files.first_row[n];
            for window in file.list_windows(self.tokens, BLOCK_ROWS) {
                let window = window?;
                let rows = window.offsets.len() - 1;
                let mut from = 0;
                while from < rows {
                    let mut to = from + 1;
                    while to < rows && window.offsets[to + 1] - window.offsets[from] <= limit {
                        to += 1;
                    }
                    ids.clear();
                    file.elements(&window, from, to, &mut ids)?;
                    let lengths =
                        self.length.map(|c| self.files.numbers(c, row, (to - from) as u64)).transpose()?;
                    let mut block = TokenBlock {
                        first: row,
                        gene: Vec::with_capacity(ids.len()),
                        end: Vec::with_capacity(to - from),
                        total: match self.total {
                            Some(c) => self
                                .files
                                .numbers(c, row, (to - from) as u64)?
                                .into_iter()
                                .map(total)
                                .collect(),
                            None => vec![0.0; to - from],
                        },
                    };
                    for (cell, span) in window.offsets[from..=to].windows(2).enumerate() {
                        let base = window.offsets[from];
                        let tokens = &ids[(span[0] - base) as usize..(span[1] - base) as usize];
                        let place = || format!("{}, row {} (from 0)", self.path.display(), row + cell as u64);
                        if let Some(&length) = lengths.as_ref().and_then(|l| l.get(cell))
                            && length != tokens.len() as f64
                        {
                            return Err(Error::new(
                                Code::DatasetTokens,
                                "a cell's length is not the number of its tokens",
                            )
                            .at(place())
                            .found(format!("length {length}, {} tokens", tokens.len()))
                            .next("was input_ids changed after tokenising? write length again"));
                        }
                        let start = block.gene.len();
                        for &id in tokens {
                            match usize::try_from(id).ok().and_then(|id| special.get(id)) {
                                Some(false) if block.gene.len() - start < keep => block.gene.push(id as u32),
                                Some(true) if id == mask => {
                                    return Err(Error::new(
                                        Code::DatasetTokens,
                                        "a cell holds a masked gene",
                                    )
                                    .at(place())
                                    .found(format!("token id {id}, <mask>"))
                                    .wanted("cells as they were tokenised, not a training batch"));
                                }
                                Some(_) => {}
                                None => {
                                    return Err(Error::new(Code::DatasetTokens, "a token id is not in the vocabulary")
                                        .at(place())
                                        .found(id)
                                        .wanted(format!("ids from 0 to {}", vocab.len() - 1))
                                        .next("give the vocabulary that the data set was made with: vocab convert token_dictionary.pkl …"));
                                }
                            }
                        }
                        block.end.push(block.gene.len());
                    }
                    each(&block)?;
                    row += (to - from) as u64;
                    from = to;
                }
            }
        }
        Ok(())
    }
}

/// A total that a corpus can hold; a missing or broken one is 0.
fn total(v: f64) -> f32 {
    let v = v as f32;
    if v.is_finite() && v >= 0.0 { v } else { 0.0 }
}

/// Names and annotations of the cells.
fn frame(path: &Path, files: &Arc<Files>, info: &Value) -> Frame {
    let place = path.display().to_string();
    let reader = |column: usize, kind: Kind| Box::new(Reader { files: Arc::clone(files), column, kind });
    let index = NAME_COLUMNS
        .iter()
        .find_map(|name| files.column(name).filter(|(_, c)| matches!(c.storage, Storage::Text { .. })));
    let mut columns = Vec::new();
    for (at, column) in files.files[0].columns().iter().enumerate() {
        let name = column.name.as_str();
        if ["input_ids", "length", "total_count"].contains(&name) || index.is_some_and(|(i, _)| i == at) {
            continue;
        }
        let place = format!("{place}:{name}");
        let labels = info["features"][name]["names"].as_array();
        let labels: Option<Vec<String>> =
            labels.and_then(|l| l.iter().map(|n| n.as_str().map(str::to_string)).collect());
        let kind = match (&column.storage, labels) {
            (Storage::Text { .. }, _) => Kind::Text,
            (Storage::Number(t), Some(names)) if t.kind != super::hdf5::NumberKind::Float => {
                Kind::Codes(names)
            }
            (Storage::Number(t), _) => Kind::Number { float: t.kind == super::hdf5::NumberKind::Float },
            (Storage::Bool, _) => Kind::Codes(vec!["False".into(), "True".into()]),
            (other, _) => {
                let why = match other {
                    Storage::Other(what) => what.clone(),
                    _ => "a list for each cell".into(),
                };
                columns.push(Column::unsupported(name, &place, why));
                continue;
            }
        };
        columns.push(Column::foreign(name, &place, reader(at, kind)));
    }
    let index = match index {
        Some((at, c)) => Column::foreign(&c.name, &format!("{place}:{}", c.name), reader(at, Kind::Text)),
        None => Column::foreign("row", &place, Box::new(RowNumbers)),
    };
    Frame::of_readers(place, files.rows(), index, columns)
}
