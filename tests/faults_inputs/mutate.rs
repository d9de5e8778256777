//! Damage with a fixed seed: the `n`-th mutant of some bytes is the same on every machine.
//!
//! Half of what befalls text is done to its words (a number becomes a huge one, a word goes, comes twice or changes places, a
//! value nests five thousand deep), since flipped bits seldom get past a parser. What is packed with gzip is damaged inside as
//! often as outside.

use super::kinds::Kind;
use cellrefine::rng::Philox;
use std::io::{Read, Write};

/// Numbers at the edges of what a field may hold.
const EXTREMES: [u64; 12] = [
    0,
    1,
    u64::MAX,
    u64::MAX - 1,
    1 << 31,
    1 << 63,
    u32::MAX as u64,
    (1 << 31) - 1,
    (1 << 63) - 1,
    1 << 32,
    1 << 40,
    0x7f,
];
/// Words that parse as something that was not meant.
const WORDS: [&str; 34] = [
    "-1",
    "0",
    "1e999",
    "1e-999",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775807",
    "-9223372036854775809",
    "4294967295",
    "4294967296",
    "2147483648",
    "1e18",
    "0.5",
    "-0.0",
    "NaN",
    "nan",
    "Infinity",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "0x10",
    "1_000",
    "..",
    "../../x",
    "/etc/hostname",
    "\"../../x\"",
    "a/b",
    "\"\\ud800\"",
    "\\u0000",
    "inf",
    "99999999999999999999999999",
    "100000000000",
];
/// A line that fills a reader's window.
const LONG_LINE_BYTES: usize = 1 << 20;
/// Far deeper than a parser's stack may follow.
const DEEP: usize = 5_000;

/// Where a file is cut for the test of truncations: at every byte of its first 512 and of its header, at every 4 KiB, at its end.
pub fn cuts(bytes: &[u8]) -> Vec<usize> {
    let header = match bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n)) {
        Some(n) if n < 1 << 16 => n as usize + 8,
        _ => 0,
    };
    let dense = header.max(512).min(bytes.len());
    let mut all: Vec<usize> = (0..dense).chain((dense..bytes.len()).step_by(4096)).collect();
    all.extend(
        [1, 2, 3, 4, 8].into_iter().filter_map(|n| bytes.len().checked_sub(n)).filter(|n| *n >= dense),
    );
    all
}

/// The seed of a kind's mutants.
pub fn seed(kind: &Kind) -> u64 {
    0x5eed ^ kind.name.len() as u64
}

/// The `n`-th mutant of `whole`.
pub fn mutant(whole: &[u8], n: u32, seed: u64) -> Vec<u8> {
    let mut random = Philox::new(seed, n, 0);
    if whole.starts_with(&[0x1f, 0x8b]) && random.below(2) == 0 {
        let mut inside = Vec::new();
        flate2::read::MultiGzDecoder::new(whole).read_to_end(&mut inside).expect("a sound gzip file");
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&damaged(&inside, &mut random)).expect("memory");
        return packed.finish().expect("memory");
    }
    damaged(whole, &mut random)
}

fn damaged(whole: &[u8], random: &mut Philox) -> Vec<u8> {
    let text = std::str::from_utf8(whole).ok().filter(|t| !t.contains('\0'));
    let mut bytes = whole.to_vec();
    // Mostly one wound, sometimes a few.
    let wounds = [1, 1, 1, 1, 2, 3, 5][random.below(7) as usize];
    for _ in 0..wounds {
        bytes = match text {
            Some(_) if random.below(4) > 0 => words(bytes, random),
            _ => raw(bytes, random),
        };
    }
    bytes
}

fn at(bytes: &[u8], random: &mut Philox) -> usize {
    // Headers are where the lengths are.
    let within = if random.below(3) == 0 { bytes.len().min(256) } else { bytes.len() };
    random.below(within.max(1) as u64) as usize
}

/// Damage that knows of no structure.
fn raw(mut bytes: Vec<u8>, random: &mut Philox) -> Vec<u8> {
    if bytes.is_empty() {
        return vec![random.u32() as u8];
    }
    let place = at(&bytes, random);
    let span = |random: &mut Philox, bytes: &[u8]| {
        let start = at(bytes, random);
        let len = 1 + random.below(64.min(bytes.len() - start) as u64) as usize;
        start..start + len
    };
    match random.below(9) {
        0 | 1 => bytes[place] ^= 1 << random.below(8),
        2 => bytes[place] = [0x00, 0xff, 0x80, 0x7f, random.u32() as u8][random.below(5) as usize],
        3 | 4 => {
            // An extreme number at an aligned place, as an offset, a length or a count would stand.
            let width = [2, 4, 8, 8][random.below(4) as usize];
            let start = place / width * width;
            let len = bytes.len() as u64;
            let values = [EXTREMES[random.below(12) as usize], len, len + 1, len.wrapping_sub(1)];
            let value = values[random.below(4) as usize].to_le_bytes();
            let end = (start + width).min(bytes.len());
            let mut value = value[..end - start].to_vec();
            if random.below(4) == 0 {
                value.reverse();
            }
            bytes[start..end].copy_from_slice(&value);
        }
        5 => bytes.truncate(place),
        6 => {
            let part = bytes[span(random, &bytes)].to_vec();
            bytes.splice(place..place, part);
        }
        7 => {
            bytes.drain(span(random, &bytes));
        }
        _ => {
            // Two blocks change places.
            let (a, b) = (span(random, &bytes), span(random, &bytes));
            let len = a.len().min(b.len());
            for i in 0..len {
                bytes.swap(a.start + i, b.start + i);
            }
        }
    }
    bytes
}

/// Ranges of words: runs of what names and numbers are made of.
fn spans(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let word = |b: &u8| b.is_ascii_alphanumeric() || b"._+-".contains(b) || *b >= 0x80;
    let mut all = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let end = start + bytes[start..].iter().take_while(|b| word(b)).count();
        if end > start {
            all.push(start..end);
        }
        start = end + 1;
    }
    all
}

/// Damage to words, lines and brackets.
fn words(mut bytes: Vec<u8>, random: &mut Philox) -> Vec<u8> {
    let all = spans(&bytes);
    if all.is_empty() {
        return raw(bytes, random);
    }
    let one = all[random.below(all.len() as u64) as usize].clone();
    let other = all[random.below(all.len() as u64) as usize].clone();
    let mut ends = 0;
    let lines: Vec<std::ops::Range<usize>> = bytes
        .split_inclusive(|b| *b == b'\n')
        .map(|line| {
            ends += line.len();
            ends - line.len()..ends
        })
        .collect();
    let line = lines[random.below(lines.len() as u64) as usize].clone();
    match random.below(16) {
        0..=4 => {
            // A number becomes another kind of number, a name another name.
            let numbers: Vec<_> =
                all.iter().filter(|s| bytes[s.start].is_ascii_digit() || bytes[s.start] == b'-').collect();
            let target = if numbers.is_empty() || random.below(3) == 0 {
                one
            } else {
                numbers[random.below(numbers.len() as u64) as usize].clone()
            };
            let word = WORDS[random.below(WORDS.len() as u64) as usize];
            bytes.splice(target, word.bytes());
        }
        5 => {
            bytes.drain(one);
        }
        6 => {
            let word = bytes[one.clone()].to_vec();
            bytes.splice(one.end..one.end, word);
        }
        7 => {
            let word = bytes[other].to_vec();
            bytes.splice(one, word);
        }
        8 => {
            bytes.drain(line);
        }
        9 => {
            let copy = bytes[line.clone()].to_vec();
            bytes.splice(line.end..line.end, copy);
        }
        10 => {
            // What stands between words: separators, quotes, brackets.
            let sign = b"\t,:;\"'{}[]()=\n\r# \0"[random.below(18) as usize];
            let place = if random.below(2) == 0 { one.start } else { one.end };
            bytes.insert(place, sign);
        }
        11 => {
            let signs: Vec<usize> =
                (0..bytes.len()).filter(|&i| b"\t,:\"{}[]=\n".contains(&bytes[i])).collect();
            if !signs.is_empty() {
                bytes.remove(signs[random.below(signs.len() as u64) as usize]);
            }
        }
        12 => {
            let (open, close) = [("[", "]"), ("{\"a\":", "}"), ("(", ")")][random.below(3) as usize];
            let closed = if random.below(2) == 0 { close.repeat(DEEP) } else { String::new() };
            bytes.splice(one, format!("{}1{closed}", open.repeat(DEEP)).into_bytes());
        }
        13 => {
            bytes.splice(one, [0xc3, 0x28, 0xff, 0xfe]);
        }
        14 if random.below(8) == 0 => {
            let unit = [&b"x"[..], b"1\t", b"9", b" "][random.below(4) as usize];
            bytes.splice(one, unit.repeat(LONG_LINE_BYTES / unit.len()));
        }
        _ => {
            let again = bytes[line.start..].to_vec();
            bytes.extend(again);
        }
    }
    bytes
}
