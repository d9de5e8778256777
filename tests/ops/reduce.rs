//! Sums and sums of squares in f64, in an order that no thread count changes.

use crate::common::cases;
use crate::common::close::assert_same_bits;
use crate::common::guarded::input;
use cellrefine::ops::reduce;

on_every_backend!(sums_are_f64_in_fixed_order);
on_emulated!(sums_are_f64_in_fixed_order);
mutants!("reduce");

fn sums_are_f64_in_fixed_order<B: reduce::Reduce>(dev: &B) {
    for len in [0usize, 1, 30, 31, 16_384, 16_385, 100_003] {
        let x = cases::normal::<f32>(1, len + 3, 1e3);
        let x_buf = input(dev, &x);
        let [one, two, three] = cases::by_threads(|| {
            let mut scalars = input(dev, &[7.0f64, f64::NAN, f64::NAN]);
            reduce::sum(dev, x_buf.buf(), len, scalars.buf_mut(), 1).unwrap();
            reduce::sum_squares(dev, x_buf.buf(), len, scalars.buf_mut(), 2).unwrap();
            scalars.read()
        });
        let sum: f64 = x[..len].iter().map(|x| *x as f64).sum();
        let squares: f64 = x[..len].iter().map(|x| (*x as f64).powi(2)).sum();
        let absolute: f64 = x[..len].iter().map(|x| x.abs() as f64).sum();
        assert_eq!(one[0], 7.0);
        assert!((one[1] - sum).abs() <= 1e-13 * absolute, "{} {sum}", one[1]);
        assert!((one[2] - squares).abs() <= 1e-13 * squares, "{} {squares}", one[2]);
        assert_same_bits("two threads", &two, &one);
        assert_same_bits("three threads", &three, &one);
    }
    let (bad, mut scalars) = (input(dev, &[1.0, f32::NAN, 2.0]), input(dev, &[0.0f64]));
    reduce::sum_squares(dev, bad.buf(), 3, scalars.buf_mut(), 0).unwrap();
    assert!(scalars.read()[0].is_nan());
}
