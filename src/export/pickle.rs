//! `{str: int}` and `{str: float}` as a pickle of protocol 2, which every Python 3 reads: Geneformer's own form of dictionaries.

/// A value of the dictionary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// An integer.
    Int(u32),
    /// A float.
    Float(f64),
}

/// Entries set at a time, as Python's own pickler does: its reader holds that many on its stack.
const BATCH: usize = 1000;

/// The pickle of a dictionary with these entries, in this order.
pub fn dictionary<'a>(entries: impl IntoIterator<Item = (&'a str, Number)>) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}'];
    let mut open = 0;
    for (name, value) in entries {
        if open == 0 {
            out.push(b'(');
        }
        out.push(b'X');
        out.extend((name.len() as u32).to_le_bytes());
        out.extend(name.as_bytes());
        match value {
            Number::Int(v) if v <= i32::MAX as u32 => {
                out.push(b'J');
                out.extend(v.to_le_bytes());
            }
            Number::Int(v) => {
                // LONG1: five bytes, so that the sign bit stays clear.
                out.extend([0x8a, 5]);
                out.extend(v.to_le_bytes());
                out.push(0);
            }
            Number::Float(v) => {
                out.push(b'G');
                out.extend(v.to_be_bytes());
            }
        }
        open += 1;
        if open == BATCH {
            out.push(b'u');
            open = 0;
        }
    }
    if open > 0 {
        out.push(b'u');
    }
    out.push(b'.');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::genes::dictionary::{Scalar, read_pairs};

    #[test]
    fn what_is_written_reads_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.pkl");
        let names: Vec<String> = (0..2500).map(|n| format!("gene {n} é")).collect();
        let value = |n: usize| match n % 3 {
            0 => Number::Int(n as u32),
            1 => Number::Int(u32::MAX - n as u32),
            _ => Number::Float(1.0 / n as f64),
        };
        std::fs::write(&path, dictionary(names.iter().enumerate().map(|(n, s)| (s.as_str(), value(n)))))
            .unwrap();
        let read = read_pairs(&path).unwrap();
        assert_eq!(read.len(), names.len());
        for (n, (name, scalar)) in read.into_iter().enumerate() {
            assert_eq!(name, names[n]);
            let wanted = match value(n) {
                Number::Int(v) => Scalar::Int(i64::from(v)),
                Number::Float(v) => Scalar::Float(v),
            };
            assert_eq!(scalar, wanted);
        }
        std::fs::write(&path, dictionary([])).unwrap();
        assert!(read_pairs(&path).unwrap_err().to_string().contains("no entries"));
    }
}
