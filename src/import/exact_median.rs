//! Exact medians of many streams of positive numbers in bounded memory.
//!
//! If all values fit the budget they are collected and selected from. If not, a median is narrowed down without keeping values:
//! positive floats order like their bits, so a pass histograms each gene's values into 256 ranges of bits, the range that holds
//! the middle rank is kept, and the next pass looks into it; as soon as what is left fits, it is collected. Two passes shrink the
//! candidates by orders of magnitude, and the result is the same bits as from sorting everything. Of an even number of values
//! the two in the middle are averaged, as `numpy.median` does; they are two targets if they part.

use crate::error::Result;

/// Ranges per gene and pass.
const BINS: usize = 256;
/// The first pass cuts at quarter octaves from 2^-40 to 2^24; values are below 2^14.
const FIRST_SHIFT: u32 = 50;
const FIRST_KEY: u64 = (1023 - 40) << 2;

/// A range of bit patterns that holds one or both middle ranks of a gene.
#[derive(Debug, Clone)]
struct Target {
    low: u64,
    /// Last pattern that belongs to it.
    high: u64,
    /// Ranks within the range; equal where one is looked for.
    ranks: [u64; 2],
    count: u64,
}

pub(super) type ForEachValue<'a> = dyn FnMut(&mut dyn FnMut(u32, f64)) -> Result<()> + 'a;

/// The median per gene, `None` below `min_cells` values. `for_each_value` runs over all (gene, value) pairs, the same each time;
/// values are positive.
pub(super) fn exact_medians(
    genes: usize,
    entries: u64,
    memory_bytes: u64,
    min_cells: u64,
    for_each_value: &mut ForEachValue<'_>,
) -> Result<Vec<Option<f64>>> {
    // Growing vectors hold up to twice what is in them.
    let room = (memory_bytes / 16).max(1);
    let enough = |n: u64| n >= min_cells.max(1);
    if entries <= room {
        let mut values: Vec<Vec<f64>> = vec![Vec::new(); genes];
        for_each_value(&mut |gene, value| values[gene as usize].push(value))?;
        let median = |v: &mut Vec<f64>| {
            let n = v.len() as u64;
            enough(n).then(|| middle(select(v, (n - 1) / 2), select(v, n / 2)))
        };
        return Ok(values.iter_mut().map(median).collect());
    }
    let mut targets: Vec<Vec<Target>> = Vec::new();
    let mut histogram = vec![0u64; genes * BINS];
    for_each_value(&mut |gene, value| {
        let bin = (value.to_bits() >> FIRST_SHIFT).saturating_sub(FIRST_KEY).min(BINS as u64 - 1);
        histogram[gene as usize * BINS + bin as usize] += 1;
    })?;
    for bins in histogram.chunks(BINS) {
        let count: u64 = bins.iter().sum();
        let whole = Target { low: 0, high: u64::MAX, ranks: [count.saturating_sub(1) / 2, count / 2], count };
        let range = |bin: usize| {
            let low = if bin == 0 { 0 } else { (FIRST_KEY + bin as u64) << FIRST_SHIFT };
            let high =
                if bin == BINS - 1 { u64::MAX } else { ((FIRST_KEY + bin as u64 + 1) << FIRST_SHIFT) - 1 };
            (low, high)
        };
        targets.push(if enough(count) { narrow(&whole, bins, range) } else { Vec::new() });
    }
    while targets.iter().flatten().map(|t| t.count).sum::<u64>() > room
        && targets.iter().flatten().any(|t| t.low < t.high)
    {
        let first: Vec<usize> = starts(&targets);
        histogram.clear();
        histogram.resize(first[genes] * BINS, 0);
        for_each_value(&mut |gene, value| {
            let key = value.to_bits();
            for (n, t) in targets[gene as usize].iter().enumerate() {
                if (t.low..=t.high).contains(&key) {
                    histogram[(first[gene as usize] + n) * BINS + ((key - t.low) >> shift(t)) as usize] += 1;
                }
            }
        })?;
        for (gene, list) in targets.iter_mut().enumerate() {
            let narrowed = list.iter().enumerate().flat_map(|(n, t)| {
                let bins = &histogram[(first[gene] + n) * BINS..][..BINS];
                let range = |bin: usize| {
                    let low = t.low + ((bin as u64) << shift(t));
                    (low, t.high.min(low + ((1u64 << shift(t)) - 1)))
                };
                narrow(t, bins, range)
            });
            *list = narrowed.collect();
        }
    }
    // What is left fits, or consists of equal values that need no looking at.
    let first = starts(&targets);
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); first[genes]];
    for_each_value(&mut |gene, value| {
        let key = value.to_bits();
        for (n, t) in targets[gene as usize].iter().enumerate() {
            if t.low < t.high && (t.low..=t.high).contains(&key) {
                values[first[gene as usize] + n].push(value);
            }
        }
    })?;
    let mut at = |gene: usize, n: usize, rank: usize, t: &Target| {
        if t.low == t.high {
            f64::from_bits(t.low)
        } else {
            select(&mut values[first[gene] + n], t.ranks[rank])
        }
    };
    Ok(targets
        .iter()
        .enumerate()
        .map(|(gene, list)| match list.as_slice() {
            [] => None,
            [one] => Some(middle(at(gene, 0, 0, one), at(gene, 0, 1, one))),
            [low, high, ..] => Some(middle(at(gene, 0, 0, low), at(gene, 1, 0, high))),
        })
        .collect())
}

/// First index of each gene's targets in a flat list, and their number.
fn starts(targets: &[Vec<Target>]) -> Vec<usize> {
    let mut first = vec![0];
    first.extend(targets.iter().scan(0, |sum, list| {
        *sum += list.len();
        Some(*sum)
    }));
    first
}

/// How far keys of a target are shifted so that its range has at most [`BINS`] bins.
fn shift(t: &Target) -> u32 {
    (64 - (t.high - t.low).leading_zeros()).saturating_sub(BINS.trailing_zeros())
}

/// The bins that hold the target's ranks: one, or two where the ranks part.
fn narrow(t: &Target, bins: &[u64], range: impl Fn(usize) -> (u64, u64)) -> Vec<Target> {
    let find = |rank: u64| {
        let mut below = 0;
        for (bin, &count) in bins.iter().enumerate() {
            if rank < below + count {
                let (low, high) = range(bin);
                return (bin, Target { low, high, ranks: [rank - below; 2], count });
            }
            below += count;
        }
        unreachable!("a rank below the count lies in a bin")
    };
    let (bin, mut first) = find(t.ranks[0]);
    let (other, second) = find(t.ranks[1]);
    if bin == other {
        first.ranks[1] = second.ranks[0];
        return vec![first];
    }
    vec![first, second]
}

fn select(values: &mut [f64], rank: u64) -> f64 {
    *values.select_nth_unstable_by(rank as usize, f64::total_cmp).1
}

fn middle(a: f64, b: f64) -> f64 {
    if a == b { a } else { (a + b) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted_median(mut v: Vec<f64>) -> Option<f64> {
        v.sort_by(f64::total_cmp);
        let n = v.len();
        (n > 0).then(|| (v[(n - 1) / 2] + v[n / 2]) / 2.0)
    }

    proptest! {
        #[test]
        fn narrowing_equals_sorting_bit_for_bit(
            genes in prop::collection::vec(
                prop::collection::vec(prop_oneof![1e-3f64..1e4, (1u32..5, 1u32..2000).prop_map(|(a, b)| f64::from(a) / f64::from(b) * 1e4),
                    Just(7.5), Just(f64::MIN_POSITIVE), Just(1e300)], 0..60), 1..6),
            room in 1u64..80,
        ) {
            let expected: Vec<Option<f64>> = genes.iter().cloned().map(sorted_median).collect();
            let entries = genes.iter().map(Vec::len).sum::<usize>() as u64;
            let mut passes = 0;
            let mut run = |memory: u64| exact_medians(genes.len(), entries, memory, 1, &mut |each| {
                passes += 1;
                for (g, values) in genes.iter().enumerate() {
                    values.iter().for_each(|&v| each(g as u32, v));
                }
                Ok(())
            }).unwrap();
            let bits = |m: &[Option<f64>]| m.iter().map(|m| m.map(f64::to_bits)).collect::<Vec<_>>();
            prop_assert_eq!(bits(&run(room * 16)), bits(&expected));
            prop_assert_eq!(bits(&run(16)), bits(&expected));
            prop_assert_eq!(bits(&run(u64::MAX)), bits(&expected));
        }
    }

    #[test]
    fn genes_below_the_least_number_of_cells_have_no_median() {
        let run = |memory| {
            exact_medians(2, 3, memory, 2, &mut |each| {
                [(0, 1.0), (0, 3.0), (1, 5.0)].iter().for_each(|&(g, v)| each(g, v));
                Ok(())
            })
        };
        assert_eq!(run(u64::MAX).unwrap(), [Some(2.0), None]);
        assert_eq!(run(16).unwrap(), [Some(2.0), None]);
    }
}
