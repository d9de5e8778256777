//! Rows gathered by an index and added back.

use crate::ActSample;
use crate::common::cases;
use crate::common::close::{assert_rounded, assert_same_bits, wide};
use crate::common::guarded::{input, poisoned};
use cellrefine::ops::rows;

on_every_backend!(A: gather_and_scatter);
on_emulated!(A: gather_and_scatter);
mutants!("rows");

fn gather_and_scatter<B: rows::Rows<A>, A: ActSample>(dev: &B) {
    for (total, width) in cases::rows_by_widths() {
        let index: Vec<u32> = (0..total as u32).filter(|i| i % 3 != 1).rev().collect();
        let dims = rows::Dims { rows: total, gathered: index.len(), width };
        let (x, dy) =
            (cases::normal::<A>(1, total * width, 1.0), cases::normal::<A>(2, index.len() * width, 1.0));
        let (x_buf, dy_buf, index_buf) = (input(dev, &x), input(dev, &dy), input(dev, &index));
        let (mut y, mut dx) = (poisoned::<B, A>(dev, index.len() * width), input(dev, &x));
        rows::gather(dev, dims, x_buf.buf(), index_buf.buf(), y.buf_mut()).unwrap();
        rows::scatter_add(dev, dims, dy_buf.buf(), index_buf.buf(), dx.buf_mut()).unwrap();
        let (mut want_y, mut want_dx) = (Vec::new(), wide(&x));
        for (m, row) in index.iter().enumerate() {
            want_y.extend_from_slice(&x[*row as usize * width..][..width]);
            for i in 0..width {
                want_dx[*row as usize * width + i] += dy[m * width + i].to_f32() as f64;
            }
        }
        assert_same_bits("gathered rows", &y.read(), &want_y);
        assert_rounded("scattered rows", &dx.read(), &want_dx, 1e-6);
    }
}
