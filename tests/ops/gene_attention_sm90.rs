//! The attention kernels of Hopper (bf16, heads of 64): cells around the edges of a consumer's 64 rows, of a visited tile of 128 and
//! of an item of 128 or 192; short cells that share an item; both patterns, dropout; more items than blocks and fewer.

use super::gene_attention::{check, huge_scores_stay_finite};
use crate::ActSample;
use crate::common::attention::{Case, run, run_on};
use crate::common::cases::by_threads;
use crate::common::close::assert_same_bits;
use cellrefine::ops::gene_attention::GeneAttention;

on_hopper!(
    edges,
    short_cells_share_an_item,
    marker_sparse,
    dropout,
    huge_scores_stay_finite,
    a_cell_does_not_feel_its_batch,
    the_same_bits_for_any_thread_count,
    longer_than_blocks_can_wait_for
);

fn edges<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    check(dev, &Case::dense(&[1], 1, 64));
    check(dev, &Case::dense(&[128], 1, 64));
    check(dev, &Case::dense(&[63, 64, 65, 127, 129], 2, 64));
    check(dev, &Case::dense(&[191, 2, 192, 193], 1, 64));
    check(dev, &Case::dense(&[320, 512, 257], 1, 64));
}

fn short_cells_share_an_item<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    let lengths: Vec<usize> = (0..23).map(|i| 1 + i * 29 % 64).collect();
    check(dev, &Case::dense(&lengths, 2, 64));
    check(dev, &Case::dense(&lengths[..8], 1, 64).dropout(0.3));
    check(dev, &Case::dense(&lengths[..7], 1, 64).sparse(3, 6).dropout(0.3));
}

fn marker_sparse<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for (window, every) in [(0, 5), (1, 1000), (33, 40), (usize::MAX, 9)] {
        check(dev, &Case::dense(&[3, 150, 20, 330], 1, 64).sparse(window, every));
    }
    // Tiles in the middle that nothing meets: a few global tokens in front, a narrow window.
    check(dev, &Case::dense(&[512], 1, 64).sparse(2, 500));
    // Half the tokens are global.
    check(dev, &Case::dense(&[300, 65], 2, 64).sparse(96, 2));
}

fn dropout<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for probability in [0.02, 0.5] {
        check(dev, &Case::dense(&[5, 64, 200, 129], 2, 64).dropout(probability));
        check(dev, &Case::dense(&[270, 13], 1, 64).sparse(16, 7).dropout(probability));
    }
}

/// A cell's results are its own, to the bit, whatever cells share its items.
fn a_cell_does_not_feel_its_batch<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for whole in [
        Case::dense(&[200, 3, 61, 130], 2, 64).dropout(0.3),
        Case::dense(&[3, 61, 20, 300], 1, 64),
        Case::dense(&[70, 5, 290], 1, 64).sparse(11, 8).dropout(0.3),
    ] {
        let (qkv, do_, global) = (whole.qkv::<A>(), whole.do_::<A>(), whole.global());
        let together = run_on(dev, &whole, &qkv, &do_);
        let mut first = 0;
        for len in whole.lengths.clone() {
            let mut alone = whole.clone();
            alone.lengths = vec![len];
            alone.dropout.first_row += first as u64;
            alone.flags = Some(global[first..first + len].to_vec());
            let (d, h) = (whole.width(), whole.heads);
            let of = |x: &[A], per: usize| x[first * per..(first + len) * per].to_vec();
            let got = run_on(dev, &alone, &of(&qkv, 3 * d), &of(&do_, d));
            assert_same_bits("o", &got.o, &of(&together.o, d));
            assert_same_bits("lse", &got.lse, &together.lse[first * h..(first + len) * h]);
            assert_same_bits("dqkv", &got.dqkv, &of(&together.dqkv, 3 * d));
            first += len;
        }
    }
}

fn the_same_bits_for_any_thread_count<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for case in [Case::dense(&[140, 30, 260], 2, 64), Case::dense(&[190], 2, 64).sparse(16, 9).dropout(0.2)] {
        let [one, two, three] = by_threads(|| run::<A, B>(dev, &case));
        for other in [two, three] {
            assert_same_bits("o", &other.o, &one.o);
            assert_same_bits("lse", &other.lse, &one.lse);
            assert_same_bits("dqkv", &other.dqkv, &one.dqkv);
            assert_same_bits("delta", &other.delta, &one.delta);
        }
    }
}

/// More key tiles than blocks can be resident: the backward pass takes the kernels that wait for nobody.
fn longer_than_blocks_can_wait_for<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    check(dev, &Case::dense(&[530, 40], 1, 64));
}

/// Few calls that reach every part of the kernels: what the mutants run against.
#[cfg(emulator)]
mod faults {
    use super::*;

    /// Three consumers in step over three tiles, more items than blocks, short cells that share an item.
    fn dense<B: GeneAttention<A>, A: ActSample>(dev: &B) {
        check(dev, &Case::dense(&[330, 129, 64, 10, 33, 1], 2, 64));
    }
    fn others<B: GeneAttention<A>, A: ActSample>(dev: &B) {
        check(dev, &Case::dense(&[260, 20], 1, 64).dropout(0.3));
        check(dev, &Case::dense(&[390, 40, 3], 1, 64).sparse(20, 12).dropout(0.3));
        // More visits than stages.
        check(dev, &Case::dense(&[512], 1, 64).sparse(300, 40));
        // No global token: tiles meet by the last rank of the one and the first of the next, and not beyond.
        let mut narrow = Case::dense(&[256, 400], 1, 64).sparse(1, 1);
        narrow.flags = Some(vec![0; 656]);
        check(dev, &narrow);
        // Rows 0 to 63 with the tile 0 to 127: all pairs attend but the farthest.
        let mut near = Case::dense(&[190], 1, 64).sparse(126, 1);
        near.flags = Some(vec![0; 190]);
        check(dev, &near);
        // A tile of global tokens and one ordinary one.
        let mut global = Case::dense(&[300], 1, 64).sparse(1, 1);
        global.flags = Some((0..300).map(|i| u8::from(i < 127)).collect());
        check(dev, &global);
    }

    mod forward {
        use super::{dense, others};
        on_hopper!(dense, others);
        mutants!("gene_attention_sm90");
    }
    mod backward {
        use super::{dense, others};
        on_hopper!(dense, others);
        mutants!("gene_attention_backward_sm90");
    }
    mod items {
        use super::{dense, others};
        on_hopper!(dense, others);
        mutants!("gene_attention_items_sm90");
    }
}
