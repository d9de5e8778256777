//! Ranges: what types cannot say.

use super::Settings;
use crate::error::{Code, Error, Result};

impl Settings {
    /// Fails (exit 2) at the first value outside its range, naming the setting.
    pub fn check(&self) -> Result<()> {
        let (o, t, m, b, f) = (&self.optimizer, &self.train, &self.mask, &self.batch, &self.finetune);
        let not_negative = [
            ("optimizer.learning_rate", o.learning_rate),
            ("optimizer.head_learning_rate", o.head_learning_rate),
            ("optimizer.prototype_learning_rate", o.prototype_learning_rate),
            ("optimizer.weight_decay", o.weight_decay),
            ("optimizer.clip", o.clip),
            ("optimizer.warmup", o.warmup),
            ("train.epochs", t.epochs),
            ("train.spike_z", t.spike_z),
        ];
        for (name, value) in not_negative {
            require(value.is_finite() && value >= 0.0, name, value, "a finite number, 0 or above")?;
        }
        let below_one =
            [("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2), ("finetune.beta", f.beta)];
        for (name, value) in below_one {
            require((0.0..1.0).contains(&value), name, value, "0 or above and below 1")?;
        }
        require(
            self.lora.alpha.is_finite() && self.lora.alpha > 0.0,
            "lora.alpha",
            self.lora.alpha,
            "a finite number above 0",
        )?;
        require(o.eps.is_finite() && o.eps > 0.0, "optimizer.eps", o.eps, "a finite number above 0")?;
        let shares = [
            ("mask.probability", m.probability),
            ("mask.mask_share", m.mask_share),
            ("mask.random_share", m.random_share),
            ("mask.mask_share + mask.random_share", m.mask_share + m.random_share),
        ];
        for (name, value) in shares {
            require((0.0..=1.0).contains(&value), name, value, "between 0 and 1")?;
        }
        let at_least_one = [
            ("batch.cells", b.cells as u64),
            ("batch.tokens", b.tokens as u64),
            ("batch.ahead", b.ahead as u64),
            ("train.log_every", t.log_every),
            ("train.keep", t.keep as u64),
            ("train.accumulate", t.accumulate as u64),
            ("train.max_bad_steps", t.max_bad_steps),
        ];
        for (name, value) in at_least_one {
            require(value >= 1, name, value, "1 or more")?;
        }
        require(
            t.steps > 0 || t.epochs > 0.0,
            "train.steps, train.epochs",
            "0 and 0",
            "one of them above 0",
        )?;
        require(t.steps < u32::MAX as u64, "train.steps", t.steps, "below 4294967295")?;
        self.objective.check()
    }
}

fn require(holds: bool, name: &str, found: impl std::fmt::Display, wanted: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::new(Code::SettingValue, format!("setting {name} is out of range")).found(found).wanted(wanted))
}
