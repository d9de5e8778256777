//! Cases shared by `cellrefine bench` and `benches/`: timing, counted bytes and FLOPs, ceilings, JSON.

pub mod loader;
