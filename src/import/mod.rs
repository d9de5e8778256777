//! Sources of cells with counts, one block of rows at a time, in bounded memory.
//!
//! | file | what |
//! |---|---|
//! | [`hdf5`], [`number`] | groups, attributes and arrays by row windows, behind one small trait |
//! | [`matrix`] | CSR, CSC and dense count matrices as a stream of checked row blocks |
//! | [`frame`] | `obs` and `var`, in AnnData's current and legacy encodings |
//! | [`h5ad`] | an `.h5ad` file: which slot holds counts, its cells, genes and annotations |
//! | [`pack`] | files → corpus: ranks in parallel, pushes in order |
//! | [`medians`] | files → vocabulary: exact non-zero medians per gene |

mod compressed;
mod exact_median;
pub mod frame;
mod frame_cells;
pub mod h5ad;
pub mod hdf5;
pub mod matrix;
pub mod medians;
mod names;
pub mod number;
mod obs_choice;
pub mod pack;
mod transpose;
