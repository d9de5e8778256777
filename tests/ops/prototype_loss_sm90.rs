//! The softmax loss as a Hopper GPU runs it: its own kernels for bf16 rows of whole 16-byte units up to their widest and targets of
//! one column, the portable ones for everything else.

use crate::ActSample;
use crate::common::cases::by_threads;
use crate::common::softmax::{Aim, Case, oracle, run};
pub use crate::prototype_loss::{
    Loss, a_nan_anywhere_reaches_the_loss, assert_kept, balanced_supervised_contrast, check,
    columns_of_infinite_bias_are_left_out, edges_of_the_softmax, gradients_are_added_where_asked,
    losses_are_never_negative_on_one_hot_targets, skipped_rows_change_nothing, stored,
    streaming_equals_materialised,
};

on_hopper!(
    streaming_equals_materialised,
    balanced_supervised_contrast,
    edges_of_the_softmax,
    losses_are_never_negative_on_one_hot_targets,
    skipped_rows_change_nothing,
    columns_of_infinite_bias_are_left_out,
    gradients_are_added_where_asked,
    a_nan_anywhere_reaches_the_loss,
    odd_sizes,
    wide_rows,
    rows_that_take_no_part,
    one_column_of_some_mass,
    same_bits_for_any_order_of_blocks,
);

/// Rows and columns: one more than tiles of 64 and 128, a lone row, eight tiles in one split, so that stages are used again, and two
/// splits of either pass (600: ten tiles). Widths: 8, whole 64-column tiles, one 16-byte unit more, both sides of 128, the widest.
const SIZES: [(usize, usize, usize); 8] = [
    (1, 129, 8),
    (130, 200, 64),
    (65, 193, 72),
    (40, 600, 128),
    (600, 140, 136),
    (129, 131, 200),
    (20, 500, 256),
    (450, 129, 16),
];

/// Wider than 256: resident tiles of 64; streamed ones of 64 up to width 512, of 32 beyond, where two blocks share the columns of O.
/// Stages used again, several splits of either pass; beyond 768 the portable kernels.
const WIDE_SIZES: [(usize, usize, usize); 6] =
    [(65, 193, 264), (20, 500, 512), (140, 131, 520), (40, 300, 768), (300, 40, 768), (9, 130, 1152)];

/// Every per-column array, uneven scales, a mass below 1 and rows without a label.
fn of_one_column(seed: u64, rows: usize, columns: usize, width: usize) -> Case {
    let case = Case::new(seed, rows, columns, width).everything(seed, 0.0, 0.0);
    let Aim::Sparse { column, mass: Some(mass), .. } = &case.aim else { unreachable!() };
    let first = |i: usize| if i % 11 == 7 { -1 } else { column[3 * i] };
    let aim = Aim::Sparse {
        entries: 1,
        column: (0..rows).map(first).collect(),
        mass: Some((0..rows).map(|i| mass[3 * i]).collect()),
        epsilon: 0.0,
        delta: 0.0,
    };
    Case { aim, ..case }
}

fn odd_sizes<B: Loss<A>, A: ActSample>(dev: &B) {
    for (seed, (rows, columns, width)) in SIZES.into_iter().enumerate() {
        let case = stored::<A>(Case::new(seed as u64, rows, columns, width));
        check::<B, A>(dev, &case, &format!("one-hot {rows}×{columns}×{width}"));
    }
}

fn wide_rows<B: Loss<A>, A: ActSample>(dev: &B) {
    for (seed, (rows, columns, width)) in WIDE_SIZES.into_iter().enumerate() {
        let case = stored::<A>(of_one_column(seed as u64, rows, columns, width));
        check::<B, A>(dev, &case, &format!("{rows}×{columns}×{width}"));
    }
}

/// They hold NaN, in whole tiles and between others, and neither pass may notice.
fn rows_that_take_no_part<B: Loss<A>, A: ActSample>(dev: &B) {
    for (rows, columns, width) in [(140, 140, 72), (70, 200, 256), (140, 130, 264), (70, 129, 768)] {
        holes_of_nan::<B, A>(dev, rows, columns, width);
    }
}

fn holes_of_nan<B: Loss<A>, A: ActSample>(dev: &B, rows: usize, columns: usize, width: usize) {
    let mut want = stored::<A>(of_one_column(5, rows, columns, width));
    let dead = |i: usize| i.is_multiple_of(3) || (64..100).contains(&i);
    (0..rows).filter(|i| dead(*i)).for_each(|i| want.weight[i] = 0.0);
    let mut holes = want.clone();
    (0..rows).filter(|i| dead(*i)).for_each(|i| holes.z[i * width..(i + 1) * width].fill(f32::NAN));
    let got = run::<B, A>(dev, &holes);
    assert_kept::<B, A>(dev, &holes, &got, &oracle(&want), &format!("NaN in {rows}×{columns}×{width}"));
}

fn one_column_of_some_mass<B: Loss<A>, A: ActSample>(dev: &B) {
    for (rows, columns, width) in [(70, 193, 40), (30, 130, 256)] {
        let mut case = stored::<A>(of_one_column(6, rows, columns, width));
        check::<B, A>(dev, &case, &format!("mass {rows}×{columns}×{width}"));
        case.bias_in_target = false;
        check::<B, A>(dev, &case, &format!("mass, no bias {rows}×{columns}×{width}"));
    }
}

fn same_bits_for_any_order_of_blocks<B: Loss<A>, A: ActSample>(dev: &B) {
    for (rows, columns, width) in [(200, 600, 72), (70, 520, 520)] {
        let case = stored::<A>(of_one_column(7, rows, columns, width));
        let [one, two, three] = by_threads(|| run::<B, A>(dev, &case));
        assert!(one == two && one == three);
    }
}

/// The same bits from schedule to schedule, which is also from one order of warps to another.
#[cfg(emulator)]
#[test]
fn same_bits_in_every_schedule() {
    use cellrefine::cuda::Schedule;
    for (rows, columns, width) in [(150, 300, 136), (70, 300, 520)] {
        let case = stored::<half::bf16>(of_one_column(8, rows, columns, width));
        let [late, reversed, eager] = Schedule::ALL.map(|s| run::<_, half::bf16>(&crate::hopper(s), &case));
        assert!(late == reversed && late == eager);
    }
}

/// A few cases that pass through every path of the kernels, quick enough to be run for every fault of the mutants.
#[cfg(emulator)]
mod faults {
    use super::*;

    mod up_to_256 {
        use super::*;

        on_hopper!(one_of_each);

        fn one_of_each<B: Loss<A>, A: ActSample>(dev: &B) {
            for (rows, columns, width) in [(70, 140, 72), (130, 520, 136), (520, 130, 136)] {
                let case = stored::<A>(Case::new(81, rows, columns, width));
                check::<B, A>(dev, &case, &format!("one-hot {rows}×{columns}×{width}"));
            }
            holes_of_nan::<B, A>(dev, 140, 140, 72);
            holes_of_nan::<B, A>(dev, 70, 200, 256);
        }
        mutants!("prototype_loss_sm90");
    }

    mod wide {
        use super::*;

        on_hopper!(one_of_each);

        fn one_of_each<B: Loss<A>, A: ActSample>(dev: &B) {
            for (rows, columns, width) in [(70, 300, 264), (300, 140, 264), (40, 200, 520)] {
                let case = stored::<A>(Case::new(81, rows, columns, width));
                check::<B, A>(dev, &case, &format!("one-hot {rows}×{columns}×{width}"));
            }
            holes_of_nan::<B, A>(dev, 140, 130, 520);
        }
        mutants!("prototype_loss_wide_sm90");
    }
}
