//! Run records: one JSON object per logged step ([`jsonl`]) and the same numbers as TensorBoard events ([`tensorboard`]).

pub mod jsonl;
pub mod tensorboard;
