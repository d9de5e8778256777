//! The streaming softmax loss allocates nothing of the size of rows × columns, in any of its modes.

use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::ops::prototype_loss::{self, ColumnGradients, Dims, In, Out, Target, Teacher};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting.
struct Counting;

// SAFETY: passes every call on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(held, Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn no_matrix_of_rows_by_columns() {
    let (dev, n, width) = (Cpu, 4000, 8);
    let f = |n: usize, x: f32| dev.upload(&vec![x; n]).unwrap();
    let (z, weight) = (f(n * width, 0.1), f(n, 1.0 / n as f32));
    let label = dev.upload(&(0..n as i32).map(|i| i % 50).collect::<Vec<i32>>()).unwrap();
    let (mut loss, mut lse, mut dz) = (f(n, 0.0), f(n, 0.0), f(n * width, 0.0));
    let (mut dcolumn, teacher_lse) = (f(n * width, 0.0), f(n, (n as f32).ln() + 0.08));
    let dims = Dims { rows: n, columns: n, width, gradient_scale: 1.0, bias_in_target: true };
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    for mode in 0..3 {
        let input = || In::<Cpu, f32> {
            z: &z,
            column: &z,
            scale: None,
            bias: None,
            margin: None,
            row_weight: &weight,
            target: match mode {
                0 => Target::SameLabel {
                    row_label: &label,
                    column_label: &label,
                    first_self: 0,
                    same_bias: None,
                },
                _ => Target::Sparse {
                    entries: 1,
                    column: &label,
                    mass: None,
                    mix: None,
                    teacher: (mode == 1).then_some(Teacher {
                        z: &z,
                        column: &z,
                        lse: &teacher_lse,
                        scale: 1.0,
                        share: 0.2,
                    }),
                },
            },
        };
        let out = Out { loss: &mut loss, lse: &mut lse, dz: &mut dz, accumulate_dz: false };
        prototype_loss::forward(&dev, dims, input(), out).unwrap();
        let grads = ColumnGradients { column: &mut dcolumn, bias: None, scale: None };
        prototype_loss::backward(&dev, dims, input(), &lse, grads).unwrap();
    }
    let most = MOST.load(Relaxed) - before;
    let matrix = n * n * size_of::<f32>();
    assert!(most < matrix / 16, "{most} bytes held beside the operands; the matrix would take {matrix}");
    assert!(most > 10_000, "the count itself works: {most}");
}
