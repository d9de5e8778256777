//! What a run does when something happens to it: signals, dead and frozen ranks, NaN, spikes, memory that is not there, other inputs
//! on resuming, a second writer, an unusual surrounding, the smallest inputs. Each promise has a line in docs/reliability.md.

#[path = "../common/faults.rs"]
mod faults;
#[path = "../common/h5ad.rs"]
mod h5ad;
#[path = "../common/typed_cells.rs"]
mod typed_cells;

mod bits;
mod edges;
mod numbers;
mod others;
mod place;
mod signals;
mod spikes;
mod writers;
