//! The refine objective: prototypes from marker genes, and the five terms that pull cells towards them.
//!
//! ```text
//! L = λ_proto L_proto + λ_mlm L_mlm + λ_cell_cell L_cc + λ_structure L_struct + λ_anchor L_anchor
//! z_i = (h_i - μ) / ‖h_i - μ‖,   p_k = (q_k - μ) / ‖q_k - μ‖,   μ = the teacher's mean embedding (or 0)
//! ```
//! `docs/objective.md` has the equations, the defaults and where they come from. The masked-gene term lives in the model's
//! head ([`crate::model::heads`]); its weight is here. All other terms act on cell vectors h alone, so a logical batch may be
//! embedded in pieces (gradient caching) and given to the objective as one:
//!
//! ```text
//! // once
//! let mut teacher = Teacher::new(width);                  // frozen encoder over the training cells, in table order
//! teacher.push(&h)?;                                      // (any number of rows, D), as they come
//! let targets = CellTargets::new(&labels, scores.as_deref(), types, &config)?;
//! let q = prototypes::initial(&config, &Sources { … }, |sentences| embed(sentences))?;
//! let mut objective = Objective::planned(&mut ledger, config, types, width, cells_per_batch, targets.entries())?;
//! objective.start(&dev, Start { prototypes: &q, jaccard: &markers.jaccard(), teacher, targets })?;
//! // each step
//! objective.clear_gradient(&dev)?;                        // prototypes' gradient (P, D)
//! objective.step(&dev, &cells, &h, &mut dh, &mut scalars, first_slot)?;     // h, dh (C, D); SLOTS scalars are set
//! let (q, dq) = objective.parameters();                   // master f32 and its gradient, for AdamW and the norm
//! let losses = objective.losses(&scalars_on_host[first_slot..], cells.len());
//! ```
//! `cells` are rows of the teacher's table and of the targets. A weight of 0 skips its term's work.

mod buffers;
mod config;
pub mod imbalance;
pub mod prototype_file;
pub mod prototypes;
mod state;
pub mod targets;
mod teacher;
mod terms;

pub use config::{ObjectiveConfig, PrototypeMode};
pub use prototype_file::StoredPrototypes;
pub use state::{Losses, Objective, SLOTS, Start};
pub use targets::CellTargets;
pub use teacher::Teacher;
