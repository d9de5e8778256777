//! The way back: what other programs of this field open without a converter.
//!
//! | file | what |
//! |---|---|
//! | [`dataset`] | a corpus as Geneformer's tokenised `.dataset` folder |
//! | [`model`] | a checkpoint as a Hugging Face folder, with dictionaries and prototypes beside it |
//! | [`pickle`] | Geneformer's dictionaries as Python pickles them |

pub mod dataset;
pub mod model;
pub mod pickle;
