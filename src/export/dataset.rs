//! A corpus as Geneformer's tokenised data set: the folder that Hugging Face's `load_from_disk` opens.
//!
//! Cells get the special tokens that the vocabulary has (`<cls>` before, `<eos>` behind), and are cut to what Geneformer's own
//! tokenizer keeps: 4,096 tokens with `<cls>`, 2,048 without. The header says `Sequence`, which every version of `datasets` reads.
//! Columns: `input_ids`, `length`, the corpus's obs columns, `cell_id`, `total_count`; packing the folder again gives the same
//! cells. Record batches of 1,000 cells are written one by one, so memory does not grow with the corpus.

use crate::corpus::{Corpus, ObsKind};
use crate::digest::hex;
use crate::disk::{Output, write_synced};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::import::hf_dataset::VOCABULARY_KEY;
use crate::model::checkpoint::publish;
use arrow_array::builder::{Float32Builder, Float64Builder, Int64Builder, ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::BufWriter;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Cells of a record batch, as `datasets` writes them.
const BATCH_CELLS: usize = 1000;
/// Bytes of tokens in a file, as `datasets` shards.
const FILE_BYTES: u64 = 500_000_000;
/// Columns that are not the corpus's own.
const OWN: [&str; 4] = ["input_ids", "length", "cell_id", "total_count"];

/// What [`export`] wrote.
#[derive(Debug, PartialEq, Eq)]
pub struct Exported {
    /// Cells.
    pub cells: usize,
    /// Token ids, special ones included.
    pub tokens: u64,
    /// Arrow files.
    pub files: usize,
    /// Cells that were cut.
    pub cut: usize,
    /// Tokens kept of each cell, special ones included; 0 = all.
    pub max_tokens: usize,
    /// Columns, in order.
    pub columns: Vec<String>,
}

/// An obs column and its name in the data set.
struct ObsColumn {
    name: String,
    values: ObsValues,
}

enum ObsValues {
    Names { codes: Vec<i32>, categories: Vec<String> },
    Numbers(Vec<f64>),
}

/// Writes `corpus` to `out`, which must not exist. `max_tokens`: of each cell, special ones included; absent = Geneformer's
/// rule, 0 = all. `progress` is called with cells done.
///
/// # Errors
/// Input: a damaged corpus, one without its vocabulary. Usage: `out` exists, `max_tokens` leaves no room for a gene.
pub fn export(
    corpus: &Corpus,
    out: &Path,
    max_tokens: Option<usize>,
    progress: &dyn Fn(u64),
) -> Result<Exported> {
    if out.exists() {
        return Err(Error::new(Code::OutputExists, "the output exists already")
            .at(out.display())
            .next("name another --out, or remove the folder"));
    }
    let vocab = corpus.vocab()?;
    let specials = vocab.specials();
    let around = usize::from(specials.cls.is_some()) + usize::from(specials.eos.is_some());
    let max_tokens = max_tokens.unwrap_or(if specials.cls.is_some() { 4096 } else { 2048 });
    if max_tokens != 0 && max_tokens <= around {
        return Err(Error::new(Code::SettingValue, "--max-tokens leaves no room for a gene")
            .found(max_tokens)
            .wanted(format!("more than the {around} special tokens of a cell")));
    }
    let genes = if max_tokens == 0 { usize::MAX } else { max_tokens - around };
    let obs = columns(corpus)?;
    let schema = Arc::new(schema(&obs, &vocab));
    let files = split(corpus, genes.saturating_add(around));
    let mut exported = Exported {
        cells: corpus.cells(),
        tokens: 0,
        files: files.len(),
        cut: (0..corpus.cells()).filter(|&c| corpus.len_of(c) > genes).count(),
        max_tokens,
        columns: schema.fields().iter().map(|f| f.name().clone()).collect(),
    };
    publish(out, |folder| {
        let names: Vec<String> =
            (0..files.len()).map(|n| format!("data-{n:05}-of-{:05}.arrow", files.len())).collect();
        for (name, cells) in names.iter().zip(&files) {
            let path = folder.join(name);
            let failed = |e: arrow_schema::ArrowError| {
                Error::new(Code::WriteFailed, "cannot write the data set").at(path.display()).found(e)
            };
            let file = Output::create(&path).map_err(|e| Error::io(&path, "write the data set", &e))?;
            let mut writer =
                StreamWriter::try_new(BufWriter::with_capacity(1 << 20, file), &schema).map_err(failed)?;
            let mut start = cells.start;
            while start < cells.end {
                let end = (start + BATCH_CELLS).min(cells.end);
                let batch = batch(
                    corpus,
                    &schema,
                    &obs,
                    start..end,
                    genes,
                    specials.cls,
                    specials.eos,
                    &mut exported.tokens,
                )?;
                writer.write(&batch).map_err(failed)?;
                progress((end - start) as u64);
                start = end;
            }
            writer.finish().map_err(failed)?;
            let file = writer.into_inner().map_err(failed)?.into_inner();
            let file = file.map_err(|e| Error::io(&path, "write the data set", &e.into_error()))?;
            file.sync().map_err(|e| Error::io(&path, "write the data set", &e))?;
        }
        let info = json!({"citation": "", "description": "", "features": features(&schema), "homepage": "", "license": ""});
        write_synced(&folder.join("dataset_info.json"), format!("{info:#}\n").as_bytes())?;
        let fingerprint = Sha256::digest(format!("{} {max_tokens}", corpus.digest()).as_bytes());
        let fingerprint = hex(&fingerprint[..8]);
        let data_files: Vec<Value> = names.iter().map(|n| json!({"filename": n})).collect();
        let state = json!({"_data_files": data_files, "_fingerprint": fingerprint, "_format_columns": null, "_format_kwargs": {},
            "_format_type": null, "_output_all_columns": false, "_split": null});
        write_synced(&folder.join("state.json"), format!("{state:#}\n").as_bytes())
    })?;
    Ok(exported)
}

/// The obs columns of the corpus, held: 4 or 8 bytes per cell each.
fn columns(corpus: &Corpus) -> Result<Vec<ObsColumn>> {
    let one = |column: &crate::corpus::Column| {
        let values = match column.kind {
            ObsKind::Categorical => {
                let c = corpus.categorical(&column.name)?;
                ObsValues::Names { codes: c.codes, categories: c.categories }
            }
            ObsKind::Numeric => ObsValues::Numbers(corpus.numeric(&column.name)?),
        };
        // A column of the corpus makes way for the format's own of that name.
        let taken = OWN.contains(&column.name.as_str());
        let name = if taken { format!("obs_{}", column.name) } else { column.name.clone() };
        Ok(ObsColumn { name, values })
    };
    corpus.manifest().columns.iter().map(one).collect()
}

/// Cells of each file.
fn split(corpus: &Corpus, most: usize) -> Vec<Range<usize>> {
    let mut files = Vec::new();
    let (mut start, mut bytes) = (0, 0u64);
    for cell in 0..corpus.cells() {
        bytes += 8 * corpus.len_of(cell).min(most) as u64;
        if bytes >= FILE_BYTES {
            files.push(start..cell + 1);
            (start, bytes) = (cell + 1, 0);
        }
    }
    if start < corpus.cells() || files.is_empty() {
        files.push(start..corpus.cells());
    }
    files
}

fn schema(obs: &[ObsColumn], vocab: &Vocab) -> Schema {
    let item = Arc::new(Field::new("item", DataType::Int64, true));
    let mut fields = vec![
        Field::new("input_ids", DataType::List(item), true),
        Field::new("length", DataType::Int64, true),
    ];
    fields.extend(obs.iter().map(|c| match c.values {
        ObsValues::Names { .. } => Field::new(&c.name, DataType::Utf8, true),
        ObsValues::Numbers(_) => Field::new(&c.name, DataType::Float64, true),
    }));
    fields.push(Field::new("cell_id", DataType::Utf8, true));
    fields.push(Field::new("total_count", DataType::Float32, true));
    let schema = Schema::new(fields);
    let hugging_face = json!({"info": {"features": features(&schema)}}).to_string();
    schema.with_metadata(HashMap::from([
        ("huggingface".to_string(), hugging_face),
        (VOCABULARY_KEY.to_string(), vocab.digest().to_string()),
    ]))
}

/// The features in the words of `datasets`.
fn features(schema: &Schema) -> Value {
    let value = |dtype: &str| json!({"dtype": dtype, "_type": "Value"});
    let feature = |t: &DataType| match t {
        DataType::List(_) => json!({"feature": value("int64"), "_type": "Sequence"}),
        DataType::Int64 => value("int64"),
        DataType::Float32 => value("float32"),
        DataType::Float64 => value("float64"),
        _ => value("string"),
    };
    let features: Map<String, Value> =
        schema.fields().iter().map(|f| (f.name().clone(), feature(f.data_type()))).collect();
    Value::Object(features)
}

#[allow(clippy::too_many_arguments)] // one batch has no other state
fn batch(
    corpus: &Corpus,
    schema: &Arc<Schema>,
    obs: &[ObsColumn],
    cells: Range<usize>,
    genes: usize,
    cls: Option<u32>,
    eos: Option<u32>,
    tokens: &mut u64,
) -> Result<RecordBatch> {
    let mut input_ids = ListBuilder::new(Int64Builder::new());
    let mut length = Int64Builder::new();
    let (mut cell_id, mut total_count) = (StringBuilder::new(), Float32Builder::new());
    for cell in cells.clone() {
        let ids = corpus.genes(cell)?;
        let kept = ids.len().min(genes);
        let mut written = 0;
        let values = input_ids.values();
        for id in cls.into_iter().chain(ids.iter().take(kept)).chain(eos) {
            values.append_value(i64::from(id));
            written += 1;
        }
        input_ids.append(true);
        length.append_value(written);
        *tokens += written as u64;
        cell_id.append_value(corpus.cell_id(cell)?);
        total_count.append_value(corpus.total_count(cell)?);
    }
    let mut arrays: Vec<ArrayRef> = vec![Arc::new(input_ids.finish()), Arc::new(length.finish())];
    for column in obs {
        arrays.push(match &column.values {
            ObsValues::Names { codes, categories } => {
                let mut names = StringBuilder::new();
                for &code in &codes[cells.clone()] {
                    names.append_option(usize::try_from(code).ok().map(|c| categories[c].as_str()));
                }
                Arc::new(names.finish())
            }
            ObsValues::Numbers(numbers) => {
                let mut values = Float64Builder::new();
                numbers[cells.clone()].iter().for_each(|x| values.append_option((!x.is_nan()).then_some(*x)));
                Arc::new(values.finish())
            }
        });
    }
    arrays.push(Arc::new(cell_id.finish()));
    arrays.push(Arc::new(total_count.finish()));
    RecordBatch::try_new(Arc::clone(schema), arrays).map_err(|e| Error::bug(format!("a record batch: {e}")))
}
