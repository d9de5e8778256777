//! What a work item reads, packed: the keys and values of one cell and head, the order of its queries, and which keys a
//! tile of queries visits.
//!
//! Panels are row-major f32 (rows, W), W the head width rounded up to 16 and the rest zero, so that every product runs on
//! whole vectors and bf16 is widened once. Under `MarkerSparse` the rows of the cell's global tokens follow those of the
//! cell once more, side by side: a tile of ordinary queries then visits three runs of rows — its window, the global keys
//! before it, the global keys behind it — and never a key that it does not attend to, but for the window's ragged ends.
//! Global queries are tiled apart from ordinary ones and visit the whole cell.

use super::TILE;
use crate::cpu::simd_vector::{LANES, Vector};
use crate::device::{Act, Dropout};

/// One call, as every work item sees it.
pub struct Job<'a, A> {
    /// (N, 3·D)
    pub qkv: &'a [A],
    /// (C + 1)
    pub cell_start: &'a [u32],
    /// (N), with the half-width of the window: `MarkerSparse`.
    pub sparse: Option<(&'a [u8], usize)>,
    /// H
    pub heads: usize,
    /// K
    pub head_width: usize,
    /// On the probabilities.
    pub dropout: Dropout,
}

/// A run of panel rows that a tile visits.
#[derive(Clone, Copy)]
pub struct Run {
    /// First panel row.
    pub begin: usize,
    /// Rows.
    pub count: usize,
    /// Leading rows that are there for alignment alone and do not attend.
    pub skip: usize,
    /// Ordinary keys of it attend within the window alone.
    pub banded: bool,
    /// Rows are consecutive keys from a multiple of 8 on.
    pub consecutive: bool,
}

impl Run {
    /// The same keys from a row that `multiple` (1 or 2) divides.
    pub fn aligned(self, multiple: usize) -> Run {
        let skip = self.begin % multiple;
        Run { begin: self.begin - skip, count: self.count + skip, skip, ..self }
    }
}

/// K rounded up to whole vectors.
pub fn panel_width(head_width: usize) -> usize {
    head_width.next_multiple_of(LANES)
}

/// Order of a cell's tokens: as queries and as panel rows.
pub struct Order<'s> {
    /// First token of the cell in the batch.
    pub start: usize,
    /// Tokens of the cell.
    pub len: usize,
    /// Half-width of the window; `None` when all pairs attend.
    pub window: Option<usize>,
    /// Cell-local token of each panel row: 0 … len - 1, filled up to a multiple of 8, then the global tokens, filled up.
    pub keys: &'s mut [u32],
    /// 1 where the panel row's token is global.
    pub key_is_global: &'s mut [u8],
    /// Queries: ordinary tokens in order, then global tokens.
    pub queries: &'s mut [u32],
    /// Ordinary tokens among them (all of them when all pairs attend).
    pub ordinary: usize,
}

impl<A: Act> Job<'_, A> {
    /// D
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// First token and length of a cell.
    pub fn cell(&self, cell: usize) -> (usize, usize) {
        let start = self.cell_start[cell] as usize;
        (start, self.cell_start[cell + 1] as usize - start)
    }

    /// Rows of a cell's panels.
    pub fn panel_rows(&self, cell: usize) -> usize {
        let (start, len) = self.cell(cell);
        let globals =
            self.sparse.map_or(0, |(g, _)| g[start..start + len].iter().filter(|g| **g != 0).count());
        len.next_multiple_of(8) + globals.next_multiple_of(8)
    }

    /// Fills in the order of a cell's tokens. The slices hold at least `panel_rows`, `panel_rows` and `len` elements.
    pub fn order<'s>(
        &self,
        cell: usize,
        keys: &'s mut [u32],
        key_is_global: &'s mut [u8],
        queries: &'s mut [u32],
    ) -> Order<'s> {
        let (start, len) = self.cell(cell);
        for (j, key) in keys.iter_mut().enumerate() {
            *key = j.min(len - 1) as u32;
        }
        key_is_global.fill(0);
        let mut ordinary = 0;
        match self.sparse {
            None => {
                for (i, query) in queries.iter_mut().enumerate() {
                    *query = i as u32;
                }
                ordinary = len;
            }
            Some((global, _)) => {
                let global = &global[start..start + len];
                for i in (0..len).filter(|i| global[*i] == 0) {
                    queries[ordinary] = i as u32;
                    ordinary += 1;
                }
                let gathered = len.next_multiple_of(8);
                for (g, i) in (0..len).filter(|i| global[*i] != 0).enumerate() {
                    queries[ordinary + g] = i as u32;
                    keys[gathered + g] = i as u32;
                    key_is_global[gathered + g] = 1;
                    key_is_global[i] = 1;
                }
            }
        }
        Order { start, len, window: self.sparse.map(|(_, w)| w), keys, key_is_global, queries, ordinary }
    }

    /// The `third` (0 q, 1 k, 2 v) of a token for a head.
    #[inline(always)]
    pub fn token(&self, token: usize, third: usize, head: usize) -> *const A {
        let at = (token * 3 + third) * self.width() + head * self.head_width;
        self.qkv[at..at + self.head_width].as_ptr()
    }
}

impl Order<'_> {
    /// The runs that queries `first .. first + count` visit; tiles do not mix ordinary and global queries.
    pub fn runs(&self, first: usize, count: usize) -> ([Run; 3], usize) {
        let whole = Run { begin: 0, count: self.len, skip: 0, banded: false, consecutive: true };
        let mut runs = [whole; 3];
        let Some(window) = self.window.filter(|_| first < self.ordinary) else {
            return (runs, 1);
        };
        let low = (self.queries[first] as usize).saturating_sub(window) & !7;
        let last = self.queries[first + count - 1] as usize;
        let high = last.saturating_add(window).saturating_add(1).min(self.len);
        runs[0] = Run { begin: low, count: high - low, skip: 0, banded: true, consecutive: true };
        let gathered = self.len.next_multiple_of(8);
        let globals = &self.keys[gathered..gathered + self.len - self.ordinary];
        let before = globals.partition_point(|g| (*g as usize) < low);
        let inside = globals.partition_point(|g| (*g as usize) < high);
        let mut n = 1;
        for (begin, end) in [(0, before), (inside, globals.len())] {
            if begin < end {
                runs[n] = Run {
                    begin: gathered + begin,
                    count: end - begin,
                    skip: 0,
                    banded: false,
                    consecutive: false,
                };
                n += 1;
            }
        }
        (runs, n)
    }

    /// The next tile of queries from `first` on: at most [`TILE`], all ordinary or all global.
    pub fn tile(&self, first: usize, end: usize) -> usize {
        let border = if first < self.ordinary { self.ordinary } else { self.len };
        match border.min(end) - first {
            // Two tiles of two vectors rather than one of three and one of one, which waits for its loads.
            left if left > TILE && left <= TILE + LANES => TILE - LANES,
            left => left.min(TILE),
        }
    }
}

impl Order<'_> {
    /// True when a key of panel rows `row .. row + count` lies outside the window of one of the (ordinary) queries.
    #[inline(always)]
    pub fn crosses_window(&self, queries: &[u32], row: usize, count: usize) -> bool {
        let window = self.window.unwrap_or(usize::MAX) as i64;
        let (first, last) = (self.keys[row] as i64, self.keys[row + count - 1] as i64);
        last - queries[0] as i64 > window || queries[queries.len() - 1] as i64 - first > window
    }

    /// Which queries, at `position`, attend to the key of a panel row: those in the window, all if the key is global.
    #[inline(always)]
    pub fn window_bits<V: Vector, const N: usize>(&self, row: usize, position: &[V; N]) -> [u16; N] {
        if self.key_is_global[row] != 0 {
            return [u16::MAX; N];
        }
        let mut bits = [0; N];
        // SAFETY: `position` holds values of V. Ranks are whole numbers far below 2^24, exact in f32.
        let (key, window) = unsafe {
            (V::splat(self.keys[row] as f32), V::splat(self.window.unwrap_or(usize::MAX).min(1 << 24) as f32))
        };
        for (bits, position) in bits.iter_mut().zip(position) {
            *bits = !(position.sub(key).greater(window) | key.sub(*position).greater(window));
        }
        bits
    }
}

/// The positions of a tile's queries as lanes.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
pub unsafe fn positions<V: Vector, const N: usize>(queries: &[u32]) -> [V; N] {
    let mut lanes = [0f32; TILE];
    for (lane, query) in lanes.iter_mut().zip(queries) {
        *lane = *query as f32;
    }
    // SAFETY: the caller vouches for the instruction set; N · 16 ≤ TILE.
    unsafe {
        let mut out = [V::splat(0.0); N];
        for (v, out) in out.iter_mut().enumerate() {
            *out = V::load(lanes.as_ptr().add(v * LANES));
        }
        out
    }
}

/// Sixteen elements at `p` from element `at` of `width` on; zeros beyond.
///
/// # Safety
/// `p` is readable for `width` elements; the instruction set of V is present.
#[inline(always)]
pub unsafe fn load_lanes<V: Vector, A: Act>(p: *const A, at: usize, width: usize) -> V {
    let mut lanes = [0f32; LANES];
    // SAFETY: reads stay below `width`.
    unsafe {
        if at + LANES <= width {
            for (i, lane) in lanes.iter_mut().enumerate() {
                *lane = (*p.add(at + i)).to_f32();
            }
        } else {
            for (i, lane) in lanes.iter_mut().enumerate().take(width.saturating_sub(at)) {
                *lane = (*p.add(at + i)).to_f32();
            }
        }
        V::load(lanes.as_ptr())
    }
}

/// Writes sixteen elements to `p`, from element `at` on, as far as `width` goes.
///
/// # Safety
/// `p` is writable for `width` elements; the instruction set of V is present.
#[inline(always)]
pub unsafe fn store_lanes<V: Vector, A: Act>(x: V, p: *mut A, at: usize, width: usize) {
    let mut lanes = [0f32; LANES];
    // SAFETY: writes stay below `width`.
    unsafe {
        x.store(lanes.as_mut_ptr());
        if at + LANES <= width {
            for (i, lane) in lanes.iter().enumerate() {
                *p.add(at + i) = A::from_f32(*lane);
            }
        } else {
            for (i, lane) in lanes.iter().enumerate().take(width.saturating_sub(at)) {
                *p.add(at + i) = A::from_f32(*lane);
            }
        }
    }
}

/// Rows between a packed row and the one fetched for later. Rows of a head lie 3·D apart, often a page, where the hardware
/// does not look ahead: without this, packing took 15 % of the forward pass.
const PREFETCH_ROWS: usize = 12;

/// Asks for the cache lines of `width` elements.
#[inline(always)]
fn prefetch<A>(p: *const A, width: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..width * size_of::<A>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, width);
}

/// Widens `rows` rows into a panel (rows, W).
///
/// # Safety
/// `source(row)` is readable for `width` elements, the panel is writable; the instruction set of V is present.
#[inline(always)]
pub unsafe fn pack_rows<V: Vector, A: Act>(
    panel: *mut f32,
    rows: usize,
    width: usize,
    source: impl Fn(usize) -> *const A,
) {
    let panel_width = panel_width(width);
    for row in 0..rows {
        let from = source(row);
        prefetch(source((row + PREFETCH_ROWS).min(rows - 1)), width);
        for at in (0..panel_width).step_by(LANES) {
            // SAFETY: the caller vouches for both ranges and the instruction set.
            unsafe { load_lanes::<V, A>(from, at, width).store(panel.add(row * panel_width + at)) };
        }
    }
}

/// Pairs of rows side by side: 32-bit element (row / 2, c) holds column c of an even row in its lower half and of the odd
/// row in its upper half. `rows` is even.
///
/// # Safety
/// As [`pack_rows`]; A is a 16-bit type.
#[inline(always)]
pub unsafe fn pack_row_pairs<A: Act>(
    panel: *mut f32,
    rows: usize,
    width: usize,
    source: impl Fn(usize) -> *const A,
) {
    let panel_width = panel_width(width);
    for row in (0..rows).step_by(2) {
        for ahead in 0..2 {
            prefetch(source((row + ahead + PREFETCH_ROWS).min(rows - 1)), width);
        }
        // SAFETY: the caller vouches for both ranges and for the size of A.
        unsafe {
            let even = std::slice::from_raw_parts(source(row).cast::<u16>(), width);
            let odd = std::slice::from_raw_parts(source(row + 1).cast::<u16>(), width);
            let pairs = panel.add(row / 2 * panel_width).cast::<u32>();
            for c in 0..width {
                *pairs.add(c) = even[c] as u32 | (odd[c] as u32) << 16;
            }
            for c in width..panel_width {
                *pairs.add(c) = 0;
            }
        }
    }
}

/// Turns rows (`count`, `width`) into columns (W, 16·N): lane i of each row of `columns` is source row i, zeros beyond `count`.
///
/// # Safety
/// As [`pack_rows`].
#[inline(always)]
pub unsafe fn pack_columns<V: Vector, A: Act, const N: usize>(
    columns: *mut f32,
    count: usize,
    width: usize,
    source: impl Fn(usize) -> *const A,
) {
    // SAFETY: the caller vouches for both ranges and the instruction set.
    unsafe {
        for v in 0..N {
            for at in (0..panel_width(width)).step_by(LANES) {
                let mut square = [V::splat(0.0); LANES];
                for (i, row) in square.iter_mut().enumerate() {
                    if v * LANES + i < count {
                        *row = load_lanes::<V, A>(source(v * LANES + i), at, width);
                    }
                }
                let square = V::transpose(square);
                for (c, column) in square.iter().enumerate() {
                    column.store(columns.add((at + c) * N * LANES + v * LANES));
                }
            }
        }
    }
}

/// The way back: columns (W, 16·N), times `factor[v]` lane by lane, to the rows of `target`.
///
/// # Safety
/// `columns` is readable, `target(row)` writable for `width` elements; the instruction set of V is present.
#[inline(always)]
pub unsafe fn unpack_columns<V: Vector, A: Act, const N: usize>(
    columns: *const f32,
    factor: [V; N],
    count: usize,
    width: usize,
    target: impl Fn(usize) -> *mut A,
) {
    // SAFETY: the caller vouches for both ranges and the instruction set.
    unsafe {
        for (v, factor) in factor.iter().enumerate() {
            for at in (0..panel_width(width)).step_by(LANES) {
                let mut square = [V::splat(0.0); LANES];
                for (c, column) in square.iter_mut().enumerate() {
                    *column = V::load(columns.add((at + c) * N * LANES + v * LANES)).mul(*factor);
                }
                let square = V::transpose(square);
                for (i, row) in square.iter().enumerate() {
                    if v * LANES + i < count {
                        store_lanes::<V, A>(*row, target(v * LANES + i), at, width);
                    }
                }
            }
        }
    }
}
