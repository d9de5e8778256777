//! Corpora far beyond memory: manifest and offsets are real, tokens are holes of sparse files.
//!
//! The test proves open, draw and resume on 1.2 million cells; `scripts/scale.sh` runs the same on 100 million and prints times
//! and memory (docs/scaling.md). A hole reads as zeros, which is a valid gene id with a known checksum, so the reader's own
//! checks run as on any corpus.

use cellrefine::corpus::format::{BLOCK_BYTES, MANIFEST, Manifest, PAGE_BYTES, ShardEntry, VocabIdentity};
use cellrefine::corpus::reader::Corpus;
use cellrefine::corpus::sampler::{CellOrder, LISTED, Sampler};
use cellrefine::rng::{philox4x32, site, stream_block};
use rayon::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

const SHARD_CELLS: u64 = 65_536;
const VOCAB: usize = 25_426;

/// 200 to 1,799 tokens, 1,000 in the mean.
fn length(cell: u64) -> u64 {
    200 + u64::from(philox4x32([cell as u32, (cell >> 32) as u32, 0, 0], [1, 2])[0]) % 1600
}

/// One shard as the writer lays it out, with holes where genes, counts and names stand.
fn write_shard(folder: &Path, index: u64, cells: u64) -> ShardEntry {
    let mut head: Vec<u8> = Vec::new();
    let mut tokens = 0;
    head.extend(0u64.to_le_bytes());
    for c in 0..cells {
        tokens += length(index * SHARD_CELLS + c);
        head.extend(tokens.to_le_bytes());
    }
    (0..=cells).for_each(|c| head.extend((12 * c).to_le_bytes()));
    let sizes = [
        ("cell_start", "U64", cells + 1, 8),
        ("cell_id_start", "U64", cells + 1, 8),
        ("total_count", "F32", cells, 4),
        ("gene", "U16", tokens, 2),
    ];
    let before: u64 = sizes.iter().map(|(_, _, n, width)| n * width).sum();
    let payload = (before + 12 * cells).next_multiple_of(8);
    let blocks = payload.div_ceil(BLOCK_BYTES as u64);
    let tail = [("cell_id", "U8", payload - before, 1), ("block_crc32c", "U32", blocks, 4)];
    let mut json = format!(
        "{{\"__metadata__\":{{\"format\":\"cellrefine-corpus\",\"schema\":\"1\",\"vocabulary\":\"sparse\",\
         \"block_bytes\":\"{BLOCK_BYTES}\",\"categories\":\"{{}}\"}}"
    );
    let mut offset = 0;
    for (name, dtype, n, width) in sizes.into_iter().chain(tail) {
        let end = offset + n * width;
        json += &format!(
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":[{n}],\"data_offsets\":[{offset},{end}]}}"
        );
        offset = end;
    }
    json.push('}');
    let padded = (8 + json.len()).next_multiple_of(PAGE_BYTES) - 8;
    json.extend(std::iter::repeat_n(' ', padded - json.len()));
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.extend(json.as_bytes());

    let zeros = vec![0u8; BLOCK_BYTES];
    let of_zeros = crc32c::crc32c(&zeros);
    let mut table = Vec::with_capacity(blocks as usize * 4);
    for b in 0..blocks as usize {
        let (from, to) = (b * BLOCK_BYTES, ((b + 1) * BLOCK_BYTES).min(payload as usize));
        let real = &head[from.min(head.len())..to.min(head.len())];
        let crc = match (real.len(), to - from) {
            (0, BLOCK_BYTES) => of_zeros,
            (n, all) => crc32c::crc32c_append(crc32c::crc32c(real), &zeros[..all - n]),
        };
        table.extend(crc.to_le_bytes());
    }
    let name = format!("shard-{index:05}.safetensors");
    let file = File::create(folder.join(&name)).unwrap();
    let bytes = header.len() as u64 + payload + table.len() as u64;
    file.set_len(bytes).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&head, header.len() as u64).unwrap();
    file.write_all_at(&table, header.len() as u64 + payload).unwrap();
    ShardEntry {
        file: name.clone(),
        cells,
        tokens,
        bytes,
        // Open does not read it, `inspect --verify` would.
        sha256: format!("{index:064x}"),
        frame_crc32c: crc32c::crc32c_append(crc32c::crc32c(&header), &table),
    }
}

fn write_corpus(folder: &Path, cells: u64) {
    std::fs::create_dir_all(folder).unwrap();
    let shards = cells.div_ceil(SHARD_CELLS);
    let entries: Vec<ShardEntry> = (0..shards)
        .into_par_iter()
        .map(|i| write_shard(folder, i, SHARD_CELLS.min(cells - i * SHARD_CELLS)))
        .collect();
    let vocabulary = VocabIdentity { digest: "sparse".into(), len: VOCAB };
    let manifest =
        Manifest::seal(vocabulary, None, false, Vec::new(), entries, serde_json::json!({"sparse": cells}));
    std::fs::write(folder.join(MANIFEST), manifest.to_bytes()).unwrap();
}

/// Megabytes of memory of this process that no file backs.
fn anonymous_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("RssAnon")).unwrap_or("RssAnon: 0 kB");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Opens, draws, stops, resumes and reads; prints what each took.
fn open_draw_resume(folder: &Path, cells: u64) {
    let say = |what: &str, start: Instant, more: String| {
        println!("{what:<44} {:>9.3} s  {:>7.1} MB  {more}", start.elapsed().as_secs_f64(), anonymous_mb());
    };
    let before = anonymous_mb();
    let manifest = std::fs::metadata(folder.join(MANIFEST)).unwrap().len();
    println!("{cells} cells, manifest {:.1} kB, memory before {before:.1} MB", manifest as f64 / 1e3);
    for what in ["open", "open again (offsets in the page cache)"] {
        let start = Instant::now();
        let corpus = Corpus::open(folder).unwrap();
        say(what, start, format!("{} tokens", corpus.tokens()));
    }
    let corpus = Corpus::open(folder).unwrap();
    assert_eq!(corpus.cells() as u64, cells);
    let start = Instant::now();
    let longest = corpus.longest_cell();
    say("the longest cell", start, format!("{longest} tokens"));
    assert_eq!(longest, 1799);

    for order in [CellOrder::Random, CellOrder::Blocks] {
        let start = Instant::now();
        let mut sampler = Sampler::of_range(0..cells as u32, 7).unwrap().ordered(order).unwrap();
        let first = sampler.upcoming()[0];
        say(&format!("{order:?}: sampler and its first cell"), start, format!("cell {first}"));

        let start = Instant::now();
        let mut drawn = Vec::with_capacity(1_000_000);
        let mut tokens = 0;
        while drawn.len() < 1_000_000 {
            let next = &sampler.upcoming()[..4096.min(1_000_000 - drawn.len())];
            assert!(next.iter().all(|&c| u64::from(c) < cells));
            tokens += next.iter().map(|&c| corpus.len_of(c as usize) as u64).sum::<u64>();
            drawn.extend_from_slice(next);
            let n = next.len();
            sampler.advance(n);
        }
        let rate = drawn.len() as f64 / start.elapsed().as_secs_f64() / 1e6;
        say(
            &format!("{order:?}: draw 1 M cells with their lengths"),
            start,
            format!("{rate:.2} M cells/s, {tokens} tokens"),
        );
        let mut distinct = drawn.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), drawn.len(), "an epoch draws each cell once");

        // Somewhere in the middle of an epoch far on, as after days of training.
        let mut state = sampler.state();
        (state.epoch, state.position) = (3, cells / 2 + 12_345);
        let start = Instant::now();
        let mut resumed = Sampler::of_range(0..cells as u32, 7).unwrap().ordered(order).unwrap();
        resumed.restore(&state).unwrap();
        let next = resumed.upcoming()[..1000].to_vec();
        say(&format!("{order:?}: resume in the middle of epoch 3"), start, String::new());
        let mut other = resumed.clone();
        state.position -= 70_001;
        other.restore(&state).unwrap();
        other.upcoming();
        for n in [1, 70_000] {
            let mut left = n;
            while left > 0 {
                let step = left.min(other.upcoming().len()).min(999);
                assert!(step > 0);
                other.advance(step);
                left -= step;
            }
        }
        assert_eq!(other.upcoming()[..1000], next, "the same cells by another way");

        let few = &drawn[..drawn.len().min(50_000)];
        let read = || -> u64 {
            few.par_chunks(512)
                .map(|c| {
                    c.iter()
                        .map(|&c| {
                            corpus.genes(c as usize).unwrap().iter().map(|g| u64::from(g) + 1).sum::<u64>()
                        })
                        .sum::<u64>()
                })
                .sum()
        };
        let start = Instant::now();
        let first = read();
        say(&format!("{order:?}: read 50,000 of them, first touch"), start, "each block is proved".into());
        let start = Instant::now();
        assert!((0..20).all(|_| read() == first));
        let rate = 20.0 * few.len() as f64 / start.elapsed().as_secs_f64() / 1e6;
        say(&format!("{order:?}: read them 20 times again, warm"), start, format!("{rate:.2} M cells/s"));
    }
    let grown = anonymous_mb() - before;
    println!("memory beyond the start: {grown:.1} MB");
    // The drawn cells here are 8 MB; a list of 100 million would be 400.
    assert!(grown < 64.0, "{grown:.1} MB for {cells} cells");
}

#[test]
fn a_million_cells_open_draw_and_resume_in_constant_memory() {
    let dir = tempfile::tempdir().unwrap();
    let cells = 1_200_000;
    assert!(cells as usize > LISTED);
    let folder = dir.path().join("sparse.cells");
    write_corpus(&folder, cells);
    open_draw_resume(&folder, cells);
}

/// `CELLREFINE_SCALE_CELLS` cells under `CELLREFINE_SCALE_DIR`: `scripts/scale.sh`.
#[test]
#[ignore = "writes gigabytes: scripts/scale.sh runs it"]
fn as_many_cells_as_asked_for() {
    let cells: u64 =
        std::env::var("CELLREFINE_SCALE_CELLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000_000);
    let base = std::env::var_os("CELLREFINE_SCALE_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::Builder::new().prefix("scale").tempdir_in(base).unwrap();
    let folder = dir.path().join("sparse.cells");
    let start = Instant::now();
    write_corpus(&folder, cells);
    println!("written in {:.1} s", start.elapsed().as_secs_f64());
    open_draw_resume(&folder, cells);
}

/// The whole epoch, through batches of odd sizes and by ranks, against the list; on cells that are no run.
#[test]
fn a_computed_epoch_is_a_permutation_however_it_is_drawn() {
    let cells: Vec<u32> = (0..LISTED as u32 + 5_000).map(|c| 3 * c + 1).collect();
    for order in [CellOrder::Random, CellOrder::Blocks] {
        let of = || Sampler::of_cells(cells.clone(), 5).unwrap().ordered(order).unwrap();
        let whole = of().order_of(2);
        let mut sorted = whole.clone();
        sorted.sort_unstable();
        assert!(sorted == cells && whole != cells && of().order_of(3) != whole);
        let mut s = of().at_epoch(2);
        let mut drawn = Vec::new();
        while s.epoch() == 2 {
            let n = (1 + stream_block(1, 2, site::BENCH, drawn.len() as u64)[0] as usize % 30_000)
                .min(s.upcoming().len());
            assert!(n > 0, "an epoch that is not over shows its next cells");
            drawn.extend_from_slice(&s.upcoming()[..n]);
            s.advance(n);
        }
        assert!(drawn == whole, "{order:?}");
        let state = of().state();
        let other = Sampler::of_cells(cells.clone(), 5).unwrap().ordered(match order {
            CellOrder::Random => CellOrder::Blocks,
            CellOrder::Blocks => CellOrder::Random,
        });
        assert!(other.unwrap().restore(&state).is_err(), "a state of another order is refused");
    }
}

/// What the order of blocks costs: the spread of a type's share over batches of 512, on cells sorted by type.
#[test]
fn blocks_cost_some_spread_of_the_batches() {
    let (n, types, batch) = (1 << 20, 50u32, 512usize);
    let spread = |order: CellOrder| {
        let list = Sampler::of_range(0..n, 3).unwrap().ordered(order).unwrap().order_of(0);
        let share: Vec<f64> = list
            .chunks_exact(batch)
            .map(|b| b.iter().filter(|&&c| c / (n / types + 1) == 7).count() as f64 / batch as f64)
            .collect();
        let mean = share.iter().sum::<f64>() / share.len() as f64;
        (share.iter().map(|s| (s - mean).powi(2)).sum::<f64>()
            / share.len() as f64
            / (mean * (1.0 - mean) / batch as f64))
            .sqrt()
    };
    let (random, blocks) = (spread(CellOrder::Random), spread(CellOrder::Blocks));
    println!(
        "spread of a type's share over batches, of the binomial's: random {random:.3}, blocks {blocks:.3}"
    );
    assert!((0.9..1.1).contains(&random) && blocks < 3.0, "{random} {blocks}");
    // A list in the order of storage would have about 22 times the binomial's.
}
