//! Sums and sums of squares in f64, in an order that no thread count changes.

use crate::common::cases;
use crate::common::close::assert_same_bits;
use crate::common::guarded::input;
use cellrefine::ops::reduce;

on_every_backend!(sums_are_f64_in_fixed_order, the_first_bad_element_is_found);
on_emulated!(sums_are_f64_in_fixed_order, the_first_bad_element_is_found);
mutants!("reduce");

fn sums_are_f64_in_fixed_order<B: reduce::Reduce>(dev: &B) {
    for len in [0usize, 1, 30, 31, 16_384, 16_385, 100_003] {
        let x = cases::normal::<f32>(1, len + 3, 1e3);
        let x_buf = input(dev, &x);
        let [one, two, three] = cases::by_threads(|| {
            let mut scalars = input(dev, &[7.0f64, f64::NAN, f64::NAN, 3.0, 5.0]);
            reduce::sum(dev, x_buf.buf(), len, scalars.buf_mut(), 1).unwrap();
            reduce::sum_squares(dev, x_buf.buf(), len, scalars.buf_mut(), 2).unwrap();
            reduce::add_sum(dev, x_buf.buf(), len, scalars.buf_mut(), 3).unwrap();
            reduce::add_sum_squares(dev, x_buf.buf(), len, scalars.buf_mut(), 4).unwrap();
            scalars.read()
        });
        let sum: f64 = x[..len].iter().map(|x| *x as f64).sum();
        let squares: f64 = x[..len].iter().map(|x| (*x as f64).powi(2)).sum();
        let absolute: f64 = x[..len].iter().map(|x| x.abs() as f64).sum();
        assert_eq!(one[0], 7.0);
        assert!((one[1] - sum).abs() <= 1e-13 * absolute, "{} {sum}", one[1]);
        assert!((one[2] - squares).abs() <= 1e-13 * squares, "{} {squares}", one[2]);
        assert_eq!((one[3], one[4]), (3.0 + one[1], 5.0 + one[2]));
        assert_same_bits("two threads", &two, &one);
        assert_same_bits("three threads", &three, &one);
    }
    // A part that does not start at 16 bytes.
    let (x, mut scalars) = (cases::normal::<f32>(2, 300, 1.0), input(dev, &[0.0f64]));
    let x_buf = input(dev, &x);
    // SAFETY: the part is read alone.
    let part = unsafe { dev.part(x_buf.buf(), 1..300) };
    reduce::sum(dev, &part, 299, scalars.buf_mut(), 0).unwrap();
    let want: f64 = x[1..].iter().map(|x| *x as f64).sum();
    assert!((scalars.read()[0] - want).abs() <= 1e-13 * 300.0, "{} {want}", scalars.read()[0]);
    let (bad, mut scalars) = (input(dev, &[1.0, f32::NAN, 2.0]), input(dev, &[0.0f64]));
    reduce::sum_squares(dev, bad.buf(), 3, scalars.buf_mut(), 0).unwrap();
    assert!(scalars.read()[0].is_nan());
}

/// In any place of any length; not where the sum is finite; and the length where nothing is bad.
fn the_first_bad_element_is_found<B: reduce::Reduce>(dev: &B) {
    let find = |x: &[f32], len: usize, norm: f64| {
        let (x, mut scalars) = (input(dev, x), input(dev, &[norm, -7.0, 8.0]));
        reduce::first_bad(dev, x.buf(), len, scalars.buf_mut(), 0, 1).unwrap();
        let scalars = scalars.read();
        assert!(scalars[0].to_bits() == norm.to_bits() && scalars[2] == 8.0);
        scalars[1]
    };
    for (len, bad) in [(1, 0), (3, 2), (1023, 1022), (1024, 0), (1025, 1024), (5000, 2049), (5000, 4998)] {
        let mut x = vec![1.0f32; len + 2];
        x[bad] = f32::NEG_INFINITY;
        x[bad + 1] = f32::NAN;
        assert_eq!(find(&x, len, f64::NAN), bad as f64, "of {len}");
        assert_eq!(find(&x, len, f64::INFINITY), bad as f64, "of {len}");
        assert_eq!(find(&x, len, 1e300), -7.0, "a finite sum");
        assert_eq!(find(&x, bad, f64::NAN), bad as f64, "beyond the end of {bad}");
    }
    assert_eq!(find(&[f32::MAX; 9], 9, f64::INFINITY), 9.0);
}
