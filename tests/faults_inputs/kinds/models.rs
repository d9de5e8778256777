//! Models, checkpoints and run folders.

#[path = "../../common/typed_cells.rs"]
mod typed_cells;

use super::{Found, golden};
use cellrefine::config::Sources;
use cellrefine::cpu::Cpu;
use cellrefine::digest::sha256;
use cellrefine::model::checkpoint::{self, LoadOptions};
use cellrefine::model::tensors::TensorFile;
use cellrefine::objective::StoredPrototypes;
use cellrefine::report::measure::{Measures, Options};
use cellrefine::report::page::{self, Beside};
use cellrefine::report::run::Run;
use cellrefine::report::status::Follower;
use cellrefine::train::{Resume, RunInputs, SplitFlags, Unwatched, folder as run_folder, stages};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(path: &Path, tensors: &Tensors, metadata: Option<HashMap<String, String>>) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

fn floats(shape: &[usize], seed: u32) -> (Dtype, Vec<usize>, Vec<u8>) {
    let len: usize = shape.iter().product();
    let data =
        (0..len as u32).flat_map(|i| (((i * 7 + seed) % 13) as f32 * 0.125 - 0.75).to_le_bytes()).collect();
    (Dtype::F32, shape.to_vec(), data)
}

pub fn tensors(folder: &Path) {
    let mut all = Tensors::new();
    all.insert("b".into(), floats(&[2, 3], 1));
    all.insert("a".into(), (Dtype::BF16, vec![4], vec![0x3f; 8]));
    all.insert("half".into(), (Dtype::F16, vec![2, 2], vec![0x3c; 8]));
    all.insert("z".into(), (Dtype::I64, vec![1], vec![7; 8]));
    write(&folder.join("t.safetensors"), &all, Some([("format".to_string(), "pt".to_string())].into()));
}

pub fn read_tensors(folder: &Path) -> Found {
    let file = TensorFile::open(&folder.join("t.safetensors"))?;
    let mut all = format!("{:?}", file.metadata());
    for name in file.names() {
        let shape = file.info(&name).expect("a listed name").shape.clone();
        all +=
            &format!("{name} {shape:?} {:?} {:?}", file.bytes(&name)?.len(), file.floats(&name, &shape).ok());
    }
    Ok(all)
}

/// What transformers saved.
pub fn model(folder: &Path) {
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("parity").join(name), folder.join(name)).unwrap();
    }
}

pub fn sharded(folder: &Path) {
    model(folder);
    let single = folder.join("model.safetensors");
    let bytes = std::fs::read(&single).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (n, (name, t)) in file.iter().enumerate() {
        shards[n % 2].insert(name.to_string(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()));
        map.insert(name.to_string(), format!("model-{:05}-of-00002.safetensors", n % 2 + 1).into());
    }
    for (n, shard) in shards.iter().enumerate() {
        write(&folder.join(format!("model-{:05}-of-00002.safetensors", n + 1)), shard, None);
    }
    let index = json!({"metadata": {"total_size": bytes.len()}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::remove_file(single).unwrap();
}

pub fn read_model(folder: &Path) -> Found {
    let place = checkpoint::resolve(folder)?;
    let told = checkpoint::describe(&place);
    let loaded = checkpoint::load::<Cpu, f32>(&Cpu, &place, LoadOptions::default());
    match (told, loaded) {
        (Ok(told), Ok((config, parameters))) => {
            Ok(format!("{told} {:?} {}", config, parameters.master().flat().len()))
        }
        (Err(e), Err(_)) => Err(e),
        (Ok(_), Err(e)) => panic!("inspect passes what cannot be loaded: {e}"),
        (Err(e), Ok(_)) => panic!("inspect refuses what loads: {e}"),
    }
}

/// Prototypes and a classifier of three classes over a width of four.
pub fn with_heads(folder: &Path) {
    let stored = StoredPrototypes {
        names: vec!["a".into(), "b \"c\"".into(), "d".into()],
        vectors: (0..12).map(|i| i as f32 * 0.25).collect(),
        centre: vec![0.0, 0.5, -1.0, 2.0],
        temperature: 0.07,
        layer: -1,
        pooling: cellrefine::ops::pool::Pooling::Mean,
    };
    stored.write(folder).unwrap();
    let classes = json!({"label": "cell_type", "classes": ["a", "b", "d"]});
    std::fs::write(folder.join("classifier.json"), classes.to_string()).unwrap();
    let mut all = Tensors::new();
    all.insert("classifier.weight".into(), floats(&[3, 4], 2));
    all.insert("classifier.bias".into(), floats(&[3], 3));
    write(&folder.join("classifier.safetensors"), &all, None);
}

pub fn read_heads(folder: &Path) -> Found {
    let prototypes = StoredPrototypes::read(folder, 4)?;
    let classifier = checkpoint::read_classifier(folder, 4)?;
    Ok(format!("{prototypes:?} {classifier:?}"))
}

fn inputs(folder: &Path, resume: Resume) -> RunInputs {
    let settings = [
        "model.layers=1",
        "model.width=16",
        "model.ffn=32",
        "batch.cells=8",
        "train.log_every=1",
        "train.steps=5",
        "train.checkpoint_every=2",
        "train.keep=9",
        "train.eval_every=2",
    ];
    RunInputs {
        corpus: folder.join("x.cells"),
        out: folder.join("run"),
        preset: Some("tiny".into()),
        resume,
        sources: Sources { set: settings.map(String::from).into(), ..Sources::default() },
        split: SplitFlags {
            label: Some("cell_type".into()),
            split: Some("train=0.6,val=0.2,test=0.2".into()),
            ..SplitFlags::default()
        },
        ..RunInputs::default()
    }
}

/// A run of five steps whose last checkpoint is gone: a resumed one makes the fifth step again.
pub fn run(folder: &Path) {
    typed_cells::write(folder, "x.cells", &[12, 8, 5], 0.0);
    stages::pretrain(&inputs(folder, Resume::No), &mut Unwatched).unwrap();
    std::fs::remove_dir_all(folder.join("run/checkpoints/step-5")).unwrap();
    for pointer in ["last", "best"] {
        std::fs::write(folder.join("run").join(pointer), "step-4\n").unwrap();
    }
}

pub fn verify_checkpoint(folder: &Path) -> Found {
    let place = folder.join("run/checkpoints/step-4");
    run_folder::verify(&place).map(|manifest| manifest.to_string())
}

fn resumed(folder: &Path, how: Resume) -> Found {
    let done = stages::pretrain(&inputs(folder, how), &mut Unwatched)?;
    let weights = std::fs::read(done.checkpoint.join("model.safetensors")).unwrap();
    let moments = std::fs::read(done.checkpoint.join("state.safetensors")).unwrap();
    Ok(format!("{} {}", sha256(&weights), sha256(&moments)))
}

pub fn resume(folder: &Path) -> Found {
    resumed(folder, Resume::Last)
}

/// A manifest that was changed on purpose, with a seal of its own.
pub fn resume_resealed(folder: &Path) -> Found {
    let path = folder.join("run/checkpoints/step-4/state.json");
    let (end, digits) = ("\"\n}\n", 64);
    if let Ok(mut text) = std::fs::read_to_string(&path)
        && text.ends_with(end)
        && let Some(at) = text.len().checked_sub(end.len() + digits).filter(|at| text.is_char_boundary(*at))
    {
        text.replace_range(at..at + digits, &"0".repeat(digits));
        let digest = sha256(text.as_bytes());
        text.replace_range(at..at + digits, &digest);
        std::fs::write(&path, text).unwrap();
    }
    resumed(folder, Resume::Last)
}

/// The checkpoint before is sound: whatever became of the newest, the run ends with the weights that it would have had.
pub fn resume_auto(folder: &Path) -> Found {
    resumed(folder, Resume::Auto).inspect_err(|e| panic!("--resume=auto gave up: {e}"))
}

/// Everything that reads a run folder without training.
pub fn report(folder: &Path) -> Found {
    let root = folder.join("run");
    let followed = Follower::new(&root)?;
    let _ = (followed.status.line(), followed.status.to_text(), followed.status.to_json());
    let runs = Run::read_all(std::slice::from_ref(&root))?;
    let _ = checkpoint::resolve(&root).map(|_| ());
    let options = Options { records_only: true, ..Options::default() };
    page::page(&runs, &Measures::default(), Beside::default(), &options, &|_| ())?;
    Ok(runs[0].terms().join(" "))
}
