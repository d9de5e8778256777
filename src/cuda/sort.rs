//! A stable sort of tokens by a key: passes and geometry of `kernels/sort.cu`.

use super::functions::{sort_count, sort_scatter};
use super::{Buf, Cuda, Grid};
use crate::error::Result;

/// Places of a block: TILE of the kernel.
const TILE: usize = 2048;
/// Values of a digit.
const DIGITS: usize = 256;

/// Numbers of workspace that [`sort_by_key`] needs for its counts.
pub(super) fn counts(tokens: usize) -> usize {
    tokens.div_ceil(TILE) * DIGITS
}

/// Sets one of `places` (N each) to 0, 1, …, N-1 in ascending order of `key`, which is below `keys`; returns it.
pub(super) fn sort_by_key<'a>(
    cuda: &Cuda,
    tokens: usize,
    keys: usize,
    key: &Buf<u32>,
    places: &'a mut [Buf<u32>; 2],
    count: &mut Buf<u32>,
) -> Result<&'a Buf<u32>> {
    let bits = usize::BITS - keys.saturating_sub(1).leading_zeros();
    let passes = bits.div_ceil(8).max(1);
    let grid = Grid::line(tokens.div_ceil(TILE), 256);
    let [from, to] = places;
    let (mut from, mut to) = (from, to);
    for pass in 0..passes {
        let order = (pass > 0).then_some(&*from);
        let (n, shift) = (tokens as i32, (8 * pass) as i32);
        sort_count(cuda, grid, key, order, count, n, shift)?;
        sort_scatter(cuda, grid, key, order, count, to, n, shift)?;
        std::mem::swap(&mut from, &mut to);
    }
    Ok(from)
}
