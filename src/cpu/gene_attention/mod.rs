//! Attention on the CPU: tiles of queries against blocks of keys, in registers and the first-level cache.
//!
//! The work is cut by cell, head and block of queries, and how a cell is cut depends on its length alone: results have the
//! same bits for any number of threads and in any batch. `panel` packs a cell's keys and values and says which keys a tile
//! visits, `forward` and `backward` hold the two recurrences, `tile` their one matrix product, `dropout` the kept pairs.
//! All of it is written once over [`Vector`](super::simd_vector::Vector) and compiled for AVX-512, for AVX2 and for any machine.

mod backward;
mod dropout;
mod forward;
mod panel;
mod tile;

use super::scratch;
use super::{Buf, Cpu};
use crate::device::Act;
use crate::error::Result;
use crate::ops::gene_attention::{BackwardIn, Dims, GeneAttention, In, Pattern};
use panel::Job;
use rayon::prelude::*;

/// Queries of a tile: three vectors, which with eight keys make 24 accumulators.
const TILE: usize = 48;
/// Keys of a block: Sᵀ (64, 48) is 12 KiB of the 32 KiB first-level cache.
const BLOCK: usize = 64;
/// Queries that make a further item of a cell: K and V are packed once per item, some 3 % of the work of 1024 queries.
const ITEM_QUERIES: usize = 1024;
/// The most backward items of a cell and head: each has a dK and dV of its own.
const BACKWARD_ITEMS: usize = 4;
/// Stands for a pair that does not attend: finite, so that differences of two of them are not NaN.
const MASKED: f32 = -1e30;

/// Instruction sets that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL and BF16: bf16 products without widening. The same as [`Isa::Avx512`] for f32.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Whatever the program was compiled for.
    Portable,
}

impl Isa {
    /// Those that this processor has, best first.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(has_avx512_bf16().then_some(Isa::Avx512Bf16));
            all.extend(super::simd::has_avx512().then_some(Isa::Avx512));
            all.extend(super::simd::has_avx2().then_some(Isa::Avx2));
        }
        all.push(Isa::Portable);
        all
    }

    /// The best that this processor has.
    pub fn best() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512_bf16() {
                return Isa::Avx512Bf16;
            }
            if super::simd::has_avx512() {
                return Isa::Avx512;
            }
            if super::simd::has_avx2() {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512_bf16() -> bool {
    super::simd::has_avx512() && is_x86_feature_detected!("avx512bf16")
}

/// A pointer that several threads write through, each to elements of its own.
pub struct Shared<T>(*mut T);
// SAFETY: every user writes elements that no other thread touches: queries of its own item, columns of its own head.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}
impl<T> Shared<T> {
    #[inline(always)]
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// Defines `$name`, which runs `$module::$body::<V, A>` compiled for the instruction set in its first argument.
macro_rules! per_isa {
    ($(#[$meta:meta])* $name:ident = $module:ident::$body:ident, ($($arg:ident: $type:ty),* $(,)?)) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)] // a kernel's argument list
        unsafe fn $name<A: Act>(isa: Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn wide<A: Act>($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $module::$body::<super::simd_vector::Avx512, A>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn medium<A: Act>($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $module::$body::<super::simd_vector::Avx2, A>($($arg),*) }
            }
            // SAFETY: the caller vouches for the instruction set and the rest.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Avx512Bf16 => wide::<A>($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => medium::<A>($($arg),*),
                    _ => $module::$body::<super::simd_vector::Portable, A>($($arg),*),
                }
            }
        }
    };
}

/// [`forward::item`] with f32 products.
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn plain_item<V: super::simd_vector::Vector, A: Act>(
    job: &Job<'_, A>,
    out: &forward::Out<A>,
    cell: usize,
    head: usize,
    first: usize,
    end: usize,
) {
    // SAFETY: the caller's.
    unsafe { forward::item::<V, tile::Plain, A>(job, out, cell, head, first, end) }
}

/// [`forward::item`] with products of bf16 pairs.
///
/// # Safety
/// See there; AVX512_BF16 is present and A is bf16 with an even head width.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn pairs_item<A: Act>(
    job: &Job<'_, A>,
    out: &forward::Out<A>,
    cell: usize,
    head: usize,
    first: usize,
    end: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        forward::item::<super::simd_vector::Avx512, tile::Bf16Pairs, A>(job, out, cell, head, first, end)
    }
}

per_isa! {
    /// # Safety
    /// See [`forward::item`].
    plain_forward = self::plain_item,
    (job: &Job<'_, A>, out: &forward::Out<A>, cell: usize, head: usize, first: usize, end: usize)
}

/// # Safety
/// See [`forward::item`].
unsafe fn forward_item<A: Act>(
    isa: Isa,
    job: &Job<'_, A>,
    out: &forward::Out<A>,
    cell: usize,
    head: usize,
    first: usize,
    end: usize,
) {
    // SAFETY: the caller's; a 16-bit activation type is bf16.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512Bf16 && !A::IS_F32 && job.head_width.is_multiple_of(2) {
            return pairs_item(job, out, cell, head, first, end);
        }
        plain_forward(isa, job, out, cell, head, first, end)
    }
}

per_isa! {
    /// # Safety
    /// See [`backward::item`].
    backward_item = backward::item,
    (job: &Job<'_, A>, g: &backward::Gradients<'_, A>, cell: usize, head: usize, first: usize, end: usize,
     partial: *mut f32)
}
per_isa! {
    /// # Safety
    /// See [`backward::store_keys`].
    store_keys = backward::store_keys,
    (job: &Job<'_, A>, g: &backward::Gradients<'_, A>, cell: usize, head: usize, chunks: &[*mut f32])
}

fn job<'a, A: Act>(dims: Dims, input: &'a In<'_, Cpu, A>) -> Job<'a, A> {
    let sparse = match (dims.pattern, input.global) {
        (Pattern::MarkerSparse { window }, Some(global)) => Some((&**global, window)),
        _ => None,
    };
    Job {
        qkv: input.qkv,
        cell_start: input.cell_start,
        sparse,
        heads: dims.heads,
        head_width: dims.head_width,
        dropout: input.dropout,
    }
}

/// Items that `len` queries are cut into, at most `most`.
fn items_of(len: usize, most: usize) -> usize {
    (len / ITEM_QUERIES).clamp(1, most)
}

/// Queries `first .. end` of item `i` of `items`: equal shares of whole tiles.
fn share(len: usize, items: usize, i: usize) -> (usize, usize) {
    let share = len.div_ceil(items).next_multiple_of(TILE);
    ((i * share).min(len), ((i + 1) * share).min(len))
}

/// The forward pass on one instruction set, which must be [available](Isa::available); shapes as in
/// [`forward`](crate::ops::gene_attention::forward), and checked there.
pub fn forward_on<A: Act>(isa: Isa, dims: Dims, input: In<'_, Cpu, A>, o: &mut Buf<A>, lse: &mut Buf<f32>) {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available here");
    let job = job(dims, &input);
    let out = forward::Out { o: Shared(o.as_mut_ptr()), lse: Shared(lse.as_mut_ptr()) };
    let blocks = |cell| items_of(job.cell(cell).1, usize::MAX);
    let count: usize = (0..dims.cells).map(blocks).sum();
    let mut list = scratch::take(8 * count);
    let items = list.slice::<[u32; 2]>(count);
    let all =
        (0..dims.cells).flat_map(|cell| (0..blocks(cell)).map(move |block| [cell as u32, block as u32]));
    items.iter_mut().zip(all).for_each(|(item, x)| *item = x);
    let items = &*items;
    (0..count * dims.heads).into_par_iter().with_max_len(1).for_each(|i| {
        let ([cell, block], head) = (items[i / dims.heads].map(|x| x as usize), i % dims.heads);
        let (first, end) = share(job.cell(cell).1, blocks(cell), block);
        // SAFETY: the instruction set is available; items hold distinct queries or heads; the shapes were checked.
        unsafe { forward_item(isa, &job, &out, cell, head, first, end) }
    });
}

/// The backward pass on one instruction set; see [`forward_on`].
pub fn backward_on<A: Act>(
    isa: Isa,
    dims: Dims,
    input: In<'_, Cpu, A>,
    backward: BackwardIn<'_, Cpu, A>,
    dqkv: &mut Buf<A>,
    delta: &mut Buf<f32>,
) {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available here");
    let job = job(dims, &input);
    let gradients = backward::Gradients {
        do_: backward.do_,
        o: backward.o,
        lse: backward.lse,
        dqkv: Shared(dqkv.as_mut_ptr()),
        delta: Shared(delta.as_mut_ptr()),
    };
    let of = |cell| items_of(job.cell(cell).1, BACKWARD_ITEMS);
    let count: usize = (0..dims.cells).map(of).sum();
    // One entry per (cell, chunk): cell, chunk, and where its heads' partial sums start, in multiples of 16 floats.
    let mut list = scratch::take(16 * count);
    let items = list.slice::<[u32; 4]>(count);
    let (mut floats, mut filled) = (0, 0);
    for cell in 0..dims.cells {
        for chunk in 0..of(cell) {
            items[filled] = [cell as u32, chunk as u32, (floats / 16) as u32, 0];
            filled += 1;
            if of(cell) > 1 {
                floats += dims.heads * backward::partial_len(&job, cell);
            }
        }
    }
    let items = &*items;
    let mut partials = scratch::take(4 * floats);
    let partials = Shared(partials.slice::<f32>(floats).as_mut_ptr());
    let partial = |item: usize, head: usize| {
        let [cell, _, at, _] = items[item].map(|x| x as usize);
        partials.at(at * 16 + head * backward::partial_len(&job, cell))
    };
    (0..count * dims.heads).into_par_iter().with_max_len(1).for_each(|i| {
        let (item, head) = (i / dims.heads, i % dims.heads);
        let [cell, chunk, ..] = items[item].map(|x| x as usize);
        let (len, chunks) = (job.cell(cell).1, of(cell));
        let (first, end) = share(len, chunks, chunk);
        let to = if chunks > 1 { partial(item, head) } else { std::ptr::null_mut() };
        // SAFETY: as in the forward pass; each chunk has its own partial sums, and a cell's only chunk its own columns.
        unsafe { backward_item(isa, &job, &gradients, cell, head, first, end, to) }
    });
    (0..count * dims.heads).into_par_iter().with_max_len(1).for_each(|i| {
        let (item, head) = (i / dims.heads, i % dims.heads);
        let [cell, chunk, ..] = items[item].map(|x| x as usize);
        let chunks = of(cell);
        if chunk == 0 && chunks > 1 {
            let mut all = [std::ptr::null_mut(); BACKWARD_ITEMS];
            for (c, pointer) in all.iter_mut().enumerate().take(chunks) {
                *pointer = partial(item + c, head);
            }
            // SAFETY: the chunks are finished; this cell and head is this item's alone.
            unsafe { store_keys(isa, &job, &gradients, cell, head, &all[..chunks]) }
        }
    });
}

impl<A: Act> GeneAttention<A> for Cpu {
    fn gene_attention_forward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        o: &mut Buf<A>,
        lse: &mut Buf<f32>,
    ) -> Result<()> {
        forward_on(Isa::best(), dims, input, o, lse);
        Ok(())
    }

    fn gene_attention_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        backward: BackwardIn<'_, Self, A>,
        dqkv: &mut Buf<A>,
        delta: &mut Buf<f32>,
    ) -> Result<()> {
        backward_on(Isa::best(), dims, input, backward, dqkv, delta);
        Ok(())
    }
}
