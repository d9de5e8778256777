use super::*;
use crate::bench::Effort;
use crate::cpu::Cpu;
use half::bf16;

fn case(sweep: Sweep, trial: Trial) -> KernelCase {
    let preset = Preset { vocab: 300, ..Preset::named("tiny").unwrap() };
    KernelCase {
        preset,
        lengths: vec![9, 41, 2],
        sweep,
        effort: Effort::quick(),
        seed: 3,
        timed: true,
        trial,
        only: Vec::new(),
    }
}

/// Every op of a step is there, right, timed and comparable; in both types and with every shape of the sweep.
#[test]
fn every_op_is_checked_and_timed() {
    let trial = Trial { repeats: 2, against: None };
    let case = case(Sweep::tiny(), trial);
    let quiet = |_: &str| ();
    for report in
        [run::<Cpu, f32>(&Cpu, &case, quiet).unwrap(), run::<Cpu, bf16>(&Cpu, &case, quiet).unwrap()]
    {
        assert_eq!(wrong(&report), [""; 0]);
        let rows = report["kernels"].as_array().unwrap();
        let names: Vec<&str> = rows.iter().map(|r| r["name"].as_str().unwrap()).collect();
        for op in [
            "linear_forward/qkv",
            "linear_backward_input/out",
            "linear_backward_weight/down",
            "linear_forward/up_relu",
            "gene_attention_forward",
            "gene_attention_backward",
            "layernorm_forward",
            "layernorm_forward/dropout",
            "layernorm_backward",
            "embed_forward",
            "embed_backward",
            "prototype_loss_forward/masked_genes",
            "prototype_loss_backward/masked_genes",
            "prototype_loss_forward",
            "prototype_loss_backward",
            "pool_forward",
            "pool_backward",
            "normalize_forward",
            "normalize_backward",
            "adamw",
            "reduce_sum_squares",
        ] {
            assert!(names.contains(&op), "{op}");
        }
        let bf16 = report["dtype"] == "bf16";
        assert_eq!(names.iter().filter(|n| **n == "gene_attention_forward").count(), 5);
        assert_eq!(
            names.iter().filter(|n| **n == "prototype_loss_forward").count(),
            if bf16 { 3 } else { 2 }
        );
        for row in rows {
            for field in ["ms_median", "gb_per_s", "fraction_of_peak", "bound"] {
                assert!(row[field].as_f64().unwrap() > 0.0, "{field}: {row}");
            }
            assert!(row["max_err"].as_f64().unwrap() >= 0.0 && row["tflop_per_s"].is_number(), "{row}");
            assert!(row["repeats"] == 2 && row["ok"] == true && row["why"].is_null(), "{row}");
        }
        assert_eq!((&report["tokens"], &report["sum_len2"]), (&52.into(), &(81 + 41 * 41 + 4).into()));
    }
}

#[test]
fn only_the_kernels_asked_for() {
    let case = KernelCase { only: vec!["adamw".into()], ..case(Sweep::none(), Trial::default()) };
    let report = run::<Cpu, f32>(&Cpu, &case, |_| ()).unwrap();
    assert_eq!(report["kernels"].as_array().unwrap().len(), 1);
    let none = KernelCase { lengths: vec![3, 0], ..case };
    assert_eq!(run::<Cpu, f32>(&Cpu, &none, |_| ()).unwrap_err().kind().exit_code(), 2);
}

/// On the emulator: nothing is timed, everything is right, and the processor agrees.
#[cfg(emulator)]
#[test]
fn the_emulator_is_checked_and_not_timed() {
    use crate::backend::Choice;
    use crate::cuda::{Cuda, Schedule};
    let trial = Trial { repeats: 1, against: Some(Choice::Cpu) };
    let case = KernelCase {
        sweep: Sweep { losses: vec![[9, 5, 32]], ..Sweep::tiny() },
        ..case(Sweep::none(), trial)
    };
    let dev = Cuda::emulated_with(Schedule::Late).unwrap();
    let report = run::<Cuda, bf16>(&dev, &case, |_| ()).unwrap();
    assert_eq!(wrong(&report), [""; 0]);
    assert!(report["peak_gflop_per_s"].is_null() && report["conditions"].is_null());
    for row in report["kernels"].as_array().unwrap() {
        assert!(
            row["ms_median"].is_null() && row["tflop_per_s"].is_null() && row["graph_ms"].is_null(),
            "{row}"
        );
        assert!(row["against_err"].as_f64().unwrap() < 2e-2 && row["ok"] == true, "{row}");
    }
}
