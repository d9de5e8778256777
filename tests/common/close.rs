//! Comparison with an f64 oracle, with a report of the worst element.

use cellrefine::device::Act;

/// Widened to f64.
pub fn wide<A: Act>(x: &[A]) -> Vec<f64> {
    x.iter().map(|x| x.to_f32() as f64).collect()
}

/// Fails when `|got - want| > abs + rel · |want|` anywhere, or when something is not finite; names the worst element.
#[track_caller]
pub fn assert_close<A: Act>(name: &str, got: &[A], want: &[f64], abs: f64, rel: f64) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let mut worst: Option<(f64, usize)> = None;
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g.to_f32() as f64 - w).abs();
        let ratio = if error.is_finite() { error / (abs + rel * w.abs()) } else { f64::INFINITY };
        if ratio > worst.map_or(1.0, |(r, _)| r) {
            worst = Some((ratio, i));
        }
    }
    if let Some((ratio, i)) = worst {
        panic!(
            "{name}: element {i} of {} is {:?}, the oracle says {:.9e}: {ratio:.1} times the bound (abs {abs:.1e}, rel {rel:.1e})",
            want.len(),
            got[i],
            want[i]
        );
    }
}

/// The bound of `docs/architecture.md` for one store in the activation type: the largest error may be twice that of the
/// oracle's own result rounded to `A`, plus `floor` times the largest magnitude (f32 sums; 1e-5 serves sums of hundreds).
#[track_caller]
pub fn assert_rounded<A: Act>(name: &str, got: &[A], want: &[f64], floor: f64) {
    assert_close(name, got, want, rounding_bound::<A>(want, floor), 0.0);
}

/// The bound itself, for results with several stores: pass what the oracle would store.
pub fn rounding_bound<A: Act>(want: &[f64], floor: f64) -> f64 {
    let largest = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
    let rounding = want.iter().fold(0.0f64, |m, w| m.max((A::from_f32(*w as f32).to_f32() as f64 - w).abs()));
    2.0 * rounding + floor * largest + 1e-30
}

/// Equal bits, or the first difference.
#[track_caller]
pub fn assert_same_bits<T: bytemuck::Pod + std::fmt::Debug>(name: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    if let Some(i) = (0..got.len()).find(|&i| bytemuck::bytes_of(&got[i]) != bytemuck::bytes_of(&want[i])) {
        panic!("{name}: element {i} is {:?}, not {:?}", got[i], want[i]);
    }
}
