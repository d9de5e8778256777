//! The corpus on disk: round trips, equal bytes, and everything that can be wrong with the files.

#[path = "common/cells.rs"]
mod cells;

use cellrefine::corpus::format::{MANIFEST, shard_name};
use cellrefine::corpus::*;
use cellrefine::error::Kind;
use std::fs;
use std::path::{Path, PathBuf};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn round_trip_in_both_widths_with_and_without_values_and_shards() {
    let dir = folder();
    for (case, (vocab, values, shard_cells, n)) in
        [(500, true, 17, 200), (65_536, false, 0, 50), (65_537, true, 64, 128), (70_000, false, 1, 5)]
            .into_iter()
            .enumerate()
    {
        let path = dir.path().join(format!("{case}.cells"));
        let made = cells::cells(n, vocab, 300, case as u64);
        let written = cells::write(&path, &made, cells::options(vocab as usize, values, shard_cells));
        let corpus = Corpus::open(&path).unwrap();
        assert_eq!(corpus.manifest(), &written);
        let shard_cells = if shard_cells == 0 { n } else { shard_cells };
        assert_eq!(written.shards.len(), n.div_ceil(shard_cells));
        assert!(matches!(corpus.genes(0).unwrap(), Genes::U16(_)) == (vocab <= 65_536));
        corpus.verify().unwrap();
        cells::check(&corpus, &made);
        assert_eq!(corpus.vocab_file().unwrap(), b"made up\n");
    }
}

#[test]
fn no_cells_at_all_is_a_corpus_too() {
    let dir = folder();
    let path = dir.path().join("none.cells");
    cells::write(&path, &[], cells::options(10, false, 0));
    let corpus = Corpus::open(&path).unwrap();
    assert_eq!((corpus.cells(), corpus.tokens()), (0, 0));
    corpus.verify().unwrap();
}

#[test]
fn equal_cells_give_equal_bytes_and_digest() {
    let dir = folder();
    let made = cells::cells(100, 300, 50, 1);
    let files = |name: &str, made: &[cells::Cell]| -> Vec<(String, Vec<u8>)> {
        let path = dir.path().join(name);
        cells::write(&path, made, cells::options(300, true, 30));
        let mut names: Vec<_> =
            fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names.into_iter().map(|n| (n.clone(), fs::read(path.join(n)).unwrap())).collect()
    };
    let a = files("a.cells", &made);
    assert_eq!(a.len(), 4 + 2, "four shards, manifest, vocabulary and nothing else");
    assert!(a == files("b.cells", &made));
    let mut other = made.clone();
    other[99].score += 1.0;
    let c = files("c.cells", &other);
    assert!(a[1].1 == c[1].1 && a[4].1 != c[4].1, "only the last shard differs");
    let digest = |name: &str| Corpus::open(&dir.path().join(name)).unwrap().digest().to_string();
    assert_eq!(digest("a.cells"), digest("b.cells"));
    assert_ne!(digest("a.cells"), digest("c.cells"));
}

#[test]
fn an_unfinished_corpus_leaves_nothing_and_a_dead_writers_rest_is_replaced() {
    let dir = folder();
    let path = dir.path().join("x.cells");
    let partial = dir.path().join(".x.cells.partial");
    let made = cells::cells(20, 100, 30, 2);
    {
        let mut w = CorpusWriter::create(&path, cells::options(100, false, 4)).unwrap();
        for c in &made[..10] {
            cells::push(&mut w, c, false).unwrap();
        }
        assert!(partial.exists() && !path.exists());
        let second = CorpusWriter::create(&path, cells::options(100, false, 4)).unwrap_err();
        assert_eq!(second.kind(), Kind::Environment);
        assert!(second.to_string().contains(&format!("process {}", std::process::id())), "{second}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("shard-00000.safetensors"), b"half a shard").unwrap();
    fs::write(partial.join("gene.spool"), b"tokens").unwrap();
    cells::write(&path, &made, cells::options(100, false, 4));
    assert!(!partial.exists());
    cells::check(&Corpus::open(&path).unwrap(), &made);
    let again = CorpusWriter::create(&path, cells::options(100, false, 4)).unwrap_err();
    assert_eq!(again.kind(), Kind::Usage);
}

#[test]
fn cells_that_do_not_fit_are_refused_by_name() {
    let dir = folder();
    let good = cells::cells(1, 100, 30, 3).remove(0);
    type Break = fn(&mut cells::Cell);
    let cases: [(&str, Break); 5] = [
        ("outside the vocabulary", |c| c.gene = vec![100]),
        ("values do not fit", |c| {
            c.gene = vec![3];
            c.value.clear();
        }),
        ("one line", |c| c.id = "a\nb".into()),
        ("total count", |c| c.total_count = f32::NAN),
        ("not finite", |c| {
            c.gene = vec![3];
            c.value = vec![half::f16::INFINITY];
        }),
    ];
    for (message, damage) in cases {
        let path = dir.path().join("x.cells");
        let mut w = CorpusWriter::create(&path, cells::options(100, true, 4)).unwrap();
        let mut c = good.clone();
        damage(&mut c);
        let e = cells::push(&mut w, &c, true).unwrap_err();
        assert_eq!(e.kind(), Kind::Input);
        assert!(e.to_string().contains(message) && e.to_string().contains("cell 0"), "{e}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A corpus of two shards in `dir`, and its cells.
fn small(dir: &Path) -> (PathBuf, Vec<cells::Cell>) {
    let path = dir.join("small.cells");
    let made = cells::cells(40, 200, 60, 4);
    cells::write(&path, &made, cells::options(200, true, 25));
    (path, made)
}

/// Opens and reads everything, as a program would that never heard of damage.
fn read_all(path: &Path) -> cellrefine::error::Result<()> {
    let corpus = Corpus::open(path)?;
    for i in 0..corpus.cells() {
        corpus.genes(i)?;
        corpus.values(i)?;
        corpus.cell_id(i)?;
        corpus.total_count(i)?;
    }
    corpus.categorical("cell_type")?;
    corpus.numeric("score")?;
    Ok(())
}

#[test]
fn truncation_at_any_byte_is_refused_at_open() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let shard = path.join(shard_name(1));
    let whole = fs::read(&shard).unwrap();
    let cuts = (0..64).chain((64..whole.len()).step_by(97)).chain([whole.len() - 1]);
    for cut in cuts {
        fs::write(&shard, &whole[..cut]).unwrap();
        let e = Corpus::open(&path).unwrap_err();
        assert_eq!(e.kind(), Kind::Input);
        let text = e.to_string();
        assert!(
            text.contains("truncated") && text.contains("shard-00001") && text.contains("try:"),
            "{text}"
        );
    }
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(&shard, &longer).unwrap();
    assert!(Corpus::open(&path).unwrap_err().to_string().contains("too long"));
    fs::write(&shard, &whole).unwrap();
    read_all(&path).unwrap();
}

/// Every single flipped bit of a shard is noticed: in the header and tables at open, in the payload on the first touch, all of
/// them by `verify`.
#[test]
fn no_flipped_bit_goes_unnoticed() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let shard = path.join(shard_name(0));
    let whole = fs::read(&shard).unwrap();
    let page = 4096;
    let flips =
        (0..page).step_by(41).chain((page..whole.len()).step_by(13)).chain(whole.len() - 9..whole.len());
    for at in flips {
        let mut broken = whole.clone();
        broken[at] ^= 1 << (at % 8);
        fs::write(&shard, &broken).unwrap();
        let read = read_all(&path).expect_err("a flipped bit was read as data");
        assert_eq!(read.kind(), Kind::Input, "byte {at}: {read}");
        assert!(read.to_string().contains("shard-00000"), "byte {at}: {read}");
        let verified = Corpus::open(&path).and_then(|c| c.verify()).unwrap_err();
        assert_eq!(verified.kind(), Kind::Input);
    }
}

#[test]
fn a_damaged_block_names_its_cells_and_spares_the_others() {
    let dir = folder();
    let path = dir.path().join("wide.cells");
    let made = cells::cells(600, 60_000, 900, 5);
    cells::write(&path, &made, cells::options(60_000, false, 0));
    let shard = path.join(shard_name(0));
    let mut bytes = fs::read(&shard).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 16;
    fs::write(&shard, &bytes).unwrap();
    let corpus = Corpus::open(&path).unwrap();
    let bad: Vec<usize> = (0..600).filter(|&i| corpus.genes(i).is_err()).collect();
    assert!(!bad.is_empty() && bad.len() < 200, "one block of many: {} cells", bad.len());
    let e = corpus.genes(bad[1]).unwrap_err().to_string();
    assert!(e.contains("is damaged") && e.contains("inspect") && e.contains("--verify"), "{e}");
    let named: Vec<usize> = e
        .split("cells ")
        .nth(1)
        .unwrap()
        .split(" of")
        .next()
        .unwrap()
        .split(" to ")
        .map(|n| n.parse().unwrap())
        .collect();
    assert!(
        named[0] <= bad[0] && bad[bad.len() - 1] <= named[1] && named[1] - named[0] < bad.len() + 20,
        "{e}"
    );
    for i in (0..600).filter(|i| !bad.contains(i)) {
        assert_eq!(corpus.genes(i).unwrap().to_vec(), made[i].gene);
    }
}

#[test]
fn folders_that_are_no_corpus_say_so() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let expect = |p: &Path, words: &[&str]| {
        let e = Corpus::open(p).unwrap_err();
        assert_eq!(e.kind(), Kind::Input, "{e}");
        let text = e.to_string();
        assert!(words.iter().all(|w| text.contains(w)), "{text}");
    };
    expect(&dir.path().join("absent.cells"), &["no such corpus", "absent.cells", "pack"]);
    let file = dir.path().join("file.cells");
    fs::write(&file, "x").unwrap();
    expect(&file, &["this is a file"]);
    let empty = dir.path().join("empty.cells");
    fs::create_dir(&empty).unwrap();
    expect(&empty, &["manifest", "corpus.json", "try:"]);
    let manifest = path.join(MANIFEST);
    let whole = fs::read_to_string(&manifest).unwrap();
    for (text, words) in [
        (String::new(), vec!["empty"]),
        ("[1, 2".into(), vec!["not valid JSON"]),
        ("{\"a\": 1}".into(), vec!["not a corpus manifest"]),
        (whole.replace("\"schema\": 1", "\"schema\": 9"), vec!["schema version", "9"]),
        (whole.replace("\"cells\": 40", "\"cells\": 41"), vec!["changed"]),
        (whole.replace("type a", "type z"), vec!["changed"]),
    ] {
        assert_ne!(text, whole);
        fs::write(&manifest, text).unwrap();
        expect(&path, &words);
    }
    fs::write(&manifest, &whole).unwrap();
    let shard = path.join(shard_name(1));
    fs::rename(&shard, dir.path().join("aside")).unwrap();
    expect(&path, &["shard-00001", "try:"]);
    std::os::unix::fs::symlink(dir.path().join("aside"), &shard).unwrap();
    expect(&path, &["plain file"]);
    fs::remove_file(&shard).unwrap();
    // Another shard under this one's name: the size may fit, the sums do not.
    fs::copy(path.join(shard_name(0)), &shard).unwrap();
    expect(&path, &["shard-00001"]);
    fs::copy(dir.path().join("aside"), &shard).unwrap();
    read_all(&path).unwrap();
}

/// Shards made with hostile headers under a manifest that vouches for their size and sums: the reader must stand on its own.
#[test]
fn hostile_headers_are_refused_before_use() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let corpus = Corpus::open(&path).unwrap();
    let manifest = corpus.manifest().clone();
    let whole = fs::read(path.join(shard_name(0))).unwrap();
    drop(corpus);
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(whole[8..8 + header_len].to_vec()).unwrap();
    let with_header = |text: String| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.extend_from_slice(&whole[8 + header_len..]);
        bytes
    };
    let swap = |from: &str, to: &str| {
        assert!(header.contains(from), "{from}");
        let text = header.replacen(from, to, 1);
        // Keep the length, so that every tensor stays where it was.
        let trimmed = text.trim_end();
        assert!(trimmed.len() <= header_len);
        with_header(format!("{trimmed:<header_len$}"))
    };
    let length = |n: u64| {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        bytes
    };
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("length beyond all numbers", length(u64::MAX)),
        ("length beyond the file", length(whole.len() as u64)),
        ("length beyond the cap", length(100_000_001)),
        ("length zero", length(0)),
        ("deep JSON", with_header("[".repeat(header_len))),
        (
            "not UTF-8",
            with_header(header.clone()).iter().map(|b| if *b == b'{' { 0xff } else { *b }).collect(),
        ),
        ("another type", swap("\"U16\"", "\"I16\"")),
        ("a shape that overflows", swap("\"shape\":[26]", "\"shape\":[18446744073709551615]")),
        ("a negative offset", swap("\"data_offsets\":[0,", "\"data_offsets\":[-8,")),
        ("overlapping tensors", swap("\"data_offsets\":[208,416]", "\"data_offsets\":[200,408]")),
        ("an unknown tensor", swap("\"total_count\"", "\"total_counts\"")),
        ("another schema", swap("\"schema\":\"1\"", "\"schema\":\"2\"")),
        ("another vocabulary", swap("vocab-200", "vocab-201")),
        ("categories of no kind", swap("\\\"type a\\\"", "\\\"type q\\\"")),
        ("swapped tensors", swap("cell_start", "cell_strat")),
    ];
    for (what, bytes) in hostile {
        fs::write(path.join(shard_name(0)), &bytes).unwrap();
        let mut shards = manifest.shards.clone();
        shards[0].bytes = bytes.len() as u64;
        // The frame sum is made right where the header can be found at all, so that the checks behind it are reached.
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()).saturating_add(8);
        if n as usize <= bytes.len() {
            let table = whole.len() - 4..whole.len();
            let table = &bytes[bytes.len() - table.len()..];
            shards[0].frame_crc32c = crc32c::crc32c_append(crc32c::crc32c(&bytes[..n as usize]), table);
        }
        let m = Manifest::seal(
            manifest.vocabulary.clone(),
            manifest.vocab_sha256.clone(),
            manifest.values,
            manifest.columns.clone(),
            shards,
            manifest.provenance.clone(),
        );
        fs::write(path.join(MANIFEST), m.to_bytes()).unwrap();
        let e = Corpus::open(&path).err().unwrap_or_else(|| panic!("{what}: opened"));
        assert_eq!(e.kind(), Kind::Input, "{what}: {e}");
    }
}

/// Data of a foreign writer whose sums are right but whose content is not.
#[test]
fn right_sums_do_not_excuse_wrong_content() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let manifest = Corpus::open(&path).unwrap().manifest().clone();
    let shard = path.join(shard_name(0));
    let whole = fs::read(&shard).unwrap();
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let start = 8 + header_len;
    let (_, tensors) = safetensors::SafeTensors::read_metadata(&whole).unwrap();
    let offset = |name: &str| start + tensors.info(name).unwrap().data_offsets.0;
    type Damage<'a> = (&'a str, usize, Vec<u8>, &'a str);
    let damages: Vec<Damage> = vec![
        ("gene", offset("gene") + 8, 200u16.to_le_bytes().to_vec(), "outside the vocabulary"),
        ("cell_start", offset("cell_start") + 16, u64::MAX.to_le_bytes().to_vec(), "cell_start[3]"),
        ("cell_start", offset("cell_start"), 1u64.to_le_bytes().to_vec(), "cell_start"),
        (
            "cell_id_start",
            offset("cell_id_start") + 25 * 8,
            (1u64 << 40).to_le_bytes().to_vec(),
            "cell_id_start",
        ),
        ("codes", offset("obs.cell_type"), 7i32.to_le_bytes().to_vec(), "category code"),
        ("cell_id", offset("cell_id"), vec![0xff], "not UTF-8"),
    ];
    for (what, at, bytes, words) in damages {
        let mut broken = whole.clone();
        broken[at..at + bytes.len()].copy_from_slice(&bytes);
        let table = offset("block_crc32c");
        let sums: Vec<u32> = broken[start..table].chunks(64 << 10).map(crc32c::crc32c).collect();
        broken[table..].copy_from_slice(bytemuck::cast_slice(&sums));
        let mut shards = manifest.shards.clone();
        shards[0].frame_crc32c = crc32c::crc32c_append(crc32c::crc32c(&broken[..start]), &broken[table..]);
        let m = Manifest::seal(
            manifest.vocabulary.clone(),
            manifest.vocab_sha256.clone(),
            true,
            manifest.columns.clone(),
            shards,
            manifest.provenance.clone(),
        );
        fs::write(&shard, &broken).unwrap();
        fs::write(path.join(MANIFEST), m.to_bytes()).unwrap();
        let e = read_all(&path).err().unwrap_or_else(|| panic!("{what}: read"));
        assert!(e.to_string().contains(words), "{what}: {e}");
    }
}

#[test]
fn an_absent_column_lists_the_columns_and_the_nearest() {
    let dir = folder();
    let (path, _) = small(dir.path());
    let corpus = Corpus::open(&path).unwrap();
    let e = corpus.categorical("celltype").unwrap_err();
    assert_eq!(e.kind(), Kind::Input);
    let text = e.to_string();
    assert!(text.contains("cell_type, score") && text.contains("did you mean \"cell_type\""), "{text}");
    assert!(corpus.categorical("score").unwrap_err().to_string().contains("numeric"));
    assert!(corpus.numeric("cell_type").is_err());
}

/// A file that shrinks under the map ends the program with a message and exit code 3, never a bare SIGBUS.
#[test]
fn a_file_that_shrinks_while_open_ends_with_words() {
    const CHILD: &str = "CELLREFINE_TEST_SHRINK";
    if let Ok(path) = std::env::var(CHILD) {
        let path = PathBuf::from(path);
        let corpus = Corpus::open(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(path.join(shard_name(0))).unwrap();
        file.set_len(8192).unwrap();
        let _ = corpus.genes(501);
        println!("read beyond the end without a fault");
        std::process::exit(9);
    }
    let dir = folder();
    let path = dir.path().join("wide.cells");
    cells::write(&path, &cells::cells(600, 60_000, 900, 5), cells::options(60_000, false, 0));
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_file_that_shrinks_while_open_ends_with_words", "--nocapture"])
        .env(CHILD, &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("changed while in use") && text.contains("shard-00000"), "{text}");
}

/// Shards packed apart equal, after the merge, the corpus packed at once: cells, labels, everything that is read.
#[test]
fn merged_shards_read_as_one_corpus() {
    let dir = folder();
    let mut made = cells::cells(90, 200, 60, 6);
    // Categories that differ from part to part, in another order.
    made[..30].iter_mut().for_each(|c| c.label = c.label.take().map(|_| "zeta".into()));
    made[30..60].iter_mut().for_each(|c| c.label = Some("alpha".into()));
    let part = |name: &str, cells: &[cells::Cell], options: CorpusOptions| {
        let path = dir.path().join(name);
        cells::write(&path, cells, options);
        path
    };
    let options = || cells::options(200, true, 20);
    let parts: Vec<PathBuf> =
        (0..3).map(|i| part(&format!("{i}.cells"), &made[i * 30..(i + 1) * 30], options())).collect();
    let out = dir.path().join("all.cells");
    let manifest = merge::merge(&parts, &out, &|_| ()).unwrap();
    assert_eq!((manifest.cells, manifest.shards.len()), (90, 6));
    let merged = Corpus::open(&out).unwrap();
    merged.verify().unwrap();
    cells::check(&merged, &made);
    assert_eq!(merged.categorical("cell_type").unwrap().categories[..2], ["alpha", "type a"]);
    assert_eq!(merged.vocab_file().unwrap(), b"made up\n");
    // Deleting the parts leaves the merged corpus whole.
    fs::remove_dir_all(&parts[0]).unwrap();
    Corpus::open(&out).unwrap().verify().unwrap();

    let refused = |inputs: &[&PathBuf], words: &str| {
        let inputs: Vec<PathBuf> = inputs.iter().map(|p| (*p).clone()).collect();
        let e = merge::merge(&inputs, &dir.path().join("no.cells"), &|_| ()).unwrap_err();
        assert_eq!(e.kind(), Kind::Input);
        assert!(e.to_string().contains(words), "{e}");
        assert!(!dir.path().join("no.cells").exists() && !dir.path().join(".no.cells.partial").exists());
    };
    let mut other = options();
    other.vocab.digest = "another".into();
    let vocabulary = part("v.cells", &made[..5], other);
    refused(&[&parts[1], &vocabulary], "different vocabularies");
    let bare = part("b.cells", &made[..5], cells::options(200, false, 20));
    refused(&[&parts[1], &bare], "store values");
    refused(&[&parts[1], &parts[2], &parts[1]], "twice");
    refused(&[&parts[1], &parts[0]], "no such corpus");
    let mut renamed = options();
    renamed.obs[0].name = "celltype".into();
    let columns = part("c.cells", &made[..5], renamed);
    refused(&[&parts[1], &columns], "different obs columns");
}

fn cellrefine(args: &[&str]) -> (i32, serde_json::Value, String) {
    let out =
        assert_cmd::Command::cargo_bin("cellrefine").unwrap().arg("--json").args(args).output().unwrap();
    let json = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("{args:?}: stdout is not one JSON object ({e}): {}", String::from_utf8_lossy(&out.stdout))
    });
    (out.status.code().unwrap(), json, String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn inspect_and_merge_on_the_command_line() {
    let dir = folder();
    let (path, made) = small(dir.path());
    let bare = dir.path().join("bare.cells");
    cells::write(&bare, &made, CorpusOptions { vocab_file: None, ..cells::options(200, false, 25) });
    let bare = bare.to_str().unwrap();
    let (code, json, _) = cellrefine(&["inspect", bare, "--verify", "--cells", "3"]);
    assert_eq!((code, &json["kind"], &json["cells"]), (0, &"corpus".into(), &40.into()));
    let tokens: Vec<Vec<u32>> = serde_json::from_value(json["tokens"].clone()).unwrap();
    assert_eq!(tokens, made[..3].iter().map(|c| c.gene.clone()).collect::<Vec<_>>());
    assert_eq!(json["cell_ids"][2], made[2].id);

    // The made-up vocabulary of `small` is no vocabulary: said with exit code 3.
    let (code, json, _) = cellrefine(&["inspect", path.to_str().unwrap()]);
    assert_eq!((code, &json["error"]["exit_code"]), (3, &3.into()));

    let shard = Path::new(bare).join(shard_name(0));
    let whole = fs::read(&shard).unwrap();
    let mut broken = whole.clone();
    broken[4096 + 1500] ^= 1;
    fs::remove_file(&shard).unwrap();
    fs::write(&shard, &broken).unwrap();
    let (code, json, stderr) = cellrefine(&["inspect", bare, "--verify"]);
    assert_eq!(code, 3);
    assert!(
        json["error"]["where"].as_str().unwrap().contains("shard-00000") && stderr.contains("error[CR0506]:"),
        "{json}"
    );
    fs::write(&shard, &whole).unwrap();

    let out = dir.path().join("two.cells");
    let (code, json, _) = cellrefine(&["merge", bare, "--out", out.to_str().unwrap()]);
    assert_eq!((code, &json["shards"]), (0, &2.into()));
    let (code, _, _) = cellrefine(&["merge", bare, "--out", out.to_str().unwrap()]);
    assert_eq!(code, 2, "the output exists");
    let (code, _, _) = cellrefine(&["inspect", dir.path().join("nothing").to_str().unwrap()]);
    assert_eq!(code, 3);
    let (code, _, _) = cellrefine(&["inspect", dir.path().join("nothing.cells").to_str().unwrap()]);
    assert_eq!(code, 3);
}
