//! Settings: precedence, types, unknown keys with the nearest known one, ranges; exit code 2 on the command line.

use cellrefine::config::{ScheduleKind, Settings, Sources, Stage};
use cellrefine::error::Error;
use cellrefine::model::{ModelConfig, Preset};

fn tiny() -> ModelConfig {
    Preset::named("tiny").unwrap().config(100, Default::default())
}

fn resolve(sources: &Sources) -> Result<Settings, Error> {
    sources.resolve(Stage::Refine, &tiny())
}

fn set(text: &str) -> Sources {
    Sources { set: vec![text.to_string()], ..Sources::default() }
}

fn file(text: &str) -> (tempfile::TempDir, Sources) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    (dir, Sources { config: Some(path), ..Sources::default() })
}

#[test]
fn each_source_overrides_the_weaker_ones() {
    let (_dir, mut sources) =
        file("[optimizer]\nlearning_rate = 1e-2\nbeta1 = 0.8\nbeta2 = 0.9\n[batch]\ncells = 7\n");
    sources.environment = vec![
        ("CELLREFINE_OPTIMIZER__BETA1".into(), "0.7".into()),
        ("CELLREFINE_OPTIMIZER__BETA2".into(), "0.7".into()),
        ("CELLREFINE_THREADS".into(), "2".into()),
        ("CELLREFINE_CUDA_ARCHS".into(), "sm_90a".into()),
    ];
    sources.set = vec!["optimizer.beta2=0.6".into(), "optimizer.schedule=linear".into()];
    sources.seed = Some(11);
    let s = resolve(&sources).unwrap();
    let o = &s.optimizer;
    assert_eq!((o.learning_rate, o.beta1, o.beta2, s.batch.cells, s.seed), (1e-2, 0.7, 0.6, 7, 11));
    assert_eq!(o.schedule, ScheduleKind::Linear);
    assert_eq!(o.eps, Settings::defaults(Stage::Refine, &tiny()).optimizer.eps);
}

#[test]
fn saved_settings_are_a_valid_config_and_change_nothing() {
    let s = resolve(&set("objective.proto=0.25")).unwrap();
    let (_dir, sources) = file(&toml::to_string_pretty(&s).unwrap());
    assert_eq!(resolve(&sources).unwrap(), s);
}

#[test]
fn an_unknown_key_names_the_nearest() {
    let message = |sources: &Sources| resolve(sources).unwrap_err().to_string();
    assert!(message(&set("optimizer.lerning_rate=1")).contains("did you mean optimizer.learning_rate?"));
    assert!(message(&set("learning_rate=1")).contains("did you mean optimizer.learning_rate?"));
    assert!(message(&set("optimiser.beta1=0.5")).contains("did you mean optimizer.beta1?"));
    assert!(message(&set("objective.proot=1")).contains("did you mean objective.proto?"));
    let (_dir, sources) = file("[train]\nlog_evry = 3\n");
    let text = message(&sources);
    assert!(text.contains("train.log_every") && text.contains("run.toml:train.log_evry"), "{text}");
    let environment = vec![("CELLREFINE_OPTIMIZER_CLIP".to_string(), "1".to_string())];
    assert!(message(&Sources { environment, ..Sources::default() }).contains("optimizer.clip"));
    assert!(message(&set("zzzzzzzz=1")).contains("a key of"));
}

#[test]
fn a_wrong_type_or_value_names_the_setting() {
    for (text, wanted) in [
        ("batch.cells=many", "integer"),
        ("batch.cells=1.5", "integer"),
        ("batch.cells=-1", "batch.cells"),
        ("batch=3", "table"),
        ("optimizer.schedule=cosin", "cosine"),
        ("optimizer.beta1=1.0", "below 1"),
        ("mask.mask_share=0.95", "mask.random_share"),
        ("train.log_every=0", "1 or more"),
        ("optimizer.learning_rate=nan", "finite"),
        ("train.steps", "KEY=VALUE"),
        ("model.attention=sparse", "marker-sparse"),
    ] {
        let e = resolve(&set(text)).unwrap_err();
        assert_eq!(e.kind().exit_code(), 2, "{text}: {e}");
        assert!(e.to_string().contains(wanted), "{text}: {e}");
    }
    assert_eq!(resolve(&set("batch.cells=1e3")).unwrap().batch.cells, 1000);
    assert_eq!(resolve(&set("optimizer.learning_rate=1")).unwrap().optimizer.learning_rate, 1.0);
}

#[test]
fn a_settings_file_that_is_missing_or_not_toml() {
    let missing = Sources { config: Some("/nonexistent/x.toml".into()), ..Sources::default() };
    assert_eq!(resolve(&missing).unwrap_err().kind().exit_code(), 3);
    let (_dir, sources) = file("[optimizer\n");
    assert_eq!(resolve(&sources).unwrap_err().kind().exit_code(), 2);
}

#[test]
fn wide_models_start_with_small_learning_rates() {
    let rates = [128, 256, 512, 768].map(|width| {
        Settings::defaults(Stage::Refine, &ModelConfig { width, ..tiny() }).optimizer.learning_rate
    });
    assert_eq!(rates[0], 2e-3);
    assert!(rates.is_sorted_by(|a, b| a > b));
    // The width given by a setting counts, not the one before it.
    let rate = |set: &[&str]| {
        let set = set.iter().map(|s| s.to_string()).collect();
        resolve(&Sources { set, ..Sources::default() }).unwrap().optimizer.learning_rate
    };
    assert_eq!(rate(&["model.width=512"]), 1e-4);
    assert_eq!(rate(&["model.width=512", "optimizer.learning_rate=0.5"]), 0.5);
}
