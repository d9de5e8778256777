//! The streaming softmax loss: geometry of `kernels/prototype_loss*.cu`. Formulas in [`crate::ops::prototype_loss`]; tiling and
//! floors in `docs/kernels-prototype-loss.md`. What Hopper's own kernels take: [`hopper`].

mod hopper;
mod tiling;

pub(super) use tiling::most_bytes;

use super::functions::{
    SoftmaxCall, prototype_loss_columns, prototype_loss_columns_wide, prototype_loss_lse_total,
    prototype_loss_positives, prototype_loss_rows, prototype_loss_rows_total, prototype_loss_rows_wide,
    prototype_loss_small, reduce_columns,
};
use super::{Buf, Cuda, Grid};
use crate::device::Act;
use crate::error::Result;
use crate::ops::prototype_loss::{ColumnGradients, Dims, In, Out, PrototypeLoss, Target};
use tiling::{BLOCKS, Tiling};

/// The one-launch kernel: MOST_COLUMNS of `kernels/prototype_loss_small.cu`; shared memory that sm_80 has for a block; products
/// (R·P·D) above which tiles in registers win over the launches saved.
const SMALL_COLUMNS: usize = 128;
const SMALL_SHARED_BYTES: usize = 160 << 10;
const SMALL_PRODUCTS: usize = 1 << 25;

/// Shared memory of the one-launch kernel, where it is the one to take.
fn small(dims: Dims) -> Option<usize> {
    let Dims { rows, columns, width, .. } = dims;
    let padded = width.next_multiple_of(8);
    let bytes = 4 * (columns * (padded + 4) + 8 * (padded + SMALL_COLUMNS));
    let fits = columns <= SMALL_COLUMNS && bytes <= SMALL_SHARED_BYTES;
    (fits && rows * columns * width <= SMALL_PRODUCTS).then_some(bytes)
}

/// What the streaming kernels read.
struct Operands<'a, A: Act> {
    z: &'a Buf<A>,
    column: &'a Buf<A>,
    scale: Option<&'a Buf<f32>>,
    bias: Option<&'a Buf<f32>>,
    margin: Option<&'a Buf<f32>>,
    row_weight: Option<&'a Buf<f32>>,
    target_column: Option<&'a Buf<i32>>,
    target_mass: Option<&'a Buf<f32>>,
    mix: Option<&'a Buf<f32>>,
    teacher: [Option<&'a Buf<f32>>; 3],
    label: [Option<&'a Buf<i32>>; 2],
    same_bias: Option<&'a Buf<f32>>,
    call: SoftmaxCall,
}

impl<'a, A: Act> Operands<'a, A> {
    /// Dot products alone, times one scale: every row takes part.
    fn plain(dims: Dims, z: &'a Buf<A>, column: &'a Buf<A>, scale: f32) -> Self {
        Operands {
            z,
            column,
            scale: None,
            bias: None,
            margin: None,
            row_weight: None,
            target_column: None,
            target_mass: None,
            mix: None,
            teacher: [None; 3],
            label: [None; 2],
            same_bias: None,
            call: SoftmaxCall {
                rows: dims.rows as i32,
                columns: dims.columns as i32,
                width: dims.width as i32,
                entries: -1,
                first_self: 0,
                bias_in_target: i32::from(dims.bias_in_target),
                tiles_per_split: 0,
                scale,
                gradient_scale: dims.gradient_scale,
                sparse_share: 1.0,
                mix_share: 0.0,
                teacher_share: 0.0,
                teacher_scale: 0.0,
            },
        }
    }

    fn new(dims: Dims, input: &In<'a, Cuda, A>) -> Self {
        let mut o = Operands {
            scale: input.scale,
            bias: input.bias,
            margin: input.margin,
            row_weight: Some(input.row_weight),
            ..Operands::plain(dims, input.z, input.column, 1.0)
        };
        match &input.target {
            Target::Sparse { entries, column, mass, mix, teacher } => {
                (o.target_column, o.target_mass) = (Some(*column), *mass);
                o.call.entries = *entries as i32;
                if let Some(mix) = mix {
                    (o.mix, o.call.mix_share) = (Some(mix.matrix), mix.share);
                }
                if let Some(t) = teacher {
                    o.teacher = [Some(t.z), Some(t.column), Some(t.lse)];
                    (o.call.teacher_share, o.call.teacher_scale) = (t.share, t.scale);
                }
                o.call.sparse_share = 1.0 - o.call.mix_share - o.call.teacher_share;
            }
            Target::SameLabel { row_label, column_label, first_self, same_bias } => {
                o.label = [Some(*row_label), Some(*column_label)];
                o.same_bias = *same_bias;
                o.call.first_self = *first_self as i32;
            }
        }
        o
    }

    /// Whether a row's target spreads over columns that it does not name.
    fn dense(&self) -> bool {
        self.mix.is_some() || self.teacher[0].is_some() || self.label[0].is_some()
    }

    /// Weights and columns of a target of one column a row, which [`Operands::new`] set.
    fn one_column(&self) -> (&'a Buf<f32>, &'a Buf<i32>) {
        let (Some(weight), Some(column)) = (self.row_weight, self.target_column) else {
            unreachable!("sparse targets name columns")
        };
        (weight, column)
    }

    /// Floats for [`Operands::find_positives`].
    fn share_len(&self) -> usize {
        if self.label[0].is_some() { self.call.rows as usize } else { 0 }
    }

    /// For same-label targets: 1 over the number of each row's positives.
    fn find_positives<'s>(&self, cuda: &Cuda, share: &'s mut Buf<f32>) -> Result<Option<&'s Buf<f32>>> {
        let [Some(row_label), Some(column_label)] = self.label else { return Ok(None) };
        let SoftmaxCall { rows, columns, first_self, .. } = self.call;
        let grid = Grid::line((rows as usize).div_ceil(8), 256);
        prototype_loss_positives(cuda, grid, row_label, column_label, share, rows, columns, first_self)?;
        Ok(Some(share))
    }

    /// The whole first pass, for few columns.
    fn in_one_launch(&self, cuda: &Cuda, shared_bytes: usize, out: Out<'_, Cuda, A>) -> Result<()> {
        let Operands { z, column, scale, bias, margin, row_weight, call, .. } = *self;
        let Operands { target_column, target_mass, mix, teacher, label, same_bias, .. } = *self;
        let ([teacher_z, teacher_column, teacher_lse], [row_label, column_label]) = (teacher, label);
        prototype_loss_small(
            cuda,
            Grid::line((call.rows as usize).div_ceil(8).min(BLOCKS), 256).shared(shared_bytes),
            z,
            column,
            scale,
            bias,
            margin,
            row_weight,
            target_column,
            target_mass,
            mix,
            teacher_z,
            teacher_column,
            teacher_lse,
            row_label,
            column_label,
            same_bias,
            out.loss,
            out.lse,
            out.dz,
            i32::from(out.accumulate_dz),
            call,
        )
    }

    /// Statistics and, with `o`, weighted columns of every row and split.
    fn stream_columns(
        &self,
        cuda: &Cuda,
        tiling: &Tiling,
        share: Option<&Buf<f32>>,
        lse: Option<&Buf<f32>>,
        stats: &mut Buf<f32>,
        o: Option<&mut Buf<f32>>,
    ) -> Result<()> {
        let Operands { z, column, scale, bias, margin, row_weight, .. } = *self;
        let Operands { target_column, target_mass, mix, teacher, label, same_bias, .. } = *self;
        let call = SoftmaxCall { tiles_per_split: tiling.tiles_per_split as i32, ..self.call };
        let kernel = if tiling.wide { prototype_loss_rows_wide::<A> } else { prototype_loss_rows::<A> };
        let ([teacher_z, teacher_column, teacher_lse], [row_label, column_label]) = (teacher, label);
        kernel(
            cuda,
            tiling.grid(),
            z,
            column,
            scale,
            bias,
            margin,
            row_weight,
            target_column,
            target_mass,
            mix,
            teacher_z,
            teacher_column,
            teacher_lse,
            row_label,
            column_label,
            same_bias,
            share,
            lse,
            stats,
            o,
            call,
        )
    }

    /// Sums over this split's rows, or onto `dcolumn` where there is one split alone.
    fn stream_rows(
        &self,
        cuda: &Cuda,
        tiling: &Tiling,
        share: Option<&Buf<f32>>,
        lse: &Buf<f32>,
        Parts { column: dcolumn, sums, slots }: Parts<'_>,
    ) -> Result<()> {
        let Operands { z, column, scale, bias, margin, row_weight, .. } = *self;
        let Operands { target_column, target_mass, mix, teacher, label, same_bias, .. } = *self;
        let call = SoftmaxCall { tiles_per_split: tiling.tiles_per_split as i32, ..self.call };
        let kernel = if tiling.wide { prototype_loss_columns_wide::<A> } else { prototype_loss_columns::<A> };
        let ([teacher_z, teacher_column, teacher_lse], [row_label, column_label]) = (teacher, label);
        kernel(
            cuda,
            tiling.grid(),
            z,
            column,
            scale,
            bias,
            margin,
            row_weight,
            target_column,
            target_mass,
            mix,
            teacher_z,
            teacher_column,
            teacher_lse,
            row_label,
            column_label,
            same_bias,
            share,
            lse,
            dcolumn,
            sums,
            i32::from(tiling.splits == 1),
            slots.bias,
            slots.scale,
            slots.count as i32,
            call,
        )
    }
}

/// What the splits of the second pass set.
struct Parts<'a> {
    /// (splits, P, D); the gradient itself, added to, where there is one split.
    column: &'a mut Buf<f32>,
    /// (splits, slots, P).
    sums: Option<&'a mut Buf<f32>>,
    slots: Slots,
}

/// Where a split's sums of the gradients of bias and scale lie among (slots, P); -1 = not asked for.
#[derive(Clone, Copy)]
struct Slots {
    bias: i32,
    scale: i32,
    count: usize,
}

impl Slots {
    fn new(grads: &ColumnGradients<'_, Cuda>) -> Self {
        let count = usize::from(grads.bias.is_some()) + usize::from(grads.scale.is_some());
        Slots {
            bias: if grads.bias.is_some() { 0 } else { -1 },
            scale: if grads.scale.is_some() { count as i32 - 1 } else { -1 },
            count,
        }
    }
}

/// Blocks of kernels with a warp per row.
fn warp_per_row(rows: usize) -> Grid {
    Grid::line(rows.div_ceil(8), 256)
}

impl<A: Act> PrototypeLoss<A> for Cuda {
    fn prototype_loss_forward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        out: Out<'_, Self, A>,
    ) -> Result<()> {
        let Dims { rows, columns, width, .. } = dims;
        if rows == 0 {
            return Ok(());
        }
        let operands = Operands::new(dims, &input);
        if let Some(shared_bytes) = small(dims) {
            return operands.in_one_launch(self, shared_bytes, out);
        }
        let hopper = hopper::takes(self, dims, &operands);
        let tiling = match hopper {
            true => hopper::tiling(rows, columns, width),
            false => Tiling::new::<A>(rows, columns, width)?,
        };
        let splits = tiling.splits;
        let mut workspace = self.workspace();
        let [mut stats, mut o, mut share] =
            workspace.parts::<f32, 3>([splits * rows * 4, splits * rows * width, operands.share_len()])?;
        let share = operands.find_positives(self, &mut share)?;
        let online = !operands.dense();
        if !online {
            operands.stream_columns(self, &tiling, share, None, &mut stats, None)?;
            prototype_loss_lse_total(self, warp_per_row(rows), &stats, out.lse, rows as i32, splits as i32)?;
        }
        if hopper {
            hopper::stream_columns(self, dims, &operands, &tiling, &mut stats, &mut o)?;
        } else {
            let lse = (!online).then_some(&*out.lse);
            operands.stream_columns(self, &tiling, share, lse, &mut stats, Some(&mut o))?;
        }
        prototype_loss_rows_total(
            self,
            warp_per_row(rows),
            input.column,
            input.scale,
            input.row_weight,
            operands.target_column,
            operands.target_mass,
            operands.label[0],
            share,
            &stats,
            &o,
            out.loss,
            out.lse,
            out.dz,
            splits as i32,
            i32::from(online),
            i32::from(out.accumulate_dz),
            operands.call,
        )
    }

    fn prototype_loss_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        lse: &Buf<f32>,
        grads: ColumnGradients<'_, Self>,
    ) -> Result<()> {
        let Dims { rows, columns, width, .. } = dims;
        if rows == 0 {
            return Ok(());
        }
        let operands = Operands::new(dims, &input);
        let hopper = hopper::takes(self, dims, &operands);
        let tiling = match hopper {
            true => hopper::tiling(columns, rows, width),
            false => Tiling::new::<A>(columns, rows, width)?,
        };
        let splits = tiling.splits;
        if hopper && splits == 1 {
            return hopper::stream_rows(self, dims, &operands, &tiling, lse, hopper::Sums::Added(grads));
        }
        let slots = Slots::new(&grads);
        let partial = if splits > 1 { splits * columns * width } else { 0 };
        let mut workspace = self.workspace();
        let [mut sums, mut partial, mut share] =
            workspace.parts::<f32, 3>([splits * slots.count * columns, partial, operands.share_len()])?;
        let share = operands.find_positives(self, &mut share)?;
        let column = if splits > 1 { &mut partial } else { &mut *grads.column };
        let parts = Parts { column, sums: (slots.count > 0).then_some(&mut sums), slots };
        if hopper {
            hopper::stream_rows(self, dims, &operands, &tiling, lse, hopper::Sums::Parts(parts))?;
        } else {
            operands.stream_rows(self, &tiling, share, lse, parts)?;
        }
        let add_up = |partial: &Buf<f32>,
                      first: &mut Buf<f32>,
                      second: Option<&mut Buf<f32>>,
                      len: usize,
                      split: usize| {
            let grid = Grid::line(len.div_ceil(32), 256);
            reduce_columns(self, grid, partial, first, second, splits as i32, len as i32, split as i32)
        };
        if splits > 1 {
            add_up(&partial, grads.column, None, columns * width, columns * width)?;
        }
        match (grads.bias, grads.scale) {
            (Some(bias), scale) => add_up(&sums, bias, scale, slots.count * columns, columns),
            (None, Some(scale)) => add_up(&sums, scale, None, columns, columns),
            (None, None) => Ok(()),
        }
    }

    fn prototype_loss_lse(
        &self,
        dims: Dims,
        z: &Buf<A>,
        column: &Buf<A>,
        scale: f32,
        lse: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, columns, width, .. } = dims;
        if rows == 0 {
            return Ok(());
        }
        let tiling = Tiling::new::<A>(rows, columns, width)?;
        let mut workspace = self.workspace();
        let mut stats = workspace.one::<f32>(tiling.splits * rows * 4)?;
        Operands::plain(dims, z, column, scale)
            .stream_columns(self, &tiling, None, None, &mut stats, None)?;
        prototype_loss_lse_total(self, warp_per_row(rows), &stats, lse, rows as i32, tiling.splits as i32)
    }
}
