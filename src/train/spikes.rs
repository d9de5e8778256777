//! Is this gradient norm, or this loss, far above the ones before it?
//!
//! ```text
//! window   the last 128 values; nothing is said until it is full
//! z        (value - mean) / max(std, |mean| / 100)         of the window, which does not hold the value yet
//! spike    z > train.spike_z
//! ```
//! The detector of llm.c, changed in three places. The value is scored before it enters, so that z has no upper end: within a window
//! of 128 that holds the value itself, z is 11.3 at most. A spike enters as the threshold that it crossed: one of them does not
//! blind the window for 128 steps, and a run that has moved to another level for good is let through after a few. The floor of
//! one part in a hundred keeps a window of nearly equal values from calling rounding a spike. Sums are taken anew each time, in the
//! window's order: nothing drifts, and a resumed run, which finds the window in its checkpoint, decides the same.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Values that a new one is compared with.
pub const WINDOW: usize = 128;
/// The standard deviation is taken for at least this share of the mean.
const FLOOR: f64 = 0.01;

/// A value far above its window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spike {
    /// Standard deviations above the mean.
    pub z: f64,
    /// The value.
    pub value: f64,
    /// Mean of the window.
    pub mean: f64,
}

/// The last values, oldest first. Saved as one line of text, which holds every bit of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Window(VecDeque<f64>);

impl Window {
    /// Scores a finite `value`, and takes it in. `Some` where it lies more than `threshold` standard deviations above the window.
    pub fn take(&mut self, value: f64, threshold: f64) -> Option<Spike> {
        if self.0.len() < WINDOW {
            self.0.push_back(value);
            return None;
        }
        let n = self.0.len() as f64;
        let mean = self.0.iter().sum::<f64>() / n;
        let variance = self.0.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        let std = variance.sqrt().max(FLOOR * mean.abs());
        // A window of zeros says nothing about what is large.
        let z = if std > 0.0 { (value - mean) / std } else { 0.0 };
        let spike = (z > threshold).then_some(Spike { z, value, mean });
        self.0.pop_front();
        self.0.push_back(if spike.is_some() { mean + threshold * std } else { value });
        spike
    }
}

impl From<Window> for String {
    fn from(window: Window) -> String {
        // The shortest text that reads back as the same number.
        window.0.iter().map(f64::to_string).collect::<Vec<_>>().join(" ")
    }
}

impl TryFrom<String> for Window {
    type Error = String;

    fn try_from(text: String) -> Result<Window, String> {
        let values: VecDeque<f64> = text
            .split_whitespace()
            .map(|word| word.parse().map_err(|e| format!("a window of spikes holds {word:?}: {e}")))
            .collect::<Result<_, _>>()?;
        match values.len() <= WINDOW && values.iter().all(|value| value.is_finite()) {
            true => Ok(Window(values)),
            false => Err(format!("a window of spikes holds at most {WINDOW} finite numbers")),
        }
    }
}

/// What a run remembers of its norms and losses: part of the state of its loop.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Spikes {
    /// Norms of all steps that were finite.
    pub norms: Window,
    /// Losses of the logged steps.
    pub losses: Window,
    /// Spikes so far.
    pub seen: u64,
    /// Updates left out for one.
    pub skipped: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two values in turn: mean 2, standard deviation 1.
    fn steady() -> Window {
        let mut window = Window::default();
        for i in 0..WINDOW {
            assert_eq!(window.take(1.0 + 2.0 * (i % 2) as f64, 0.0), None, "not full at {i}");
        }
        window
    }

    #[test]
    fn z_is_of_the_window_before() {
        let spike = steady().take(1000.0, 9.0).unwrap();
        assert_eq!(spike, Spike { z: 998.0, value: 1000.0, mean: 2.0 });
        assert!(steady().take(11.0, 9.0).is_none() && steady().take(11.1, 9.0).is_some());
        assert!(steady().take(-1000.0, 9.0).is_none(), "a small norm is no spike");
    }

    #[test]
    fn one_spike_does_not_hide_the_next_and_a_new_level_is_accepted() {
        let mut window = steady();
        assert!(window.take(1e9, 9.0).is_some() && window.take(1e9, 9.0).is_some());
        let mut window = steady();
        let spikes = (0..200).filter(|i| window.take(100.0 + (i % 2) as f64, 9.0).is_some()).count();
        assert!((1..20).contains(&spikes), "{spikes}");
        assert!(window.take(1e4, 9.0).is_some());
    }

    #[test]
    fn equal_values_and_zeros_cry_no_wolf() {
        let of = |value: f64| {
            let mut window = Window::default();
            (0..WINDOW).for_each(|_| assert!(window.take(value, 9.0).is_none()));
            window
        };
        assert!(of(5.0).take(5.4, 9.0).is_none() && of(5.0).take(5.5, 9.0).is_some());
        assert!(of(0.0).take(1.0, 9.0).is_none());
        assert!(of(1e40).take(1e41, 9.0).is_some_and(|spike| spike.z.is_finite()));
    }

    #[test]
    fn a_saved_window_has_the_same_bits() {
        let mut spikes = Spikes::default();
        for i in 0..200 {
            spikes.norms.take((i as f64 * 0.7).sin().abs() / 3.0 + 1e-17 * i as f64, 9.0);
        }
        let text = serde_json::to_string(&spikes).unwrap();
        assert_eq!(serde_json::from_str::<Spikes>(&text).unwrap(), spikes);
        for bad in ["1 x", "NaN", "inf", &"1 ".repeat(WINDOW + 1)] {
            assert!(Window::try_from(bad.to_string()).is_err(), "{bad}");
        }
    }
}
