//! The network: a post-LN BERT encoder with a masked-gene head, forward and backward by hand over [`crate::ops`].
//!
//! | file | what it holds |
//! |---|---|
//! | [`config`] | sizes and rates: Hugging Face's `config.json` and a `cellrefine` object in it; presets |
//! | [`weights`] | the one list of parameters: name, shape, initial values, decay class, Hugging Face names |
//! | [`store`] | one flat buffer with named parts laid over it; master weights and their activation-type copy |
//! | [`batch`] | packed cells on the device |
//! | [`ledger`] | buffers by name: allocates them, or only counts them for `plan` |
//! | [`activations`] | every buffer of a forward and backward pass |
//! | [`encoder`] | `forward` and its mirror `backward` |
//! | [`heads`], [`masked_genes`] | pooling and classifier; the masked-gene head |
//! | [`tensors`], [`checkpoint`] | safetensors files; Hugging Face folders, read strictly and written atomically |
//! | [`cell_vectors`] | vectors of cells and of token lists from a network at rest |
//! | [`flops`] | counted matmul work of a batch |
//!
//! A training step on one micro-batch, in the order of the calls:
//! ```text
//! let encoder = Encoder::new(dev, config);                        // a handle, cheap
//! let mut params = Parameters::<B, A>::random(&dev, &config, seed)?;   // or checkpoint::load(…)
//! let mut grads = Store::zeros(&dev, params.layout())?;           // f32
//! let mut acts = Activations::training(&mut ledger, &config, capacity, false)?;
//! batch.upload(&dev, &config, &host_batch)?;
//! encoder.forward(params.network(), batch.input(), &mut acts, pass, depth)?;
//! heads::pool(…, &acts, …, &mut h)?;                              // (C, D) f32: the loss starts here
//! heads::pool_backward(…, &dh, &mut acts)?;                       // sets acts.dx
//! encoder.backward(params.network(), batch.input(), &mut acts, pass, depth, grads.named_mut())?;   // adds to grads
//! ```

pub mod activations;
pub mod batch;
pub mod cell_vectors;
pub mod checkpoint;
pub mod config;
mod config_json;
pub mod encoder;
pub mod flops;
pub mod heads;
pub mod ledger;
pub mod masked_genes;
mod presets;
pub mod snapshot;
pub mod store;
pub mod tensors;
pub mod weight_files;
pub mod weights;

pub use activations::{Activations, Capacity};
pub use batch::{DeviceBatch, Input};
pub use cell_vectors::CellVectors;
pub use config::{ModelConfig, Preset};
pub use encoder::{Encoder, Pass};
pub use store::{Layout, Parameters, Store};
pub use weights::{Classifier, Layer, Parameter, Weights};
