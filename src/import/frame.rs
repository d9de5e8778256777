//! Data frames on disk: `obs` and `var`, in AnnData's current and legacy encodings, by row windows.
//!
//! | encoding | where |
//! |---|---|
//! | a group with arrays, `_index` and `column-order` attributes | anndata ≥ 0.7 |
//! | `categorical`, `nullable-integer`, `nullable-boolean`, `nullable-string-array` sub-groups | anndata ≥ 0.8 |
//! | codes as an array, names in `__categories/COL` | anndata 0.7 |
//! | one array of records, names in `uns/COL_categories` | anndata 0.6 |
//!
//! Columns of other formats (text beside a 10x matrix, Arrow files) come through [`ColumnReader`].
//!
//! A column that cannot be read is no error until somebody asks for it. An empty string, code −1, NaN and a mask all mean missing.

use super::column_reader::{ColumnReader, HeldTexts};
use super::frame_cells::{Cells, Place};
use super::hdf5::{Attribute, H5Array, H5Source, Node, NumberKind, NumberType, Stored};
use crate::error::{Code, Error, Result, nearest};
use std::sync::Arc;

/// Rows read at a time when a whole column is wanted.
const WINDOW: u64 = 1 << 16;

/// A frame, opened: names and storage known, values on disk.
pub struct Frame {
    place: String,
    rows: u64,
    index: Column,
    columns: Vec<Column>,
    /// Where the arrays lie; absent where every column has a reader of its own.
    source: Option<Arc<dyn H5Source>>,
}

/// A column of a frame.
pub struct Column {
    /// Its name.
    pub name: String,
    place: String,
    values: Values,
}

enum Values {
    Text(Cells),
    Category { names: Vec<String>, codes: Cells, number: NumberType },
    Number { cells: Cells, number: NumberType },
    Foreign(Box<dyn ColumnReader>),
    Unsupported(String),
}

/// Values of a column over some rows.
#[derive(Debug, Clone, PartialEq)]
pub enum ColumnValues {
    /// Strings, empty = missing.
    Text(Vec<String>),
    /// Indices into [`Column::categories`], −1 = missing.
    Codes(Vec<i32>),
    /// Numbers, NaN = missing.
    Number(Vec<f64>),
}

impl Frame {
    /// Opens the frame at a slot; `rows` is what the matrix says.
    ///
    /// # Errors
    /// Input: no such frame, no index, another number of rows.
    pub fn open(source: &Arc<dyn H5Source>, slot: &str, rows: u64) -> Result<Frame> {
        let place = format!("{}:{slot}", source.name());
        let (index, columns) = match source.node(slot)? {
            None => {
                let found = source.children("/")?.join(", ");
                return Err(Error::new(Code::FrameForm, format!("the file has no {slot}"))
                    .at(source.name())
                    .found(format!("members {found}"))
                    .wanted("an AnnData file with X, obs and var")
                    .next("open it with anndata and write it again with write_h5ad"));
            }
            Some(Node::Array) => open_records(source.as_ref(), slot, rows)?,
            Some(Node::Group) => open_group(source.as_ref(), slot, rows)?,
        };
        if let Values::Unsupported(why) = &index.values {
            return Err(Error::new(Code::FrameForm, format!("the index of {slot} cannot be used"))
                .at(&index.place)
                .found(why)
                .wanted(format!("{rows} names")));
        }
        Ok(Frame { place, rows, index, columns, source: Some(Arc::clone(source)) })
    }

    /// A frame of one array of strings: the index alone.
    ///
    /// # Errors
    /// Input: no such array, no strings, another number of rows.
    pub(super) fn of_array(source: &Arc<dyn H5Source>, path: &str, rows: u64) -> Result<Frame> {
        let array = source.array(path)?;
        let place = array.place().to_string();
        let index = Column::over("index", &place, classify(Cells::array(array), None, rows));
        match &index.values {
            Values::Text(_) => {
                Ok(Frame { place, rows, index, columns: Vec::new(), source: Some(Arc::clone(source)) })
            }
            Values::Unsupported(why) => Err(Error::new(Code::NamesUnusable, "the names cannot be used")
                .at(place)
                .found(why)
                .wanted(format!("{rows} strings"))),
            _ => Err(Error::new(Code::NamesUnusable, "the names are no strings")
                .at(place)
                .wanted(format!("{rows} strings"))),
        }
    }

    /// A frame of names alone.
    pub(super) fn of_names(place: String, names: Vec<String>) -> Frame {
        let rows = names.len() as u64;
        let index = Column::foreign("index", &place, Box::new(HeldTexts(names)));
        Frame { place, rows, index, columns: Vec::new(), source: None }
    }

    /// A frame of columns that have readers of their own.
    pub(super) fn of_readers(place: String, rows: u64, index: Column, columns: Vec<Column>) -> Frame {
        Frame { place, rows, index, columns, source: None }
    }

    /// `file:slot`, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }
    /// The index.
    pub fn index(&self) -> &Column {
        &self.index
    }
    /// All columns but the index, in file order.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }
    /// A column by name.
    ///
    /// # Errors
    /// Input, listing what there is: no such column, or one that cannot be read.
    pub fn column(&self, name: &str) -> Result<&Column> {
        let names = || self.columns.iter().map(|c| c.name.as_str());
        let column = self.columns.iter().find(|c| c.name == name).ok_or_else(|| {
            let hint = nearest(name, names()).map_or(String::new(), |n| format!("; did you mean {n}?"));
            Error::new(Code::ColumnMissing, format!("there is no column {name:?}"))
                .at(&self.place)
                .found(format!("columns {}{hint}", names().collect::<Vec<_>>().join(", ")))
        })?;
        match &column.values {
            Values::Unsupported(why) => {
                Err(Error::new(Code::ColumnUnusable, format!("column {name:?} cannot be used"))
                    .at(&column.place)
                    .found(why))
            }
            _ => Ok(column),
        }
    }

    /// Values of a column over rows `start .. start + rows`.
    pub fn read(&self, column: &Column, start: u64, rows: u64) -> Result<ColumnValues> {
        let rows = rows.min(self.rows - start.min(self.rows));
        let short = |found: usize| {
            Error::new(Code::ColumnDamaged, "the column ends before its declared length")
                .at(&column.place)
                .found(found)
                .wanted(rows)
        };
        let values = match &column.values {
            Values::Text(cells) => {
                let source = self.source.as_deref().ok_or_else(|| Error::bug("an array without its file"))?;
                let mut texts = cells.texts(source, start, rows)?;
                for (text, missing) in texts.iter_mut().zip(cells.missing(start, rows)?) {
                    if missing {
                        text.clear();
                    }
                }
                ColumnValues::Text(texts)
            }
            Values::Category { names, codes, number } => {
                let mut values = Vec::new();
                number.decode_i64(&codes.raw(start, rows)?, &mut values);
                for (value, missing) in values.iter_mut().zip(codes.missing(start, rows)?) {
                    if missing {
                        *value = -1;
                    }
                }
                let bad = values.iter().position(|&v| v < -1 || v >= names.len() as i64);
                if let Some(n) = bad {
                    return Err(Error::new(Code::ColumnDamaged, "a category code is out of range")
                        .at(format!("{}, row {} (from 0)", column.place, start + n as u64))
                        .found(values[n])
                        .wanted(format!("-1 to {} for {} categories", names.len() as i64 - 1, names.len())));
                }
                ColumnValues::Codes(values.into_iter().map(|v| v as i32).collect())
            }
            Values::Number { cells, number } => {
                let mut values = Vec::new();
                number.decode_f64(&cells.raw(start, rows)?, &mut values);
                for (value, missing) in values.iter_mut().zip(cells.missing(start, rows)?) {
                    if missing {
                        *value = f64::NAN;
                    }
                }
                ColumnValues::Number(values)
            }
            Values::Foreign(reader) => reader.read(start, rows)?,
            Values::Unsupported(why) => {
                return Err(Error::new(
                    Code::ColumnUnusable,
                    format!("column {:?} cannot be used", column.name),
                )
                .at(&column.place)
                .found(why));
            }
        };
        let length = match &values {
            ColumnValues::Text(v) => v.len(),
            ColumnValues::Codes(v) => v.len(),
            ColumnValues::Number(v) => v.len(),
        };
        if length as u64 == rows { Ok(values) } else { Err(short(length)) }
    }

    /// A text or categorical column, or the index, as strings over rows `start .. start + rows`; numbers are written out.
    pub fn read_texts(&self, column: &Column, start: u64, rows: u64) -> Result<Vec<String>> {
        Ok(match self.read(column, start, rows)? {
            ColumnValues::Text(texts) => texts,
            ColumnValues::Codes(codes) => {
                let names = column.categories().unwrap_or_default();
                codes
                    .iter()
                    .map(|&c| usize::try_from(c).map_or(String::new(), |c| names[c].clone()))
                    .collect()
            }
            ColumnValues::Number(numbers) => {
                let float = match &column.values {
                    Values::Number { number, .. } => number.kind == NumberKind::Float,
                    Values::Foreign(reader) => reader.is_float(),
                    _ => false,
                };
                numbers.into_iter().map(|v| number_text(v, float)).collect()
            }
        })
    }

    /// The windows in which whole columns are read: (start, rows).
    pub fn windows(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let rows = self.rows;
        (0..rows).step_by(WINDOW as usize).map(move |start| (start, WINDOW.min(rows - start)))
    }

    /// All strings of a column.
    pub fn all_texts(&self, column: &Column) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (start, rows) in self.windows() {
            all.extend(self.read_texts(column, start, rows)?);
        }
        Ok(all)
    }
}

impl Column {
    fn over(name: &str, place: &str, values: Values) -> Column {
        Column { name: name.to_string(), place: place.to_string(), values }
    }
    /// A column with a reader of its own.
    pub(super) fn foreign(name: &str, place: &str, reader: Box<dyn ColumnReader>) -> Column {
        Self::over(name, place, Values::Foreign(reader))
    }
    /// A column that is there and cannot be read.
    pub(super) fn unsupported(name: &str, place: &str, why: String) -> Column {
        Self::over(name, place, Values::Unsupported(why))
    }
    /// Category names, for a categorical or boolean column.
    pub fn categories(&self) -> Option<&[String]> {
        match &self.values {
            Values::Category { names, .. } => Some(names),
            Values::Foreign(reader) => reader.categories(),
            _ => None,
        }
    }
    /// Strings of its own, no codes?
    pub fn is_text(&self) -> bool {
        match &self.values {
            Values::Text(_) => true,
            Values::Foreign(reader) => reader.categories().is_none() && !reader.is_number(),
            _ => false,
        }
    }
    /// Numbers?
    pub fn is_number(&self) -> bool {
        match &self.values {
            Values::Number { .. } => true,
            Values::Foreign(reader) => reader.is_number(),
            _ => false,
        }
    }
    /// Can it be read?
    pub fn is_readable(&self) -> bool {
        !matches!(self.values, Values::Unsupported(_))
    }
    /// `file:slot/column`, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }
}

/// A number as Python prints it, so that categories keep their names.
fn number_text(v: f64, float: bool) -> String {
    match (v.is_nan(), float && v == v.trunc() && v.abs() < 1e16) {
        (true, _) => String::new(),
        (_, true) => format!("{v:.1}"),
        _ => v.to_string(),
    }
}

/// Text, boolean or number, by storage; with names, categorical.
fn classify(cells: Cells, names: Option<Vec<String>>, rows: u64) -> Values {
    if cells.rows() != Some(rows) {
        let found = cells.rows().map_or("more than one dimension".into(), |n| format!("{n} rows"));
        return Values::Unsupported(format!("{found} where the matrix has {rows}"));
    }
    match (cells.stored().clone(), names) {
        (Stored::Number(number), Some(names)) if number.kind != NumberKind::Float => {
            Values::Category { names, codes: cells, number }
        }
        (other, Some(_)) => Values::Unsupported(format!("category codes stored as {other:?}")),
        (Stored::FixedText(_) | Stored::HeapText, None) => Values::Text(cells),
        (Stored::Number(number), None) if number.kind == NumberKind::Bool => {
            Values::Category { names: vec!["False".into(), "True".into()], codes: cells, number }
        }
        (Stored::Number(number), None) => Values::Number { cells, number },
        (other, None) => Values::Unsupported(format!("elements stored as {other:?}")),
    }
}

/// All elements of an array of category names.
fn names(source: &dyn H5Source, path: &str) -> Result<Vec<String>> {
    let path =
        if source.node(path)? == Some(Node::Group) { format!("{path}/values") } else { path.to_string() };
    let array = source.array(&path)?;
    let rows = array.shape().first().copied().unwrap_or(1);
    match array.stored().clone() {
        Stored::FixedText(_) | Stored::HeapText => array.texts(0, rows),
        Stored::Number(number) => {
            let mut values = Vec::new();
            number.decode_f64(&array.rows(0, rows)?, &mut values);
            let text = |v: f64| match number.kind {
                NumberKind::Bool => if v != 0.0 { "True" } else { "False" }.to_string(),
                kind => number_text(v, kind == NumberKind::Float),
            };
            Ok(values.into_iter().map(text).collect())
        }
        other => Err(Error::new(Code::ColumnDamaged, "the category names cannot be read")
            .at(array.place())
            .found(format!("{other:?}"))
            .wanted("strings or numbers")),
    }
}

fn open_group(source: &dyn H5Source, slot: &str, rows: u64) -> Result<(Column, Vec<Column>)> {
    let children = source.children(slot)?;
    let index = match source.attribute(slot, "_index")? {
        Some(Attribute::Text(name)) => name,
        _ => ["_index", "index"]
            .iter()
            .find(|n| children.iter().any(|c| c == *n))
            .map(|n| n.to_string())
            .ok_or_else(|| {
                Error::new(Code::FrameForm, format!("{slot} has no index"))
                    .at(format!("{}:{slot}", source.name()))
                    .found(format!("members {}", children.join(", ")))
                    .wanted("an attribute _index that names the column of row names")
            })?,
    };
    let order = match source.attribute(slot, "column-order")? {
        Some(Attribute::Texts(order)) => order,
        Some(Attribute::Text(one)) => vec![one],
        _ => children.iter().filter(|c| **c != index && *c != "__categories").cloned().collect(),
    };
    let column = |name: &str| -> Result<Column> {
        let path = format!("{slot}/{name}");
        let place = format!("{}:{path}", source.name());
        let values = match source.node(&path)? {
            None => Values::Unsupported("nothing at this path (links are not followed)".into()),
            Some(Node::Array) => {
                let legacy = format!("{slot}/__categories/{name}");
                let names = match source.node(&legacy)? {
                    Some(_) => Some(names(source, &legacy)?),
                    None => None,
                };
                source.array(&path).map_or_else(
                    |e| Values::Unsupported(e.to_string()),
                    |a| classify(Cells::array(a), names, rows),
                )
            }
            Some(Node::Group) => open_encoded(source, &path, rows)?,
        };
        Ok(Column { name: name.to_string(), place, values })
    };
    let columns = order.iter().filter(|n| **n != index).map(|n| column(n)).collect::<Result<_>>()?;
    Ok((column(&index)?, columns))
}

fn open_encoded(source: &dyn H5Source, path: &str, rows: u64) -> Result<Values> {
    let member = |name: &str| {
        let path = format!("{path}/{name}");
        Ok::<_, Error>(if source.node(&path)?.is_some() { Some(path) } else { None })
    };
    if let (Some(codes), Some(categories)) = (member("codes")?, member("categories")?) {
        return Ok(classify(Cells::array(source.array(&codes)?), Some(names(source, &categories)?), rows));
    }
    if let (Some(values), Some(mask)) = (member("values")?, member("mask")?) {
        let mask = source.array(&mask)?;
        let one_byte = matches!(mask.stored(), Stored::Number(t) if t.bytes == 1);
        if !one_byte || mask.shape() != [rows] {
            return Ok(Values::Unsupported("a mask that does not fit".into()));
        }
        let cells = Cells { mask: Some(mask), ..Cells::array(source.array(&values)?) };
        return Ok(classify(cells, None, rows));
    }
    let encoding = match source.attribute(path, "encoding-type")? {
        Some(Attribute::Text(t)) => t,
        _ => "none".into(),
    };
    Ok(Values::Unsupported(format!("encoding-type {encoding}")))
}

fn open_records(source: &dyn H5Source, slot: &str, rows: u64) -> Result<(Column, Vec<Column>)> {
    let array: Arc<dyn H5Array> = Arc::from(source.array(slot)?);
    let place = array.place().to_string();
    let Stored::Record(fields, record) = array.stored().clone() else {
        return Err(Error::new(Code::FrameForm, format!("{slot} is no data frame"))
            .at(&place)
            .found(format!("{:?}", array.stored()))
            .wanted("a group or an array of records"));
    };
    let mut columns = Vec::new();
    for field in fields {
        let path = format!("uns/{}_categories", field.name);
        let integer = matches!(&field.stored, Stored::Number(t) if t.kind != NumberKind::Float);
        let names = match source.node(&path)? {
            Some(Node::Array) if integer => Some(names(source, &path)?),
            _ => None,
        };
        let name = field.name.clone();
        let fits = record > 0
            && field.offset.checked_add(Cells::width(&field.stored)).is_some_and(|end| end <= record);
        let values = if fits {
            classify(
                Cells { place: Place::Field(Arc::clone(&array), field, record), mask: None },
                names,
                rows,
            )
        } else {
            Values::Unsupported("a field outside its record".into())
        };
        columns.push(Column { place: format!("{place}/{name}"), name, values });
    }
    let at = columns.iter().position(|c| c.name == "index" || c.name == "_index").unwrap_or(0);
    if columns.is_empty() {
        return Err(Error::new(Code::FrameForm, format!("{slot} has no fields")).at(&place));
    }
    Ok((columns.remove(at), columns))
}
