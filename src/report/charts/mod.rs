//! The page's drawings, one kind a file: numbers in, inline SVG out.

pub mod classes;
pub mod curves;
pub mod kernels;
pub mod matrix;
pub mod perturbation;
pub mod scatter;
