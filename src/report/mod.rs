//! What a run tells: records while it trains, and one page over several when they are done.
//!
//! | file | what |
//! |---|---|
//! | [`jsonl`], [`tensorboard`], [`prometheus`] | one object a logged step; the same numbers for TensorBoard and Prometheus |
//! | [`status`] | how a run stands at this moment |
//! | [`run`] | a run folder as its readers see it |
//! | [`measure`], [`scores`], [`bootstrap`] | `eval` of runs and of what they started from; intervals |
//! | [`map`], [`pca`], [`tsne`], [`quadtree`] | embeddings in a plane |
//! | [`page`], [`headline`], [`provenance`], [`charts`] | the page and its parts |
//! | [`svg`], [`html`] | drawing; escaping |

pub mod bootstrap;
pub mod charts;
pub mod headline;
pub mod html;
pub mod jsonl;
pub mod map;
pub mod measure;
pub mod page;
pub mod pca;
pub mod prometheus;
pub mod provenance;
pub mod quadtree;
pub mod run;
pub mod scores;
pub mod status;
pub mod svg;
pub mod tensorboard;
pub mod tsne;
