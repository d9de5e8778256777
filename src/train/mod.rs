//! Training: three stages over one loop.
//!
//! | file | what |
//! |---|---|
//! | [`trunk`] | the encoder with gradients, moments and buffers; logical batches cut into parts |
//! | [`task`] | what a stage adds: its loss, its own weights, its measure |
//! | [`pretrain`], [`finetune`] | masked genes; a classifier |
//! | [`refine`], [`refine_start`] | prototypes beside masked genes; teacher, targets and first prototypes |
//! | [`inputs`], [`stages`] | what a stage opens; one call per stage |
//! | [`run`] | the loop: steps, bad steps, evaluation, checkpoints, signals |
//! | [`lora`], [`lora_file`] | low-rank adapters folded into the weights; the files that PEFT reads |
//! | [`optimizer`], [`schedule`] | AdamW over ranges of flat stores; warm-up and decay |
//! | [`shard`] | moments divided over the ranks |
//! | [`folder`], [`state`] | run folders that survive any kill; what a resumed run finds again |
//! | [`spikes`] | gradient norms and losses far above those before them |
//! | [`record`] | what a logged step says and how fast it went |
//! | [`observer`] | who watches |

pub mod finetune;
pub mod folder;
pub mod inputs;
pub mod lora;
pub mod lora_file;
pub mod observer;
pub mod optimizer;
pub mod plan;
pub mod pretrain;
pub mod record;
pub mod reduction;
pub mod refine;
pub mod refine_start;
pub mod run;
mod saver;
pub mod schedule;
mod sealed;
pub mod shard;
pub mod spikes;
pub mod stages;
pub mod state;
pub mod summary;
pub mod task;
pub mod trunk;

pub use inputs::{Allowed, Resume, RunInputs, SplitFlags};
pub use observer::{Flow, Observer, Unwatched};
pub use refine_start::MarkerInputs;
pub use summary::RunSummary;
