//! A small corpus whose cells have types: each type ranks its own eight genes high, among noise. Learnable in seconds.
#![allow(dead_code)] // every test binary uses its own part

use cellrefine::corpus::{
    CellRecord, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity,
};
use cellrefine::genes::Vocab;
use cellrefine::rng::Philox;
use std::path::{Path, PathBuf};

/// Genes of a type's own.
pub const OWN: usize = 8;
/// Genes besides.
pub const NOISE: usize = 40;

/// Name of gene `g` of type `t`.
pub fn own_gene(t: usize, g: usize) -> String {
    format!("ENSG{:011}", 1000 + t * OWN + g)
}

/// The vocabulary of `types` types; `salt` changes its medians and so its digest.
pub fn vocab(types: usize, salt: f64) -> Vocab {
    let mut tokens = vec!["<pad>".to_string(), "<mask>".to_string()];
    tokens.extend((0..types).flat_map(|t| (0..OWN).map(move |g| own_gene(t, g))));
    tokens.extend((0..NOISE).map(|g| format!("ENSG{:011}", 9000 + g)));
    let median = (0..tokens.len()).map(|id| if id < 2 { 0.0 } else { 1.0 + salt }).collect();
    Vocab::from_parts(tokens, median, Vec::new()).unwrap()
}

/// Writes `counts[t]` cells of type `t` (named type0, type1, …) to `folder/name`. The column `cell_type` holds the types,
/// `donor` alternates between a and b.
pub fn write(folder: &Path, name: &str, counts: &[usize], salt: f64) -> PathBuf {
    let path = folder.join(name);
    let vocab = vocab(counts.len(), salt);
    let column = |name: &str| ObsSpec { name: name.into(), kind: ObsKind::Categorical };
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: vec![column("cell_type"), column("donor")],
        provenance: serde_json::json!({"made": "up"}),
    };
    let mut writer = CorpusWriter::create(&path, options).unwrap();
    let mut random = Philox::new(7, 0, 1);
    let mut index = 0;
    // Types interleaved, so that no prefix of the corpus is of one type.
    for round in 0..counts.iter().copied().max().unwrap_or(0) {
        for (t, _) in counts.iter().enumerate().filter(|(_, n)| round < **n) {
            let mut own: Vec<u32> = (0..OWN).map(|g| (2 + t * OWN + g) as u32).collect();
            let mut other: Vec<u32> = (2..vocab.len() as u32).filter(|id| !own.contains(id)).collect();
            random.shuffle(&mut own);
            random.shuffle(&mut other);
            let length = 6 + random.below(18) as usize;
            let mut gene = own[..5].to_vec();
            gene.extend(&other[..length]);
            let (label, donor) = (format!("type{t}"), if index % 2 == 0 { "a" } else { "b" });
            let obs = [ObsValue::Category(&label), ObsValue::Category(donor)];
            let id = format!("cell{index}");
            writer
                .push(&CellRecord { id: &id, gene: &gene, value: None, total_count: 100.0, obs: &obs })
                .unwrap();
            index += 1;
        }
    }
    writer.finish().unwrap();
    path
}

/// A marker file with each type's own genes.
pub fn markers(folder: &Path, types: usize) -> PathBuf {
    let path = folder.join("markers.gmt");
    let lines: String = (0..types)
        .map(|t| {
            let genes: Vec<String> = (0..OWN).map(|g| own_gene(t, g)).collect();
            format!("type{t}\tmade up\t{}\n", genes.join("\t"))
        })
        .collect();
    std::fs::write(&path, lines).unwrap();
    path
}
