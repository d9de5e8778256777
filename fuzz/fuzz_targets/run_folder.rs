#![no_main]

#[path = "../../tests/faults_inputs/kinds.rs"]
mod kinds;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kinds::read_damaged("run_folder", bytes));
