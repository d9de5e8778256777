//! Learning rate over steps, as a factor of the peak.
//!
//! ```text
//! step t = 0 … T-1, warm-up of w steps:
//! f(t) = (t+1)/w                        t < w
//!      = 1 - u                          linear        u = (t - w) / (T - w)
//!      = (1 + cos πu) / 2               cosine
//!      = 1                              constant
//! ```
//! The last step still learns: f(T) would be 0.

use crate::config::{OptimizerSettings, ScheduleKind};

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    warmup: u64,
    steps: u64,
}

impl Schedule {
    /// Over `steps` steps; `optimizer.warmup` is a share of them when below 1, otherwise their number.
    pub fn of(optimizer: &OptimizerSettings, steps: u64) -> Schedule {
        let warmup = match optimizer.warmup {
            share if share < 1.0 => (share * steps as f64).round() as u64,
            number => number as u64,
        };
        Schedule { kind: optimizer.schedule, warmup: warmup.min(steps), steps }
    }

    /// Factor of the peak learning rate at step `t`, from 0.
    pub fn factor(&self, t: u64) -> f64 {
        if t < self.warmup {
            return (t + 1) as f64 / self.warmup as f64;
        }
        let rest = (self.steps - self.warmup).max(1) as f64;
        let u = ((t - self.warmup) as f64 / rest).min(1.0);
        match self.kind {
            ScheduleKind::Linear => 1.0 - u,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * u).cos()),
            ScheduleKind::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup: u64, steps: u64) -> Schedule {
        Schedule { kind, warmup, steps }
    }

    #[test]
    fn rises_to_one_and_falls_to_nearly_nothing() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let s = schedule(kind, 10, 110);
            assert!((s.factor(0) - 0.1).abs() < 1e-12 && s.factor(9) == 1.0 && s.factor(10) == 1.0);
            assert!((10..109).all(|t| s.factor(t + 1) < s.factor(t)));
            assert!(s.factor(109) > 0.0 && s.factor(109) < 0.011 && s.factor(110) == 0.0);
        }
        assert!((schedule(ScheduleKind::Linear, 0, 100).factor(25) - 0.75).abs() < 1e-12);
        assert!((schedule(ScheduleKind::Cosine, 0, 100).factor(50) - 0.5).abs() < 1e-12);
        assert_eq!(schedule(ScheduleKind::Constant, 4, 100).factor(99), 1.0);
    }

    #[test]
    fn all_warm_up_and_a_single_step_are_defined() {
        assert_eq!(schedule(ScheduleKind::Cosine, 3, 3).factor(2), 1.0);
        assert_eq!(schedule(ScheduleKind::Linear, 0, 1).factor(0), 1.0);
    }
}
