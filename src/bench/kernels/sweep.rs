//! Shapes beyond the batch: attention over cells of one length each, the prototype loss over its sizes.

use crate::bench::lengths;

/// Which shapes besides those of the batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sweep {
    /// For attention: batches of cells of one length each.
    pub attention: Vec<Vec<usize>>,
    /// For the prototype loss: rows, columns, width.
    pub losses: Vec<[usize; 3]>,
}

impl Sweep {
    /// None.
    pub fn none() -> Self {
        Sweep::default()
    }

    /// The shapes of `performance`: cells of 200 to 4,096 tokens up to the context, together `tokens` tokens; losses from
    /// 256 × 100 to 8,192 × 100,000 at width 256, and at the network's own where that is larger.
    pub fn full(tokens: usize, context: usize, width: usize) -> Self {
        let attention = [200, 400, 900, 1442, 2048, 4096]
            .into_iter()
            .filter(|len| *len <= context)
            .map(|len| lengths::constant(len, tokens))
            .collect();
        let widths = if width > 256 { vec![256, width] } else { vec![256] };
        let sizes = [(256, 100), (1024, 1_000), (4096, 10_000), (8192, 100_000)];
        let losses = widths.iter().flat_map(|w| sizes.map(|(r, p)| [r, p, *w])).collect();
        Sweep { attention, losses }
    }

    /// Shapes of the same kinds that the emulator runs in a second.
    pub fn tiny() -> Self {
        Sweep { attention: vec![vec![5; 3], vec![65]], losses: vec![[9, 5, 32], [33, 70, 32]] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_up_to_the_context_and_widths_once() {
        let v1 = Sweep::full(32_768, 2048, 256);
        assert_eq!(v1.attention.iter().map(|b| b[0]).collect::<Vec<_>>(), [200, 400, 900, 1442, 2048]);
        assert!(v1.attention.iter().all(|b| (30_000..=32_768).contains(&b.iter().sum::<usize>())));
        assert_eq!((v1.losses.len(), v1.losses[3]), (4, [8192, 100_000, 256]));
        let v2 = Sweep::full(32_768, 4096, 768);
        assert_eq!((v2.attention.len(), v2.losses.len(), v2.losses[7]), (6, 8, [8192, 100_000, 768]));
    }
}
