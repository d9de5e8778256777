//! Every op against its f64 oracle: both activation types, odd sizes, guard words round every buffer, NaN in every output.

mod common;
