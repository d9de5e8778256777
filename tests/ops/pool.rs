//! The vector of a cell: its first token or the mean of its genes, special tokens left out.

use crate::ActSample;
use crate::common::cases;
use crate::common::close::{assert_close, assert_rounded};
use crate::common::guarded::{input, poisoned};
use cellrefine::ops::pool;

on_every_backend!(A: forward_and_backward);
on_emulated!(A: forward_and_backward);
mutants!("pool");

fn forward_and_backward<B: pool::Pool<A>, A: ActSample>(dev: &B) {
    // Cells of one token, of special tokens alone, longer than a block of the sum.
    let start = cases::cell_start(&[1, 2, 3, 17, 200, 1, 64]);
    let (tokens, cells) = (*start.last().unwrap() as usize, start.len() - 1);
    for width in [1, 7, 16, 33, 256] {
        for (pooling, prefix, suffix) in
            [(pool::Pooling::Cls, 1, 1), (pool::Pooling::Mean, 0, 0), (pool::Pooling::Mean, 1, 1)]
        {
            let dims = pool::Dims { tokens, cells, width, pooling, prefix, suffix };
            let (x, dh) =
                (cases::normal::<A>(1, tokens * width, 1.0), cases::normal::<f32>(2, cells * width, 1.0));
            let (x_buf, dh_buf, start_buf) = (input(dev, &x), input(dev, &dh), input(dev, &start));
            let mut h = poisoned::<B, f32>(dev, cells * width);
            let mut dx = poisoned::<B, A>(dev, tokens * width);
            pool::forward(dev, dims, x_buf.buf(), start_buf.buf(), h.buf_mut()).unwrap();
            pool::backward(dev, dims, dh_buf.buf(), start_buf.buf(), dx.buf_mut()).unwrap();
            let (mut want, mut want_dx) = (vec![0.0; cells * width], vec![0.0; tokens * width]);
            for c in 0..cells {
                let (s, e) = (start[c] as usize, start[c + 1] as usize);
                let members: Vec<usize> = match pooling {
                    pool::Pooling::Cls => vec![s],
                    pool::Pooling::Mean if e - s > prefix + suffix => (s + prefix..e - suffix).collect(),
                    pool::Pooling::Mean => (s..e).collect(),
                };
                for t in &members {
                    for i in 0..width {
                        want[c * width + i] += x[t * width + i].to_f32() as f64 / members.len() as f64;
                        want_dx[t * width + i] = dh[c * width + i] as f64 / members.len() as f64;
                    }
                }
            }
            assert_close(&format!("h {dims:?}"), &h.read(), &want, 1e-6, 1e-5);
            assert_rounded(&format!("dx {dims:?}"), &dx.read(), &want_dx, 1e-6);
        }
    }
}
