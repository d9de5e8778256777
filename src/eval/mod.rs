//! Evaluation: cell embeddings, and what they are worth.
//!
//! The measures are pure functions over host arrays ([`Rows`], class indices); they know nothing of the model and follow
//! scikit-learn's and scib's definitions, against which golden tests hold them. Nothing depends on the number of threads.

pub mod annotate;
mod cells;
mod class_names;
pub mod clustering;
pub mod embed;
pub mod evaluate;
pub mod frozen;
pub mod h5ad;
pub mod kmeans;
pub mod knn;
pub mod labeller;
pub mod lbfgs;
pub mod metrics;
pub mod mixing;
pub mod npy;
pub mod parquet;
pub mod perturb;
pub mod probe;
mod prototypes;
pub mod provenance;
pub mod request;
pub mod rows;
pub mod silhouette;
pub mod summary;
mod types;
pub mod zero_shot;

pub use rows::Rows;
