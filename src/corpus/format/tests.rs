use super::*;

fn manifest() -> Manifest {
    let shard = ShardEntry {
        file: shard_name(0),
        cells: 3,
        tokens: 10,
        bytes: 9000,
        sha256: "ab".repeat(32),
        frame_crc32c: 7,
    };
    let column =
        Column { name: "type".into(), kind: ObsKind::Categorical, categories: vec!["a".into(), "b".into()] };
    Manifest::seal(
        VocabIdentity { digest: "d".into(), len: 100 },
        None,
        false,
        vec![column],
        vec![shard],
        serde_json::json!({"source": "x"}),
    )
}

#[test]
fn manifest_survives_the_round_trip() {
    let m = manifest();
    assert_eq!(Manifest::parse(&m.to_bytes(), "here").unwrap(), m);
}

/// Every byte of the manifest matters: no single flipped bit is read as another valid manifest.
#[test]
fn no_flipped_bit_is_believed() {
    let m = manifest();
    let bytes = m.to_bytes();
    for i in 0..bytes.len() {
        for bit in 0..8 {
            let mut broken = bytes.clone();
            broken[i] ^= 1 << bit;
            // A flip in white space may leave the same JSON value: then it is the same manifest.
            if let Ok(read) = Manifest::parse(&broken, "here") {
                assert_eq!(read, m, "byte {i} bit {bit}");
            }
        }
        assert!(Manifest::parse(&bytes[..i], "here").is_err() || i + 1 == bytes.len());
    }
}

#[test]
fn the_digest_names_cells_not_their_origin() {
    let a = manifest();
    let again = |provenance, shards| {
        Manifest::seal(a.vocabulary.clone(), None, false, a.columns.clone(), shards, provenance)
    };
    assert_eq!(again(serde_json::json!(1), a.shards.clone()).digest, a.digest);
    let mut other = a.shards.clone();
    other[0].sha256 = "cd".repeat(32);
    assert_ne!(again(a.provenance.clone(), other).digest, a.digest);
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in ["../x", "/x", "a/b", ".hidden", "", "a\\b", "x\0"] {
        assert!(!plain_name(name), "{name:?}");
    }
    assert!(plain_name(&shard_name(3)));
    let a = manifest();
    let mut shards = a.shards.clone();
    shards[0].file = "../../etc/passwd".into();
    let m = Manifest::seal(a.vocabulary, None, false, a.columns, shards, a.provenance);
    assert!(Manifest::parse(&m.to_bytes(), "here").unwrap_err().what().contains("plain file name"));
}

#[test]
fn header_is_valid_safetensors_on_a_page() {
    let specs: Vec<_> = tensors(&manifest().columns, true, true, 3, 10)
        .into_iter()
        .map(|t| {
            let len = t.len.unwrap_or(8);
            (t, len)
        })
        .collect();
    let metadata = ShardMetadata { vocab_digest: "d\"e".into(), categories: BTreeMap::new() };
    let mut bytes = shard_header(&metadata, &specs);
    assert_eq!(bytes.len() % PAGE_BYTES, 0);
    let payload: u64 = specs.iter().map(|(t, n)| n * element_bytes(t.dtype)).sum();
    bytes.resize(bytes.len() + payload as usize, 0);
    let (_, read) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(read.info("gene").unwrap().shape, [10]);
    assert_eq!(read.metadata().as_ref().unwrap()["vocabulary"], "d\"e");
}
