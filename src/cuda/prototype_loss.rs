//! The streaming softmax loss: geometry of `kernels/prototype_loss.cu` and `prototype_loss_total.cu`. Formulas in
//! [`crate::ops::prototype_loss`]; tiling and floors in `docs/kernels-prototype-loss.md`.

use super::functions::{
    SoftmaxCall, prototype_loss_columns, prototype_loss_columns_wide, prototype_loss_lse_total,
    prototype_loss_positives, prototype_loss_rows, prototype_loss_rows_total, prototype_loss_rows_wide,
    prototype_loss_small, reduce_columns,
};
use super::workspace::bytes;
use super::{Buf, Cuda, Grid};
use crate::device::Act;
use crate::error::{Error, Result};
use crate::ops::prototype_loss::{ColumnGradients, Dims, In, Out, PrototypeLoss, Target};

/// Widths of the first pair of kernels, and of the second.
const NARROW: usize = 256;
const WIDE: usize = 1152;
/// Blocks that keep the largest GPU busy: two for each of 132 multiprocessors. The streamed operand is split until there are so
/// many, but a split has at least [`LEAST_TILES`] tiles, so that its partial sums stay a small share of its work.
const BLOCKS: usize = 264;
const LEAST_TILES: usize = 2;

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

/// What a block keeps and what it walks over, in rows of the one operand and of the other.
struct Tiling {
    wide: bool,
    /// Grid in x: tiles of the resident operand.
    resident_tiles: usize,
    /// Grid in y.
    splits: usize,
    /// Streamed tiles of a split.
    tiles_per_split: usize,
    shared_bytes: usize,
}

impl Tiling {
    fn new<A: Act>(resident: usize, streamed: usize, width: usize) -> Result<Self> {
        if width > WIDE {
            return Err(Error::usage("the rows are too wide for the softmax loss kernels")
                .found(width)
                .wanted(format!("at most {WIDE}")));
        }
        let wide = width > NARROW;
        let [own, tile] = tile_rows::<A>(wide);
        let rows = (own + 2 * tile) * (width.next_multiple_of(16) + 8) * 2;
        let parts = if wide { 8 * 2 * 32 * 16 } else { 0 };
        let (resident_tiles, tiles) = (resident.div_ceil(own), streamed.div_ceil(tile));
        let tiles_per_split = tiles.div_ceil((BLOCKS / resident_tiles.max(1)).max(1)).max(LEAST_TILES);
        Ok(Tiling {
            wide,
            resident_tiles,
            splits: tiles.div_ceil(tiles_per_split).max(1),
            tiles_per_split,
            shared_bytes: if A::IS_F32 { 0 } else { rows + parts },
        })
    }

    fn grid(&self) -> Grid {
        Grid::plane(self.resident_tiles, self.splits, 256).shared(self.shared_bytes)
    }
}

/// BM and BN of the kernels: rows of a resident and of a streamed tile.
fn tile_rows<A: Act>(wide: bool) -> [usize; 2] {
    match (A::IS_F32, wide) {
        (true, false) => [64, 64],
        (true, true) => [32, 64],
        (false, false) => [128, 32],
        (false, true) => [32, 16],
    }
}

/// Bytes of workspace for at most so many rows and columns, in both passes.
pub(super) fn most_bytes<A: Act>(rows: usize, columns: usize, width: usize) -> usize {
    let [own, tile] = tile_rows::<A>(width > NARROW);
    // Resident rows times splits: splits fill up to BLOCKS tiles of residents, and have at least LEAST_TILES tiles each.
    let split = |resident: usize, streamed: usize| {
        let splits = streamed.div_ceil(tile).div_ceil(LEAST_TILES);
        resident.max((resident * splits).min(BLOCKS * own))
    };
    let (forward, backward) = (split(rows, columns), split(columns, rows));
    let forward = bytes::<f32>(&[forward * 4, forward * width, rows]);
    forward.max(bytes::<f32>(&[backward * 2, backward * width, rows]))
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
        let tiling = Tiling::new::<A>(rows, columns, width)?;
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
        let lse = (!online).then_some(&*out.lse);
        operands.stream_columns(self, &tiling, share, lse, &mut stats, Some(&mut o))?;
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
        let tiling = Tiling::new::<A>(columns, rows, width)?;
        let splits = tiling.splits;
        // Slots of the sums: the gradient of the bias, that of the scale, or both.
        let slots = usize::from(grads.bias.is_some()) + usize::from(grads.scale.is_some());
        let bias_slot = if grads.bias.is_some() { 0 } else { -1 };
        let scale_slot = if grads.scale.is_some() { slots as i32 - 1 } else { -1 };
        let parts = if splits > 1 { splits * columns * width } else { 0 };
        let mut workspace = self.workspace();
        let [mut sums, mut partial, mut share] =
            workspace.parts::<f32, 3>([splits * slots * columns, parts, operands.share_len()])?;
        let share = operands.find_positives(self, &mut share)?;

        let Operands { z, column, scale, bias, margin, row_weight, .. } = operands;
        let Operands { target_column, target_mass, mix, teacher, label, same_bias, .. } = operands;
        let call = SoftmaxCall { tiles_per_split: tiling.tiles_per_split as i32, ..operands.call };
        let kernel = if tiling.wide { prototype_loss_columns_wide::<A> } else { prototype_loss_columns::<A> };
        let ([teacher_z, teacher_column, teacher_lse], [row_label, column_label]) = (teacher, label);
        kernel(
            self,
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
            if splits > 1 { &mut partial } else { &mut *grads.column },
            (slots > 0).then_some(&mut sums),
            i32::from(splits == 1),
            bias_slot,
            scale_slot,
            slots as i32,
            call,
        )?;
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
            (Some(bias), scale) => add_up(&sums, bias, scale, slots * columns, columns),
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
