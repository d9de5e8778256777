//! `[objective]` of settings.toml.

use crate::error::{Code, Error, Result};

/// How prototypes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrototypeMode {
    /// Mode A: the teacher's embedding of the markers as a cell, strongest first.
    Sentence,
    /// Mode B: the weighted mean of the markers' word embeddings.
    Tokens,
    /// Mode C: the mean teacher embedding of the cells with the highest marker scores (of the class's own, where labelled).
    Cells,
    /// Mode L, the control without markers: the mean teacher embedding of the labelled cells.
    Labels,
}

/// Weights and options of the refine objective.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveConfig {
    /// λ of the prototype term.
    pub proto: f32,
    /// λ of the masked-gene term.
    pub mlm: f32,
    /// λ of the cell–cell term.
    pub cell_cell: f32,
    /// λ of the structure term; acts on trainable prototypes alone.
    pub structure: f32,
    /// λ of the anchor term.
    pub anchor: f32,

    /// How prototypes start.
    pub prototypes: PrototypeMode,
    /// m of mode C: cells per prototype.
    pub cells_per_prototype: usize,
    /// Whether prototypes learn.
    pub trainable: bool,
    /// Mode C: after each epoch q ← r q + (1 - r) · mean of its cells under the current encoder; 0 = never.
    pub refresh: f32,
    /// Whether the teacher's mean embedding is taken off before cosines.
    pub center: bool,

    /// τ of the prototype term.
    pub tau: f32,
    /// Temperature per prototype by the spread of its cells (PCL), with mean τ, in place of τ for all.
    pub spread_temperatures: bool,
    /// τ_c of the cell–cell term.
    pub tau_cell: f32,
    /// ε: share of the target given by marker overlap.
    pub epsilon: f32,
    /// τ_J: temperature of the overlap.
    pub tau_overlap: f32,
    /// δ: share of the target given by the frozen teacher.
    pub delta: f32,

    /// β of the effective-number class weights; 0 = equal weights.
    pub beta: f32,
    /// Largest LDAM margin, in cosine units; 0 = none.
    pub margin: f32,
    /// τ_a of the logit adjustment; 0 = none.
    pub logit_adjustment: f32,

    /// τ_u: temperature of the standardised marker scores of unlabelled cells.
    pub tau_marker: f32,
    /// Unlabelled cells take part where their most likely type has at least this probability.
    pub confidence: f32,
    /// Most types in an unlabelled cell's target.
    pub target_entries: usize,

    /// Cosine wanted between prototypes whose marker sets have nothing in common.
    pub overlap_low: f32,
    /// Cosine wanted between prototypes with equal marker sets.
    pub overlap_high: f32,
    /// γ_q: weight of the prototypes' own anchor within the anchor term.
    pub prototype_anchor: f32,
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        ObjectiveConfig {
            proto: 1.0,
            mlm: 0.5,
            cell_cell: 0.3,
            structure: 0.1,
            anchor: 0.1,
            prototypes: PrototypeMode::Cells,
            cells_per_prototype: 16,
            trainable: true,
            refresh: 0.0,
            center: true,
            tau: 0.07,
            spread_temperatures: false,
            tau_cell: 0.1,
            epsilon: 0.05,
            tau_overlap: 0.1,
            delta: 0.2,
            beta: 0.999,
            margin: 0.0,
            logit_adjustment: 0.0,
            tau_marker: 1.0,
            confidence: 0.5,
            target_entries: 8,
            overlap_low: 0.0,
            overlap_high: 0.8,
            prototype_anchor: 1.0,
        }
    }
}

impl ObjectiveConfig {
    /// Fails, naming the setting, on values outside their range.
    pub fn check(&self) -> Result<()> {
        let refuse = |name: &str, found: f32, wanted: &str| {
            Err(Error::new(Code::SettingValue, "setting out of range")
                .at(format!("objective.{name}"))
                .found(found)
                .wanted(wanted)
                .next(format!("--set objective.{name}=VALUE")))
        };
        for (name, x) in [
            ("proto", self.proto),
            ("mlm", self.mlm),
            ("cell_cell", self.cell_cell),
            ("structure", self.structure),
            ("anchor", self.anchor),
            ("margin", self.margin),
            ("logit_adjustment", self.logit_adjustment),
            ("prototype_anchor", self.prototype_anchor),
        ] {
            if !(x >= 0.0 && x.is_finite()) {
                return refuse(name, x, "a finite number, 0 or more");
            }
        }
        for (name, x) in [
            ("tau", self.tau),
            ("tau_cell", self.tau_cell),
            ("tau_overlap", self.tau_overlap),
            ("tau_marker", self.tau_marker),
        ] {
            if !(x >= 0.01 && x.is_finite()) {
                return refuse(name, x, "0.01 or more: logits stay below 100");
            }
        }
        for (name, x) in [("epsilon", self.epsilon), ("delta", self.delta), ("confidence", self.confidence)] {
            if !(0.0..=1.0).contains(&x) {
                return refuse(name, x, "between 0 and 1");
            }
        }
        for (name, x) in [("beta", self.beta), ("refresh", self.refresh)] {
            if !(0.0..1.0).contains(&x) {
                return refuse(name, x, "0 or more, below 1");
            }
        }
        for (name, x) in [("overlap_low", self.overlap_low), ("overlap_high", self.overlap_high)] {
            if !(-1.0..=1.0).contains(&x) {
                return refuse(name, x, "a cosine, between -1 and 1");
            }
        }
        if self.epsilon + self.delta > 1.0 {
            return refuse("epsilon", self.epsilon, "epsilon + delta at most 1");
        }
        for (name, x) in
            [("cells_per_prototype", self.cells_per_prototype), ("target_entries", self.target_entries)]
        {
            if x == 0 {
                return refuse(name, 0.0, "at least 1");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_and_each_bad_value_is_named() {
        ObjectiveConfig::default().check().unwrap();
        type Spoil = fn(&mut ObjectiveConfig);
        let bad: [(&str, Spoil); 7] = [
            ("proto", |c| c.proto = -1.0),
            ("anchor", |c| c.anchor = f32::NAN),
            ("tau", |c| c.tau = 0.0),
            ("beta", |c| c.beta = 1.0),
            ("epsilon", |c| (c.epsilon, c.delta) = (0.6, 0.6)),
            ("overlap_high", |c| c.overlap_high = 2.0),
            ("target_entries", |c| c.target_entries = 0),
        ];
        for (name, spoil) in bad {
            let mut config = ObjectiveConfig::default();
            spoil(&mut config);
            let e = config.check().unwrap_err();
            assert_eq!(e.place(), Some(format!("objective.{name}").as_str()));
            assert_eq!(e.kind().exit_code(), 2);
        }
    }

    #[test]
    fn unknown_settings_are_refused_and_missing_ones_default() {
        let config: ObjectiveConfig =
            serde_json::from_str(r#"{"proto": 2.0, "prototypes": "sentence"}"#).unwrap();
        assert_eq!((config.proto, config.prototypes), (2.0, PrototypeMode::Sentence));
        assert_eq!(config.tau, 0.07);
        assert!(serde_json::from_str::<ObjectiveConfig>(r#"{"prot": 2.0}"#).is_err());
    }
}
