//! Broken 10x matrices and data sets: one clear error of bad input each, whatever is broken, and memory as the file is large.

#[path = "common/import.rs"]
mod fixtures;
#[path = "common/formats.rs"]
mod formats;

use cellrefine::error::Kind;
use cellrefine::import::pack::PackOptions;
use fixtures::{refuse, run};
use std::path::{Path, PathBuf};

/// A generator with a fixed seed.
struct Random(u64);
impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// Packs a broken input: it may be none the worse, but an error is one of bad input. Returns whether it was refused.
fn survives(input: &Path, what: &str) -> bool {
    let folder = tempfile::tempdir().unwrap();
    match run(&[input.to_path_buf()], &folder.path().join("o.cells"), &PackOptions::default()) {
        Ok(_) => false,
        Err(e) => {
            assert_eq!(e.kind(), Kind::Input, "{what}: {e}");
            assert_eq!(
                std::fs::read_dir(folder.path()).unwrap().count(),
                0,
                "{what}: left behind after: {e}"
            );
            true
        }
    }
}

/// Cuts `file` of `input` at many lengths, flips bits, sets words to extremes.
fn torture(input: &Path, file: &Path, seed: u64) -> (usize, usize) {
    let whole = std::fs::read(file).unwrap();
    let mut random = Random(seed);
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    let (mut cut, mut flipped) = (0, 0);
    for n in 0..30 {
        let len = if n < 10 { n * 8 } else { random.below(whole.len()) };
        std::fs::write(file, &whole[..len]).unwrap();
        cut += usize::from(survives(input, &format!("{name} cut to {len}")));
    }
    for _ in 0..60 {
        let mut bytes = whole.clone();
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = 0xff,
            2 => bytes[at..(at + 4).min(whole.len())].fill(0xff),
            _ => {
                let end = (at + 8).min(whole.len());
                bytes[at..end].fill(0);
                bytes[end - 1] = 0x7f;
            }
        }
        std::fs::write(file, &bytes).unwrap();
        flipped += usize::from(survives(input, &format!("{name} changed at {at}")));
    }
    std::fs::write(file, &whole).unwrap();
    (cut, flipped)
}

#[test]
fn damaged_bytes_end_in_an_error_or_in_cells() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["v3", "v2"] {
        let path = formats::h5(dir.path(), name);
        let (cut, flipped) = torture(&path, &path, 11);
        assert!(cut == 30 && flipped > 1, "{name}: {cut}, {flipped}");
    }
    let folder = formats::folder(dir.path(), "mtx_v3");
    for file in ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"] {
        let (cut, flipped) = torture(&folder, &folder.join(format!("GSM42_{file}")), 12);
        assert!(cut > 20 && flipped > 20, "{file}: {cut}, {flipped}");
    }
    let folder = formats::folder(dir.path(), "mtx_v2");
    let (cut, flipped) = torture(&folder, &folder.join("matrix.mtx"), 13);
    assert!(cut > 20 && flipped > 20, "{cut}, {flipped}");
    for name in ["int32_three_files.dataset", "large_list.dataset"] {
        let folder = formats::folder(dir.path(), name);
        for file in std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>() {
            let (cut, flipped) = torture(&folder, &file, 14);
            let arrow = file.extension().is_some_and(|e| e == "arrow");
            assert!(!arrow || (cut > 10 && flipped > 8), "{}: {cut}, {flipped}", file.display());
        }
    }
}

#[test]
fn broken_mtx_folders_are_refused_with_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let folder = formats::folder(dir.path(), "mtx_v2");
    let matrix = folder.join("matrix.mtx");
    let text = std::fs::read_to_string(&matrix).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    let options = PackOptions::default();
    let with = |line: usize, new: &str, needles: &[&str]| {
        let mut changed = lines.clone();
        changed[line] = new;
        std::fs::write(&matrix, changed.join("\n")).unwrap();
        refuse(&folder, &options, needles);
    };
    let banner = "%%MatrixMarket matrix coordinate";
    with(0, "%%MatrixMarket matrix array real general", &["matrix.mtx:1", "coordinate integer|real general"]);
    with(0, &format!("{banner} pattern general"), &["pattern"]);
    with(0, &format!("{banner} integer symmetric"), &["symmetric"]);
    with(0, "<html>", &["MatrixMarket", "<html>"]);
    with(2, "23 29", &["matrix.mtx:3", "23 29"]);
    with(2, "23 29 99999999999999999999", &["matrix.mtx:3"]);
    with(2, "24 29 341", &["24 × 29 in the matrix, 23 features and 29 barcodes"]);
    with(2, "23 29 4", &["entries", "more"]);
    with(2, "23 29 18446744073709551615", &["entries", "18446744073709551615"]);
    with(3, "0 1 1", &["matrix.mtx:4", "gene 0"]);
    with(3, "24 1 1", &["matrix.mtx:4", "gene 24", "1 to 23"]);
    with(3, "1 30 1", &["matrix.mtx:4", "cell 30"]);
    with(3, "1 1", &["matrix.mtx:4", "no entry"]);
    with(3, "1 1 1 1", &["matrix.mtx:4", "no entry"]);
    with(3, "1 1 x", &["matrix.mtx:4", "no entry"]);
    with(3, "1 1 nan", &["matrix.mtx:4", "cannot be a count", "NaN"]);
    with(3, "1 1 -2", &["matrix.mtx:4", "-2"]);
    with(3, "1 1 0.5", &["matrix.mtx:4", "raw counts", "0.5", "--allow-non-integer"]);
    let long = "1 ".repeat(1 << 20);
    with(3, &long, &["too long", "matrix.mtx:4"]);
    lines.pop();
    std::fs::write(&matrix, lines.join("\n")).unwrap();
    refuse(&folder, &options, &["cut short", "entries"]);
    std::fs::write(&matrix, &text).unwrap();
    // Missing, doubled and empty files.
    std::fs::rename(folder.join("genes.tsv"), folder.join("spare")).unwrap();
    refuse(&folder, &options, &["missing", "features.tsv", "genes.tsv"]);
    std::fs::write(folder.join("genes.tsv"), "").unwrap();
    refuse(&folder, &options, &["genes.tsv", "empty"]);
    std::fs::write(folder.join("genes.tsv"), b"\xff\xfe\n").unwrap();
    refuse(&folder, &options, &["genes.tsv:1", "UTF-8"]);
    std::fs::write(folder.join("genes.tsv"), "a\tb\nc\n").unwrap();
    refuse(&folder, &options, &["genes.tsv:2", "fewer columns"]);
    std::fs::rename(folder.join("spare"), folder.join("genes.tsv")).unwrap();
    std::fs::copy(&matrix, folder.join("other_matrix.mtx")).unwrap();
    refuse(&folder, &options, &["one matrix", "other_matrix.mtx"]);
    run(std::slice::from_ref(&matrix), &dir.path().join("named.cells"), &options).unwrap();
    // Feature types without gene expression.
    let typed = formats::folder(dir.path(), "mtx_by_gene");
    let genes = std::fs::read_to_string(typed.join("genes.tsv")).unwrap();
    let antibodies: String = genes.lines().map(|l| format!("{l}\tAntibody Capture\n")).collect();
    std::fs::write(typed.join("genes.tsv"), antibodies).unwrap();
    refuse(&typed, &options, &["no gene expression", "\"Antibody Capture\" (23)"]);
    // A folder that is no input at all.
    refuse(dir.path(), &options, &["no input that can be packed", "state.json"]);
}

fn rewrite(folder: &Path, file: &str, from: &str, to: &str) {
    let path = folder.join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} not in {text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn data_sets_never_leave_their_folder() {
    let dir = tempfile::tempdir().unwrap();
    let options = PackOptions::default();
    let data = "data-00000-of-00001.arrow";
    std::fs::copy(formats::golden("list.dataset").join(data), dir.path().join("secret.arrow")).unwrap();
    let secret = dir.path().join("secret.arrow");
    for name in
        ["../secret.arrow", secret.to_str().unwrap(), "..", ".", "", "sub/x.arrow", "..\\\\secret.arrow"]
    {
        let folder = formats::folder(dir.path(), "list.dataset");
        rewrite(&folder, "state.json", data, name);
        refuse(&folder, &options, &["out of the folder", "state.json"]);
    }
    let folder = formats::folder(dir.path(), "list.dataset");
    std::fs::remove_file(folder.join(data)).unwrap();
    refuse(&folder, &options, &[data]);
    std::os::unix::fs::symlink(&secret, folder.join(data)).unwrap();
    refuse(&folder, &options, &["link", "cp -rL"]);
    // A cycle of links is no file.
    std::fs::remove_file(folder.join(data)).unwrap();
    std::os::unix::fs::symlink(folder.join(data), folder.join(data)).unwrap();
    let e = run(std::slice::from_ref(&folder), &dir.path().join("o.cells"), &options).unwrap_err();
    assert!(e.to_string().contains(data), "{e}");
    for (from, to, needles) in [
        ("\"_data_files\"", "\"files\"", &["does not list its files"][..]),
        ("{", "[", &["not valid JSON"]),
        ("\"filename\"", "\"name\"", &["does not list its files"]),
    ] {
        let folder = formats::folder(dir.path(), "list.dataset");
        rewrite(&folder, "state.json", from, to);
        refuse(&folder, &options, needles);
    }
    // A folder of splits names them.
    let splits = dir.path().join("splits");
    std::fs::create_dir(&splits).unwrap();
    std::fs::write(splits.join("dataset_dict.json"), r#"{"splits": ["train"]}"#).unwrap();
    refuse(&splits, &options, &["FOLDER/train"]);
}

/// The only occurrence of some bytes in a file, changed.
fn patch(file: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = std::fs::read(file).unwrap();
    let at: Vec<usize> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert!(!at.is_empty(), "{from:?}");
    bytes[at[0]..at[0] + to.len()].copy_from_slice(to);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn tokens_that_do_not_fit_are_refused_with_their_row() {
    let dir = tempfile::tempdir().unwrap();
    let options = PackOptions::default();
    let want = fixtures::expected();
    let first: Vec<i64> = want["tokens"][0].as_array().unwrap().iter().map(|t| t.as_i64().unwrap()).collect();
    let bytes: Vec<u8> = first.iter().flat_map(|t| t.to_le_bytes()).collect();
    let with = |token: i64| {
        let folder = formats::folder(dir.path(), "list.dataset");
        let mut changed = bytes.clone();
        changed[16..24].copy_from_slice(&token.to_le_bytes());
        patch(&folder.join("data-00000-of-00001.arrow"), &bytes, &changed);
        folder
    };
    for token in [-1, 22, i64::MAX, i64::MIN] {
        refuse(&with(token), &options, &["not in the vocabulary", "row 0", &token.to_string(), "0 to 21"]);
    }
    refuse(&with(1), &options, &["masked gene", "row 0"]);
    let padded = with(0);
    run(&[padded], &dir.path().join("padded.cells"), &options).unwrap();
    // A length that is another.
    let folder = formats::folder(dir.path(), "list.dataset");
    let lengths: Vec<u8> =
        (0..4).flat_map(|c| (want["tokens"][c].as_array().unwrap().len() as i64).to_le_bytes()).collect();
    let mut longer = lengths.clone();
    longer[16] += 1;
    patch(&folder.join("data-00000-of-00001.arrow"), &lengths, &longer);
    refuse(&folder, &options, &["length", "row 2"]);
}

/// Messages that claim more than the file holds are refused before anything is allocated for them.
#[test]
fn claims_beyond_the_file_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = PackOptions::default();
    let arrow = |folder: &Path| -> PathBuf { folder.join("data-00000-of-00001.arrow") };
    let cases: [(&[u8], &str); 8] = [
        (b"", "not an Arrow stream"),
        (b"\xff\xff\xff\xff", "cut short"),
        (b"\xff\xff\xff\x7f", "does not fit"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f", "does not fit"),
        (b"\xff\xff\xff\xff\x00\x00\x00\x00", "not an Arrow stream"),
        (b"\xff\xff\xff\xff\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00", "where none may stand"),
        (b"\xff\xff\xff\xff\x08\x00\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00", "cannot be read"),
        (b"ARROW1\x00\x00", "not an Arrow stream"),
    ];
    for (bytes, needle) in cases {
        let folder = formats::folder(dir.path(), "list.dataset");
        std::fs::write(arrow(&folder), bytes).unwrap();
        refuse(&folder, &options, &["data-00000-of-00001.arrow", needle]);
    }
    // An h5 file where an Arrow file should be, and the other way round.
    let folder = formats::folder(dir.path(), "list.dataset");
    let h5 = formats::h5(dir.path(), "v3");
    std::fs::copy(arrow(&folder), dir.path().join("x.h5")).unwrap();
    refuse(&dir.path().join("x.h5"), &options, &["not an HDF5 file"]);
    std::fs::copy(h5, arrow(&folder)).unwrap();
    refuse(&folder, &options, &["data-00000-of-00001.arrow"]);
}
