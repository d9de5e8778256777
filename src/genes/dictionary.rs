//! Geneformer's dictionaries to a vocabulary: token → id, and gene → non-zero median.
//!
//! Both come as two-column text (tab or comma, with or without column names), as one JSON object, or as a pickle, plain or
//! gzip; which one is told by content. Special tokens and their ids are whatever the dictionary says.

use super::mapping::{SymbolMap, ensembl_id, read_text};
pub use super::pickle::Scalar;
use super::vocab::{Vocab, clip, is_special};
use crate::error::{Code, Error, Result};
use std::collections::HashMap;
use std::path::Path;

/// Dictionaries are a few MB; more is another kind of file.
const LIMIT_BYTES: u64 = 256 << 20;

/// What a conversion did.
#[derive(Debug)]
pub struct Converted {
    /// The vocabulary.
    pub vocab: Vocab,
    /// Lines for people: what was missing or left over.
    pub notes: Vec<String>,
}

/// Builds a vocabulary from a token dictionary, medians and symbols (a TSV of symbol and Ensembl id, or a pickle or JSON of
/// symbol → Ensembl id). Without medians every gene gets 1: ranks by count. A `V.tsv` of ours is taken as it is, so that symbols
/// can be added to it.
///
/// # Errors
/// Input, naming file and line or key: not a dictionary, ids that are not 0..n, a gene without a median, a bad median.
pub fn convert(tokens: &Path, medians: Option<&Path>, symbols: Option<&Path>) -> Result<Converted> {
    let mut notes = Vec::new();
    let mut vocab = if is_our_vocabulary(tokens)? {
        if let Some(medians) = medians {
            return Err(Error::new(Code::FlagConflict, "a vocabulary of ours already has medians")
                .at(tokens.display())
                .found(medians.display()));
        }
        Vocab::load(tokens)?
    } else {
        from_dictionaries(tokens, medians, &mut notes)?
    };
    if let Some(path) = symbols {
        let pairs = symbol_pairs(path)?;
        let with = vocab.attach_symbols(pairs.iter().map(|(id, symbol)| (id.as_str(), symbol.as_str())));
        notes.push(format!("{with} of {} genes have a symbol", vocab.genes()));
    }
    Ok(Converted { vocab, notes })
}

fn from_dictionaries(tokens: &Path, medians: Option<&Path>, notes: &mut Vec<String>) -> Result<Vocab> {
    let name_of_id = token_ids(tokens)?;
    let mut median = vec![0.0; name_of_id.len()];
    let Some(path) = medians else {
        notes.push("no medians given: every gene has median 1, cells are ranked by count".to_string());
        for (m, name) in median.iter_mut().zip(&name_of_id) {
            *m = f64::from(u8::from(!is_special(name)));
        }
        return Vocab::from_parts(name_of_id, median, Vec::new()).map_err(|e| e.at(tokens.display()));
    };
    let mut of_gene: HashMap<String, f64> = HashMap::new();
    for (key, value) in read_pairs(path)? {
        let number = match value {
            Scalar::Int(v) => v as f64,
            Scalar::Float(v) => v,
            Scalar::Text(t) => {
                return Err(Error::new(Code::DictionaryMedians, format!("the median of {key} is no number"))
                    .at(path.display())
                    .found(format!("{t:?}")));
            }
        };
        of_gene.insert(key, number);
    }
    let mut without = Vec::new();
    for (m, name) in median.iter_mut().zip(&name_of_id) {
        if is_special(name) {
            continue;
        }
        match of_gene.remove(name) {
            Some(value) => *m = value,
            None => without.push(name.as_str()),
        }
    }
    if let Some(first) = without.first() {
        return Err(Error::new(
            Code::DictionaryMedians,
            format!("{} of {} genes have no median", without.len(), name_of_id.len()),
        )
        .at(path.display())
        .found(format!("no entry for {first}"))
        .wanted("a median for every gene of the token dictionary")
        .next(
            "give the median dictionary that belongs to the token dictionary (the 95M and 104M files differ)",
        ));
    }
    if !of_gene.is_empty() {
        notes.push(format!("{} medians of genes without a token were left out", of_gene.len()));
    }
    Vocab::from_parts(name_of_id, median, Vec::new()).map_err(|e| {
        let place = e.place().map_or(String::new(), |p| format!(" ({p})"));
        e.at(format!("{}, {}{place}", tokens.display(), path.display()))
    })
}

/// Token names in id order.
fn token_ids(path: &Path) -> Result<Vec<String>> {
    let pairs = read_pairs(path)?;
    let mut name_of_id: Vec<Option<String>> = vec![None; pairs.len()];
    for (name, value) in pairs {
        let Scalar::Int(id) = value else {
            return Err(Error::new(Code::DictionaryIds, format!("the id of {name:?} is no integer"))
                .at(path.display())
                .found(format!("{value:?}"))
                .wanted("token → integer id")
                .next("the order is: vocab convert TOKENS MEDIANS; are the two files swapped?"));
        };
        let count = name_of_id.len();
        let place = usize::try_from(id).ok().and_then(|id| name_of_id.get_mut(id));
        match place {
            None => {
                return Err(Error::new(Code::DictionaryIds, "token ids must be 0, 1, 2, … without gaps")
                    .at(path.display())
                    .found(format!("id {id} of {name:?} among {count} tokens")));
            }
            Some(Some(other)) => {
                return Err(Error::new(Code::DictionaryIds, format!("two tokens have the id {id}"))
                    .at(path.display())
                    .found(format!("{other:?} and {name:?}")));
            }
            Some(free) => *free = Some(name),
        }
    }
    // As many names as places, none twice: every place is taken.
    Ok(name_of_id.into_iter().flatten().collect())
}

/// (Ensembl id, symbol) pairs.
fn symbol_pairs(path: &Path) -> Result<Vec<(String, String)>> {
    let bytes = head(path)?;
    if bytes.first() == Some(&0x80) || bytes.first() == Some(&b'{') {
        let pairs = read_pairs(path)?.into_iter().map(|(key, value)| match value {
            Scalar::Text(text) if ensembl_id(&key).is_some() => Ok((key, text)),
            Scalar::Text(text) => Ok((text, key)),
            other => Err(Error::new(Code::DictionaryForm, format!("{key} does not map to a name"))
                .at(path.display())
                .found(format!("{other:?}"))),
        });
        return pairs.collect();
    }
    let map = SymbolMap::load(path)?;
    Ok(map.pairs().map(|(id, symbol)| (id.to_string(), symbol.to_string())).collect())
}

fn head(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|f| f.take(64).read_to_end(&mut bytes))
        .map_err(|e| Error::io(path, "read the dictionary", &e))?;
    Ok(bytes)
}

fn is_our_vocabulary(path: &Path) -> Result<bool> {
    Ok(head(path)?.starts_with(b"# cellrefine-vocabulary "))
}

/// All entries of a dictionary file, in file order, keys distinct.
///
/// # Errors
/// Input: empty, of no known form, a key twice, or (with the line) a row that is no pair.
pub fn read_pairs(path: &Path) -> Result<Vec<(String, Scalar)>> {
    let size = std::fs::metadata(path).map_err(|e| Error::io(path, "read the dictionary", &e))?;
    if size.is_dir() {
        return Err(
            Error::new(Code::FileKind, "a dictionary file was wanted, this is a folder").at(path.display())
        );
    }
    if size.len() > LIMIT_BYTES {
        return Err(Error::new(Code::FileTooLarge, "too large for a gene dictionary")
            .at(path.display())
            .found(format!("{} bytes", size.len()))
            .wanted(format!("at most {LIMIT_BYTES} bytes")));
    }
    let start = head(path)?;
    let first = start.iter().copied().find(|b| !b.is_ascii_whitespace());
    let looks_pickled =
        start.first() == Some(&0x80) || path.extension().is_some_and(|e| e == "pkl" || e == "pickle");
    let pairs = if first.is_none() {
        return Err(Error::new(Code::DictionaryForm, "the dictionary is empty").at(path.display()));
    } else if looks_pickled {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read the dictionary", &e))?;
        super::pickle::read_dictionary(&bytes).map_err(|e| {
            Error::new(Code::PickleRefused, "this pickle cannot be read").at(path.display()).found(e).wanted("a dictionary of names to numbers").next(
                "convert it where Python is at hand: json.dump({k: v.item() if hasattr(v, 'item') else v for k, v in d.items()}, f)",
            )
        })?
    } else if first == Some(b'{') {
        let text = read_text(path)?;
        parse_json(&text).map_err(|e| {
            Error::new(Code::NotJson, "this JSON cannot be read")
                .at(path.display())
                .found(e)
                .wanted("one object of names to numbers")
        })?
    } else {
        parse_table(&read_text(path)?, path)?
    };
    let mut seen = std::collections::HashSet::with_capacity(pairs.len());
    if let Some((key, _)) = pairs.iter().find(|(key, _)| !seen.insert(key.as_str())) {
        return Err(Error::new(Code::DictionaryForm, format!("{key} occurs twice"))
            .at(path.display())
            .wanted("each name once"));
    }
    if pairs.is_empty() {
        return Err(Error::new(Code::DictionaryForm, "the dictionary has no entries").at(path.display()));
    }
    Ok(pairs)
}

fn parse_table(text: &str, path: &Path) -> Result<Vec<(String, Scalar)>> {
    let mut pairs: Vec<(String, Scalar)> = Vec::new();
    let mut header_possible = true;
    for (n, line) in text.lines().enumerate() {
        let line = line.trim_end_matches('\r');
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let separator = if line.contains('\t') { '\t' } else { ',' };
        let fields: Vec<&str> = line.split(separator).map(str::trim).collect();
        let wrong = || {
            Error::new(Code::DictionaryForm, "a row of the dictionary is no pair")
                .at(format!("{}:{}", path.display(), n + 1))
                .found(format!("{:?}", clip(line, 60)))
                .wanted("two columns: a name and a number")
        };
        let [name, number] = fields[..] else { return Err(wrong()) };
        let value = match (number.parse::<i64>(), number.parse::<f64>()) {
            (Ok(v), _) => Scalar::Int(v),
            (_, Ok(v)) => Scalar::Float(v),
            // Column names, which only the first row can be.
            _ if header_possible => {
                header_possible = false;
                continue;
            }
            _ => return Err(wrong()),
        };
        header_possible = false;
        pairs.push((name.to_string(), value));
    }
    Ok(pairs)
}

/// One flat JSON object. Keys that come twice are kept, so that the caller sees them, and numbers are parsed to the nearest
/// float, which a general JSON reader does not promise: the last bit of a median is part of the vocabulary's digest.
fn parse_json(text: &str) -> std::result::Result<Vec<(String, Scalar)>, String> {
    let mut rest = text.trim_start();
    let byte = |rest: &str| text.len() - rest.len();
    let expect = |rest: &mut &str, wanted: char| match rest.trim_start().strip_prefix(wanted) {
        Some(after) => {
            *rest = after.trim_start();
            Ok(())
        }
        None => Err(format!("{wanted:?} expected at byte {}, {:?} found", byte(rest), clip(rest, 20))),
    };
    let string = |rest: &mut &str| {
        let body =
            rest.strip_prefix('"').ok_or_else(|| format!("a string expected at byte {}", byte(rest)))?;
        let mut escaped = false;
        let closing = |c: char| {
            let closes = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            closes
        };
        let end = 2 + body.find(closing).ok_or("the file ends inside a string")?;
        let (token, after) = rest.split_at(end);
        let value: String = serde_json::from_str(token).map_err(|e| format!("{token}: {e}"))?;
        *rest = after.trim_start();
        Ok::<_, String>(value)
    };
    expect(&mut rest, '{')?;
    let mut pairs = Vec::new();
    while !rest.starts_with('}') {
        if !pairs.is_empty() {
            expect(&mut rest, ',')?;
        }
        let key = string(&mut rest)?;
        expect(&mut rest, ':')?;
        let value = if rest.starts_with('"') {
            Scalar::Text(string(&mut rest)?)
        } else {
            let end = rest.find(|c: char| c == ',' || c == '}' || c.is_whitespace()).unwrap_or(rest.len());
            let (token, after) = rest.split_at(end);
            rest = after.trim_start();
            match (token.parse(), token.parse()) {
                (Ok(v), _) => Scalar::Int(v),
                (_, Ok(v)) => Scalar::Float(v),
                _ => return Err(format!("the value of {key:?} is {}", clip(token, 30))),
            }
        };
        pairs.push((key, value));
    }
    expect(&mut rest, '}')?;
    if rest.is_empty() { Ok(pairs) } else { Err(format!("more after the object, at byte {}", byte(rest))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_numbers_keep_their_last_bit_and_strings_their_escapes() {
        let text = " {\"a\": 1.5317126573973903 , \"\\u00e9\\\"\":-3,\"t\":\"x\\\\\"}\n";
        let pairs = parse_json(text).unwrap();
        assert_eq!(pairs[0], ("a".into(), Scalar::Float("1.5317126573973903".parse().unwrap())));
        assert_eq!(pairs[1], ("é\"".into(), Scalar::Int(-3)));
        assert_eq!(pairs[2], ("t".into(), Scalar::Text("x\\".into())));
        for broken in [
            "",
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1",
            "{\"a\":1,}",
            "{\"a\":1} 2",
            "{\"a\":[1]}",
            "{\"a",
            "{\"a\":1 \"b\":2}",
            "[]",
        ] {
            assert!(parse_json(broken).is_err(), "{broken}");
        }
        assert_eq!(parse_json("{}").unwrap(), []);
    }
}
