//! Tokens of each cell of a benchmark: one length for all, a file, a corpus, or a log-normal mixture.
//!
//! The mixture stands for a corpus where none is at hand: lengths of a log-normal distribution with a median and a σ, clipped to
//! [20, context]. Blood cells of 10x have a median near 900 and σ .35 to .45; the 104-million-cell corpus of Geneformer V2 has a
//! mean of 1,442, which σ .6 reaches at a median of 1,204.

use crate::corpus::Corpus;
use crate::error::{Code, Error, Result};
use crate::model::Preset;
use crate::rng::{Philox, site};
use crate::whole_file;
use std::path::Path;

/// Ten million cells.
const MAX_BYTES: u64 = 64 << 20;

/// Shortest cell of a mixture.
const SHORTEST: usize = 20;

/// A log-normal mixture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogNormal {
    /// Tokens.
    pub median: f64,
    /// Of the logarithm.
    pub sigma: f64,
}

impl LogNormal {
    /// What a preset meets: blood cells, or the corpus of V2.
    pub fn of(preset: &Preset) -> Self {
        match preset.positions > 2048 {
            true => LogNormal { median: 1204.0, sigma: 0.6 },
            false => LogNormal { median: 900.0_f64.min(preset.positions as f64 / 2.0), sigma: 0.45 },
        }
    }

    /// `900,0.45`.
    ///
    /// # Errors
    /// Usage: not two positive numbers.
    pub fn parse(text: &str) -> Result<Self> {
        let numbers: Vec<f64> = text.split(',').filter_map(|n| n.trim().parse().ok()).collect();
        match numbers[..] {
            [median, sigma] if median >= 1.0 && (0.0..=3.0).contains(&sigma) => {
                Ok(LogNormal { median, sigma })
            }
            _ => Err(Error::new(Code::BenchCase, "no such mixture")
                .at("--lengths lognormal:MEDIAN,SIGMA")
                .found(text)
                .wanted("such as lognormal:900,0.45")),
        }
    }

    /// Cells of together about `tokens` tokens, none longer than `context`.
    pub fn draw(self, tokens: usize, context: usize, seed: u64) -> Vec<usize> {
        let mut random = Philox::new(seed, 2, site::BENCH);
        fill(tokens, || {
            let len = (self.median.ln() + self.sigma * random.normal()).exp() as usize;
            len.clamp(SHORTEST.min(context), context)
        })
    }
}

/// Cells of a corpus, drawn with replacement, cut to `context`, of together about `tokens` tokens.
///
/// # Errors
/// No such corpus, an empty one.
pub fn of_corpus(path: &Path, tokens: usize, context: usize, seed: u64) -> Result<Vec<usize>> {
    let corpus = Corpus::open(path)?;
    if corpus.cells() == 0 {
        return Err(Error::new(Code::NoCells, "no cells to draw lengths from").at(path.display()));
    }
    let mut random = Philox::new(seed, 3, site::BENCH);
    Ok(fill(tokens, || corpus.len_of(random.below(corpus.cells() as u64) as usize).clamp(1, context)))
}

/// As many cells of one length as hold about `tokens` tokens, at least one.
pub fn constant(len: usize, tokens: usize) -> Vec<usize> {
    vec![len; (tokens / len).max(1)]
}

/// Lengths until the next would pass `tokens`; at least one.
fn fill(tokens: usize, mut next: impl FnMut() -> usize) -> Vec<usize> {
    let (mut lengths, mut sum) = (vec![next()], 0);
    sum += lengths[0];
    loop {
        let len = next();
        sum += len;
        if sum > tokens {
            return lengths;
        }
        lengths.push(len);
    }
}

/// Whole numbers separated by spaces, commas or line breaks.
///
/// # Errors
/// Input: a word that is no length, no length at all.
pub fn read(file: &Path) -> Result<Vec<usize>> {
    let text = whole_file::read_text(file, "read the lengths", MAX_BYTES)?;
    let lengths = text
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| match word.parse::<usize>() {
            Ok(len) if (1..=65_536).contains(&len) => Ok(len),
            _ => Err(Error::new(Code::BenchLengths, "not a length")
                .at(file.display())
                .found(word)
                .wanted("1 to 65,536")),
        })
        .collect::<Result<Vec<_>>>()?;
    match lengths.is_empty() {
        true => Err(Error::new(Code::BenchLengths, "no lengths")
            .at(file.display())
            .wanted("a whole number per cell")),
        false => Ok(lengths),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixtures_have_their_median_and_stay_within_the_context() {
        let blood = LogNormal::parse("900, 0.45").unwrap();
        let mut lengths = blood.draw(4_000_000, 2048, 1);
        assert_eq!(lengths, blood.draw(4_000_000, 2048, 1));
        let sum: usize = lengths.iter().sum();
        assert!(sum <= 4_000_000 && sum > 3_990_000 && lengths.iter().all(|l| (20..=2048).contains(l)));
        lengths.sort_unstable();
        let median = lengths[lengths.len() / 2] as f64;
        assert!((median / 900.0 - 1.0).abs() < 0.05, "{median}");
        let v2 = LogNormal::of(&Preset::named("gf-v2-104m").unwrap()).draw(8_000_000, 4096, 2);
        let mean = v2.iter().sum::<usize>() as f64 / v2.len() as f64;
        // The clip takes some off 1,442.
        assert!((1350.0..1450.0).contains(&mean), "{mean}");
        for bad in ["900", "0,1", "a,b", "900,9"] {
            assert_eq!(LogNormal::parse(bad).unwrap_err().kind().exit_code(), 2, "{bad}");
        }
        assert_eq!((constant(400, 1000), constant(4096, 10)), (vec![400; 2], vec![4096]));
    }

    #[test]
    fn files_hold_whole_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lengths.txt");
        std::fs::write(&file, "900, 1200\n64").unwrap();
        assert_eq!(read(&file).unwrap(), [900, 1200, 64]);
        std::fs::write(&file, "900 none").unwrap();
        assert_eq!(read(&file).unwrap_err().kind().exit_code(), 3);
        std::fs::write(&file, "").unwrap();
        assert!(read(&file).is_err());
    }
}
