//! Model folders as others write them: shards, an encoder without a head or a prefix, a tied decoder, a pooler; and back.

use cellrefine::cpu::Cpu;
use cellrefine::export::model;
use cellrefine::model::checkpoint::{self, LoadOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name → shape, f16 bytes: the golden model of transformers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parity")
}

fn tensors() -> Tensors {
    let bytes = std::fs::read(golden().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, t)| (name.to_string(), (t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (shape, data))| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape.clone(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A folder with the golden config, changed, and no weights.
fn folder(dir: &Path, name: &str, change: impl Fn(&mut Value)) -> PathBuf {
    let folder = dir.join(name);
    std::fs::create_dir(&folder).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(golden().join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder
}

fn load(folder: &Path) -> cellrefine::error::Result<Vec<f32>> {
    let (_, p) = checkpoint::load::<Cpu, f32>(&Cpu, folder, LoadOptions::default())?;
    Ok(p.master().flat().to_vec())
}

fn refused(folder: &Path, needles: &[&str]) {
    let e = load(folder).unwrap_err();
    assert_eq!(e.kind().exit_code(), 3, "{e}");
    needles.iter().for_each(|n| assert!(e.to_string().contains(n), "{n} not in: {e}"));
    assert!(checkpoint::describe(folder).is_err());
}

#[test]
fn shards_are_the_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let want = load(&golden()).unwrap();
    let place = folder(dir.path(), "sharded", |_| ());
    let all = tensors();
    let mut map = serde_json::Map::new();
    let mut shards = vec![Tensors::new(); 3];
    for (n, (name, tensor)) in all.iter().enumerate() {
        map.insert(name.clone(), format!("model-{:05}-of-00003.safetensors", n % 3 + 1).into());
        shards[n % 3].insert(name.clone(), tensor.clone());
    }
    let shard = |n: usize| place.join(format!("model-{n:05}-of-00003.safetensors"));
    (1..=3).for_each(|n| write(&shard(n), &shards[n - 1]));
    let index = |map: &Value| {
        let text = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(place.join("model.safetensors.index.json"), text).unwrap();
    };
    index(&Value::Object(map.clone()));
    assert_eq!(load(&place).unwrap(), want);
    assert_eq!(checkpoint::describe(&place).unwrap()["tensors"], all.len());
    // An index that leads elsewhere, or nowhere.
    let first = map.keys().next().unwrap().clone();
    for (file, needle) in [
        ("../model-00001-of-00003.safetensors", "files of the folder alone"),
        ("/etc/passwd", "files of the folder alone"),
        (".hidden.safetensors", "files of the folder alone"),
        ("model.bin", "files of the folder alone"),
        ("model-00002-of-00003.safetensors", "is not in"),
        ("model-00009-of-00003.safetensors", "model-00009"),
    ] {
        let mut wrong = map.clone();
        wrong.insert(first.clone(), file.into());
        index(&Value::Object(wrong));
        refused(&place, &[needle]);
    }
    index(&json!({}));
    refused(&place, &["empty weight_map"]);
    index(&json!([1]));
    refused(&place, &["no weight_map"]);
    std::fs::write(place.join("model.safetensors.index.json"), "{").unwrap();
    refused(&place, &["not valid JSON"]);
    index(&Value::Object(map.clone()));
    // A tensor twice, and a shard that is cut.
    let mut twice = shards[1].clone();
    twice.insert(first.clone(), all[&first].clone());
    write(&shard(2), &twice);
    refused(&place, &["in two files", &first]);
    write(&shard(2), &shards[1]);
    let bytes = std::fs::read(shard(3)).unwrap();
    std::fs::write(shard(3), &bytes[..bytes.len() - 4]).unwrap();
    refused(&place, &["truncated", "00003-of-00003"]);
}

#[test]
fn an_encoder_alone_loads_under_either_name() {
    let dir = tempfile::tempdir().unwrap();
    let (config, params) = checkpoint::load::<Cpu, f32>(&Cpu, &golden(), LoadOptions::default()).unwrap();
    let whole = params.master().flat();
    let encoder: Tensors = tensors().into_iter().filter(|(name, _)| name.starts_with("bert.")).collect();
    let pooler = (vec![config.width, config.width], vec![0u8; 2 * config.width * config.width]);
    let mut bare: Tensors = encoder
        .iter()
        .map(|(name, t)| (name.strip_prefix("bert.").unwrap().to_string(), t.clone()))
        .collect();
    bare.insert("pooler.dense.weight".into(), pooler);
    bare.insert("pooler.dense.bias".into(), (vec![config.width], vec![0u8; 2 * config.width]));
    let alone = |c: &mut Value| c["architectures"] = json!(["BertModel"]);
    for (name, tensors) in [("bare", &bare), ("prefixed", &encoder)] {
        let place = folder(dir.path(), name, alone);
        write(&place.join("model.safetensors"), tensors);
        let (_, found) = checkpoint::load::<Cpu, f32>(&Cpu, &place, LoadOptions::default()).unwrap();
        let flat = found.master().flat().to_vec();
        for (parameter, range) in params.layout().list() {
            let same = flat[range.clone()] == whole[range.clone()];
            assert_eq!(same, !parameter.name.starts_with("head."), "{}", parameter.name);
            assert!(flat[range.clone()].iter().all(|x| x.is_finite()));
        }
        // The fresh head is the same each time.
        assert_eq!(load(&place).unwrap(), flat);
        assert!(
            checkpoint::describe(&place).unwrap()["masked_gene_head"].as_str().unwrap().contains("fresh")
        );
        // There is nothing to export of a head that was never trained.
        let e = model::export(&place, &dir.path().join("never"), None).unwrap_err();
        assert!(e.to_string().contains("missing cls.predictions"), "{e}");
    }
    // A masked language model without its head is a broken one.
    let place = folder(dir.path(), "broken", |_| ());
    write(&place.join("model.safetensors"), &encoder);
    refused(&place, &["missing cls.predictions.bias"]);
    let place = folder(dir.path(), "half", alone);
    let mut half = encoder.clone();
    half.insert("cls.predictions.bias".into(), tensors()["cls.predictions.bias"].clone());
    write(&place.join("model.safetensors"), &half);
    refused(&place, &["missing cls.predictions.transform"]);
    let place =
        folder(dir.path(), "another", |c| c["architectures"] = json!(["BertForSequenceClassification"]));
    write(&place.join("model.safetensors"), &encoder);
    refused(&place, &["not a masked language model"]);
}

#[test]
fn a_tied_decoder_is_fine_and_an_untied_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = tensors();
    let word = all["bert.embeddings.word_embeddings.weight"].clone();
    all.insert("cls.predictions.decoder.weight".into(), word.clone());
    all.insert("cls.predictions.decoder.bias".into(), all["cls.predictions.bias"].clone());
    let place = folder(dir.path(), "tied", |_| ());
    write(&place.join("model.safetensors"), &all);
    assert_eq!(load(&place).unwrap(), load(&golden()).unwrap());
    let mut other = word;
    other.1[5] ^= 0x10;
    all.insert("cls.predictions.decoder.weight".into(), other);
    write(&place.join("model.safetensors"), &all);
    refused(&place, &["decoder.weight differs"]);
}

#[test]
fn what_is_exported_is_what_was_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let exported = model::export(&golden(), &out, None).unwrap();
    assert!(exported.tokens.is_none() && exported.notes.iter().any(|n| n.contains("vocab.tsv")));
    assert_eq!(load(&out).unwrap(), load(&golden()).unwrap());
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let written = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tied = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"];
    let want: Tensors = tensors().into_iter().filter(|(name, _)| !tied.contains(&name.as_str())).collect();
    assert_eq!(written.len(), want.len());
    for (name, tensor) in written.iter() {
        let values = want[name].1.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32());
        let values: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        assert!(want[name].0 == tensor.shape() && values == tensor.data(), "{name}");
    }
    assert_eq!(model::export(&golden(), &out, None).unwrap_err().kind().exit_code(), 2);
}
