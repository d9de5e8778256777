//! Ranks of cells of real size against numpy's (`scripts/golden/make_import_fixtures.py`), ties included.

use cellrefine::genes::tokenize::{Scratch, Tokenizer};
use cellrefine::genes::vocab::Vocab;
use std::io::Read;
use std::path::Path;

#[test]
fn ranks_of_large_cells_equal_numpy() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import/rank_cells.bin.gz");
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
    let mut rest = bytes.as_slice();
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head
    };
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap()) as usize;
    let (genes, cells) = (word(take(4)), word(take(4)));
    let median = take(8 * genes).chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
    let median = [0.0, 0.0].into_iter().chain(median).collect();
    let names = (0..genes).map(|g| format!("g{g}"));
    let vocab = Vocab::from_parts(
        ["<pad>", "<mask>"].map(str::to_string).into_iter().chain(names).collect(),
        median,
        vec![],
    )
    .unwrap();
    let token: Vec<Option<u32>> = (0..genes as u32).map(|g| Some(g + 2)).collect();
    let tokenizer = Tokenizer::new(&token, &vocab, 0);
    let half = |b: &[u8]| u16::from_le_bytes(b.try_into().unwrap());
    let mut scratch = Scratch::default();
    for cell in 0..cells {
        let counts: Vec<u16> = take(2 * genes).chunks(2).map(half).collect();
        let length = word(take(4));
        let order: Vec<u32> = take(2 * length).chunks(2).map(|b| u32::from(half(b)) + 2).collect();
        let columns: Vec<u32> = (0..genes as u32).filter(|&g| counts[g as usize] > 0).collect();
        let dense: Vec<f64> = columns.iter().map(|&g| f64::from(counts[g as usize])).collect();
        let (mut found, mut backwards) = (Vec::new(), Vec::new());
        let n = dense.iter().sum();
        tokenizer.rank(&columns, &dense, n, &mut scratch, &mut found, None);
        assert!(found == order, "cell {cell}");
        // Entries in another order are the same cell.
        let (columns, dense): (Vec<u32>, Vec<f64>) = columns.into_iter().zip(dense).rev().unzip();
        tokenizer.rank(&columns, &dense, n, &mut scratch, &mut backwards, None);
        assert!(backwards == order, "cell {cell}, reversed");
    }
    assert!(rest.is_empty());
}
