//! Sources of cells with counts, one block of rows at a time, in bounded memory.
//!
//! | file | what |
//! |---|---|
//! | [`hdf5`], [`number`] | groups, attributes and arrays by row windows, behind one small trait |
//! | [`matrix`] | CSR, CSC and dense count matrices as a stream of checked row blocks |
//! | [`frame`] | `obs` and `var`, in AnnData's current and legacy encodings |
//! | [`source`] | what an input is, and the trait of all that hold counts |
//! | [`h5ad`] | an `.h5ad` file: which slot holds counts, its cells, genes and annotations |
//! | [`tenx`], [`mtx`] | 10x Genomics: HDF5 of version 2 and 3, MTX folders |
//! | [`hf_dataset`], [`arrow_stream`] | Geneformer's tokenised data sets, as Hugging Face saves them |
//! | [`pack`] | files → corpus: ranks in parallel, pushes in order |
//! | [`medians`] | files → vocabulary: exact non-zero medians per gene |

pub mod arrow_stream;
pub mod column_reader;
mod compressed;
mod exact_median;
mod features;
pub mod frame;
mod frame_cells;
pub mod h5ad;
pub mod hdf5;
pub mod hf_dataset;
pub mod matrix;
pub mod medians;
pub mod mtx;
mod names;
pub mod number;
mod obs_choice;
pub mod pack;
pub mod source;
pub mod tenx;
mod text_lines;
mod transpose;
