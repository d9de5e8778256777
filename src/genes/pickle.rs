//! A reader of pickled dictionaries `{str: int | float | str}`, numpy scalars included, that executes nothing.
//!
//! Unpickling is a stack machine that may call any Python function. Here values live in an arena, the stack and the memo hold
//! indices into it, and the only callables known are the four that rebuild a numpy scalar or an ordered dictionary. Everything
//! else is refused by name. Work and memory are linear in the file's size: a value costs more than its byte in the file, so values
//! are counted, and text that is recalled again and again may not add up to more than a few times the file.

use std::collections::HashMap;

/// Values built at most; a dictionary of numpy scalars takes seven for each of its 60,000 genes.
const MAX_VALUES: usize = 1 << 22;
/// Marks open at a time; dictionaries of scalars nest two.
const MAX_MARKS: usize = 1 << 10;

/// A value of the dictionary.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Text(String),
}

#[derive(Debug, Clone)]
enum Value {
    Scalar(Scalar),
    Bytes(Vec<u8>),
    /// `None`, booleans: allowed in the arguments of a dtype, nowhere else.
    Other,
    Tuple(Vec<usize>),
    Dictionary(Vec<(usize, usize)>),
    Callable(Callable),
    /// kind (`i`, `u`, `f`, `b`), size in bytes, big-endian.
    Dtype(u8, usize, bool),
}

#[derive(Debug, Clone, Copy)]
enum Callable {
    NumpyScalar,
    NumpyDtype,
    Encode,
    OrderedDictionary,
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    arena: Vec<Value>,
    stack: Vec<usize>,
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

type Outcome<T> = Result<T, String>;

/// The entries in file order. Errors say what was met and at which byte.
pub fn read_dictionary(bytes: &[u8]) -> Outcome<Vec<(String, Scalar)>> {
    let mut machine = Machine {
        bytes,
        at: 0,
        arena: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let top = loop {
        let at = machine.at;
        if machine.arena.len().max(machine.memo.len()) > MAX_VALUES {
            return Err(format!("too many values for a dictionary of genes (byte {at})"));
        }
        if machine.marks.len() > MAX_MARKS {
            return Err(format!("{MAX_MARKS} marks are open (byte {at})"));
        }
        match machine.step() {
            Ok(Some(top)) => break top,
            Ok(None) => {}
            Err(e) => return Err(format!("{e} (byte {at})")),
        }
    };
    let Value::Dictionary(items) = &machine.arena[top] else {
        return Err("the pickle holds no dictionary".into());
    };
    let scalar = |index: usize| match &machine.arena[index] {
        Value::Scalar(s) => Ok(s.clone()),
        other => Err(format!("a dictionary entry is no string or number but {}", other.kind())),
    };
    let text = |index: usize| match &machine.arena[index] {
        Value::Scalar(Scalar::Text(text)) => text.len(),
        _ => 0,
    };
    let all: usize = items.iter().map(|&(key, value)| text(key).saturating_add(text(value))).sum();
    if all > 4 * bytes.len() + (1 << 20) {
        return Err(format!("the entries name {all} bytes of text, more text than the file holds"));
    }
    items
        .iter()
        .map(|&(key, value)| match scalar(key)? {
            Scalar::Text(name) => Ok((name, scalar(value)?)),
            other => Err(format!("a key is no string but {other:?}")),
        })
        .collect()
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Scalar(_) => "a scalar",
            Value::Bytes(_) => "bytes",
            Value::Other => "None or a boolean",
            Value::Tuple(_) => "a tuple",
            Value::Dictionary(_) => "a dictionary",
            Value::Callable(_) => "a function",
            Value::Dtype(..) => "a dtype",
        }
    }
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Outcome<&'a [u8]> {
        let end =
            self.at.checked_add(n).filter(|&e| e <= self.bytes.len()).ok_or("the file ends too early")?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }
    fn unsigned(&mut self, n: usize) -> Outcome<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)))
    }
    fn line(&mut self) -> Outcome<&'a str> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or("the file ends too early")?;
        let line = self.take(n + 1)?;
        std::str::from_utf8(&line[..n]).map_err(|_| "a text line is not UTF-8".into())
    }
    fn counted(&mut self, width: usize) -> Outcome<&'a [u8]> {
        let n = self.unsigned(width)?;
        self.take(usize::try_from(n).map_err(|_| "the file ends too early")?)
    }
    fn text(&mut self, width: usize) -> Outcome<Value> {
        let text = std::str::from_utf8(self.counted(width)?).map_err(|_| "a string is not UTF-8")?;
        Ok(Value::Scalar(Scalar::Text(text.to_string())))
    }
    fn push(&mut self, value: Value) {
        self.stack.push(self.arena.len());
        self.arena.push(value);
    }
    fn pop(&mut self) -> Outcome<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".into());
        }
        Ok(self.stack.pop().expect("longer than floor"))
    }
    fn pop_mark(&mut self) -> Outcome<Vec<usize>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }
    fn set_items(&mut self, items: &[usize]) -> Outcome<()> {
        let top = *self.stack.last().ok_or("the stack is empty")?;
        let Value::Dictionary(dictionary) = &mut self.arena[top] else {
            return Err("items are set on something that is no dictionary".into());
        };
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".into());
        }
        dictionary.extend(items.chunks(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }
    fn remember(&mut self, key: u64) -> Outcome<()> {
        let top = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(key, top);
        Ok(())
    }
    fn recall(&mut self, key: u64) -> Outcome<()> {
        let index = *self.memo.get(&key).ok_or("an unknown memo entry")?;
        self.stack.push(index);
        Ok(())
    }
    fn integer_from(bytes: &[u8]) -> Outcome<i64> {
        if bytes.len() > 8 {
            return Err("an integer of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let filled = if negative { -1i64 as u64 } else { 0 };
        Ok(bytes.iter().rev().fold(filled, |v, &b| v << 8 | u64::from(b)) as i64)
    }
    fn global(&mut self, module: &str, name: &str) -> Outcome<()> {
        let callable = match (module, name) {
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Callable::NumpyScalar,
            ("numpy", "dtype") => Callable::NumpyDtype,
            ("_codecs", "encode") => Callable::Encode,
            ("collections", "OrderedDict") => Callable::OrderedDictionary,
            _ => {
                return Err(format!(
                    "the pickle wants to call {module}.{name}, and pickles are not executed here"
                ));
            }
        };
        self.push(Value::Callable(callable));
        Ok(())
    }
    fn text_of(&self, index: usize) -> Outcome<&str> {
        match &self.arena[index] {
            Value::Scalar(Scalar::Text(t)) => Ok(t),
            other => Err(format!("a string was wanted, {} found", other.kind())),
        }
    }

    fn reduce(&mut self) -> Outcome<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        // Numpy's calls have few and short arguments; the bounds keep a hostile file from multiplying its size.
        let arguments = match &self.arena[arguments] {
            Value::Tuple(items) if items.len() <= 4 => items.clone(),
            _ => return Err("a call without a short tuple of arguments".into()),
        };
        let Value::Callable(function) = self.arena[function] else {
            return Err(format!("a call of {}", self.arena[function].kind()));
        };
        let result = match (function, arguments.as_slice()) {
            (Callable::OrderedDictionary, []) => Value::Dictionary(Vec::new()),
            (Callable::NumpyDtype, [name, ..]) => {
                let name = self.text_of(*name)?;
                let (order, code) = match name.as_bytes() {
                    [order @ (b'<' | b'>' | b'='), rest @ ..] => (*order, rest),
                    rest => (b'<', rest),
                };
                match code {
                    [kind @ (b'i' | b'u' | b'f' | b'b'), size @ (b'1' | b'2' | b'4' | b'8')] => {
                        Value::Dtype(*kind, usize::from(size - b'0'), order == b'>')
                    }
                    _ => return Err(format!("numbers of dtype {name:?}")),
                }
            }
            (Callable::Encode, [text, _]) => {
                let text = self
                    .text_of(*text)
                    .and_then(|t| if t.len() <= 64 { Ok(t) } else { Err("long bytes".into()) })?;
                let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c as u32).ok()).collect();
                Value::Bytes(bytes.ok_or("bytes beyond latin-1")?)
            }
            (Callable::NumpyScalar, [dtype, bytes]) => {
                let (Value::Dtype(kind, size, big), Value::Bytes(bytes)) =
                    (&self.arena[*dtype], &self.arena[*bytes])
                else {
                    return Err("a numpy scalar without dtype and bytes".into());
                };
                if bytes.len() != *size {
                    return Err(format!("a numpy scalar of {} bytes with a dtype of {size}", bytes.len()));
                }
                let mut bytes = bytes.clone();
                if *big {
                    bytes.reverse();
                }
                Value::Scalar(numpy_scalar(*kind, &bytes)?)
            }
            _ => return Err("a call with other arguments than numpy writes".into()),
        };
        self.push(result);
        Ok(())
    }

    /// One opcode; the index of the result at STOP.
    fn step(&mut self) -> Outcome<Option<usize>> {
        let opcode = self.take(1)?[0];
        match opcode {
            b'.' => return Ok(Some(self.pop()?)),
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'}' => self.push(Value::Dictionary(Vec::new())),
            b')' => self.push(Value::Tuple(Vec::new())),
            b'K' => self.integer(1, false)?,
            b'M' => self.integer(2, false)?,
            b'J' => self.integer(4, true)?,
            0x8a => {
                let value = Self::integer_from(self.counted(1)?)?;
                self.push(Value::Scalar(Scalar::Int(value)));
            }
            b'I' | b'L' => {
                let line = self.line()?;
                let value =
                    line.trim_end_matches('L').parse().map_err(|_| format!("{line:?} is no integer"))?;
                self.push(Value::Scalar(Scalar::Int(value)));
            }
            b'G' => {
                let bytes = self.take(8)?.try_into().expect("8 bytes");
                self.push(Value::Scalar(Scalar::Float(f64::from_be_bytes(bytes))));
            }
            b'F' => {
                let line = self.line()?;
                let value = line.parse().map_err(|_| format!("{line:?} is no float"))?;
                self.push(Value::Scalar(Scalar::Float(value)));
            }
            b'V' => {
                let line = self.line()?;
                if line.contains('\\') {
                    return Err("escapes in a text-mode string".into());
                }
                self.push(Value::Scalar(Scalar::Text(line.to_string())));
            }
            0x8c => self.push_text(1)?,
            b'X' => self.push_text(4)?,
            0x8d => self.push_text(8)?,
            b'U' => self.push_text(1)?,
            b'C' => self.push_bytes(1)?,
            b'B' => self.push_bytes(4)?,
            0x8e => self.push_bytes(8)?,
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x85..=opcode {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Value::Tuple(items));
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push(Value::Tuple(items));
            }
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Value::Dictionary(Vec::new()));
                self.set_items(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(&items)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'q' => {
                let key = self.unsigned(1)?;
                self.remember(key)?;
            }
            b'r' => {
                let key = self.unsigned(4)?;
                self.remember(key)?;
            }
            b'h' => {
                let key = self.unsigned(1)?;
                self.recall(key)?;
            }
            b'j' => {
                let key = self.unsigned(4)?;
                self.recall(key)?;
            }
            b'p' | b'g' => {
                let line = self.line()?;
                let key = line.parse().map_err(|_| format!("{line:?} is no memo key"))?;
                if opcode == b'p' { self.remember(key)? } else { self.recall(key)? }
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (module, name) = (self.text_of(module)?.to_string(), self.text_of(name)?.to_string());
                self.global(&module, &name)?;
            }
            b'R' => self.reduce()?,
            b'b' => {
                let state = self.pop()?;
                let object = *self.stack.last().ok_or("the stack is empty")?;
                let order = match &self.arena[state] {
                    Value::Tuple(items) => items.get(1).and_then(|&i| self.text_of(i).ok()).map(|o| o == ">"),
                    _ => None,
                };
                match (&mut self.arena[object], order) {
                    (Value::Dtype(_, _, big), Some(order)) => *big = order,
                    _ => return Err("an object that is neither number nor string".into()),
                }
            }
            other => return Err(format!("pickle opcode {other:#04x}, which no dictionary of numbers needs")),
        }
        Ok(None)
    }

    fn integer(&mut self, width: usize, signed: bool) -> Outcome<()> {
        let bytes = self.take(width)?;
        let value = if signed {
            Self::integer_from(bytes)?
        } else {
            bytes.iter().rev().fold(0, |v, &b| v << 8 | i64::from(b))
        };
        self.push(Value::Scalar(Scalar::Int(value)));
        Ok(())
    }
    fn push_text(&mut self, width: usize) -> Outcome<()> {
        let value = self.text(width)?;
        self.push(value);
        Ok(())
    }
    fn push_bytes(&mut self, width: usize) -> Outcome<()> {
        let value = Value::Bytes(self.counted(width)?.to_vec());
        self.push(value);
        Ok(())
    }
}

fn numpy_scalar(kind: u8, little: &[u8]) -> Outcome<Scalar> {
    Ok(match (kind, little.len()) {
        (b'f', 4) => Scalar::Float(f64::from(f32::from_le_bytes(little.try_into().expect("4 bytes")))),
        (b'f', 8) => Scalar::Float(f64::from_le_bytes(little.try_into().expect("8 bytes"))),
        (b'f', 2) => Scalar::Float(f64::from(half::f16::from_le_bytes(little.try_into().expect("2 bytes")))),
        (b'i', _) => Scalar::Int(Machine::integer_from(little)?),
        (b'u', _) => {
            let value = little.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
            Scalar::Int(i64::try_from(value).map_err(|_| "an integer of more than 63 bits")?)
        }
        _ => return Err("a numpy scalar that is no number".into()),
    })
}

#[cfg(test)]
mod tests;
