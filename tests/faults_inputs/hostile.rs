//! Files that mean harm, one by one: what no mutation finds by chance. Each is read like a mutant, in a child with bounded memory.

use super::kinds::{self, Kind};
use super::mutate::{mutant, seed};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// What stands in the place of a file.
pub enum Damage {
    /// Bytes.
    Bytes(Vec<u8>),
    /// A hole of so many bytes, which takes no space.
    Hole(u64),
    /// A folder of the file's name.
    Folder,
    /// A link to this place, which may be itself.
    Link(PathBuf),
}

impl Default for Damage {
    fn default() -> Self {
        Damage::Bytes(Vec::new())
    }
}

/// One such file.
#[derive(Default)]
pub struct Case {
    pub what: String,
    /// Index into the kind's files.
    pub file: usize,
    pub damage: Damage,
    /// Must it be refused? Otherwise it must only end well.
    pub refused: bool,
}

impl Damage {
    /// Puts it in the place of `file`.
    pub fn place(&self, file: &Path) {
        std::fs::remove_file(file).unwrap();
        match self {
            Damage::Bytes(bytes) => std::fs::write(file, bytes).unwrap(),
            Damage::Hole(len) => std::fs::File::create(file).and_then(|f| f.set_len(*len)).unwrap(),
            Damage::Folder => std::fs::create_dir(file).unwrap(),
            Damage::Link(to) => std::os::unix::fs::symlink(to, file).unwrap(),
        }
    }
}

/// All of a kind, the same for parent and child.
pub fn cases(kind: &Kind, sample: &Path) -> Vec<Case> {
    let mut all = Vec::new();
    for file in 0..kind.damaged.len() {
        let name = Path::new(kind.damaged[file]).file_name().unwrap();
        let mut add = |what: &str, damage| {
            all.push(Case { what: format!("{} {what}", name.display()), file, damage, refused: false });
        };
        add("of no bytes", Damage::Bytes(Vec::new()));
        add("of 8 GiB of nothing", Damage::Hole(8 << 30));
        add("as a folder", Damage::Folder);
        add("as a link to itself", Damage::Link(name.into()));
        add("as a link to nothing", Damage::Link("nothing".into()));
    }
    let own: Vec<(&str, Vec<u8>)> = match kind.name {
        "h5ad_csr" => hdf5(),
        "mtx_gzip" => vec![("bomb", gzip_of("1 1 1\n")), ("bomb of one line", gzip_of("0"))],
        "markers_gmt" => marker_files(),
        "markers_gzip" => {
            vec![("bomb", gzip_of("set\tx\tENSG00000000100\n")), ("bomb of one line", gzip_of("\0"))]
        }
        "vocabulary" => vec![
            ("bomb", gzip_of("x\t1\t1\n")),
            ("ids of no order", b"# cellrefine-vocabulary 1\ntoken\tid\tmedian\n<pad>\t7\t0\n".to_vec()),
        ],
        "gene_map" => vec![("bomb", gzip_of("S0\tENSG00000000100\n")), ("of no pair", b"a\tb\n".to_vec())],
        // Found by mutation: a chunk whose entry claims 480 MB of a file of 30 kB.
        "tenx_v2" => vec![(
            "a chunk beyond the file",
            mutant(&std::fs::read(sample.join("x.h5")).unwrap(), 1711, seed(kind)),
        )],
        "model" => configs(&std::fs::read_to_string(sample.join("config.json")).unwrap()),
        "safetensors" => safetensors(&std::fs::read(sample.join("t.safetensors")).unwrap()),
        "model_sharded" => indexes(&std::fs::read_to_string(sample.join(kind.damaged[0])).unwrap()),
        "dataset" => arrow(&std::fs::read(sample.join(kind.damaged[0])).unwrap()),
        "dataset_files" => states(&std::fs::read_to_string(sample.join(kind.damaged[0])).unwrap()),
        "corpus" => manifests(&std::fs::read_to_string(sample.join(kind.damaged[0])).unwrap()),
        "checkpoint" => states_of_runs(&std::fs::read_to_string(sample.join(kind.damaged[0])).unwrap()),
        "perturbations" => vec![("one prototype and gene a line", prototypes_of_genes())],
        "npy" => vec![
            ("a shape that overflows", array("(4294967296, 4294967296)")),
            ("a shape without end", array("(1, 1, 1)")),
            ("a negative shape", array("(-1, 4)")),
        ],
        _ => Vec::new(),
    };
    // A group that holds itself is no harm, and no cells are no cells.
    let harmless = ["hard_loop", "a schema and no cells"];
    all.extend(own.into_iter().map(|(what, bytes)| Case {
        what: what.to_string(),
        file: 0,
        damage: Damage::Bytes(bytes),
        refused: !harmless.contains(&what),
    }));
    all
}

/// What scripts/golden/make_hostile_h5ad.py wrote, and a link to another file's dataset by hand.
fn hdf5() -> Vec<(&'static str, Vec<u8>)> {
    let names = [
        "link_loop",
        "hard_loop",
        "external_link",
        "external_storage",
        "huge_chunk",
        "gzip_bomb",
        "offsets_overflow",
        "shape_overflow",
    ];
    let unpacked = |name: &str| {
        let mut bytes = Vec::new();
        let packed = std::fs::File::open(kinds::golden(&format!("hostile/{name}.h5ad.gz"))).unwrap();
        flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
        bytes
    };
    names.into_iter().map(|name| (name, unpacked(name))).collect()
}

/// 128 MiB of `unit` in a few hundred kilobytes.
fn gzip_of(unit: &str) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let block = unit.repeat((1 << 20) / unit.len());
    (0..1 << 7).for_each(|_| packed.write_all(block.as_bytes()).unwrap());
    packed.finish().unwrap()
}

fn marker_files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("no tab", b"set 1 ENSG00000000100\n".to_vec()),
        ("one line of 20 MB", [b"set\tx\t".to_vec(), b"ENSG00000000100\t".repeat(20 << 16)].concat()),
        ("one word of 20 MB", [b"set\tx\t".to_vec(), b"E".repeat(20 << 20)].concat()),
        ("binary", b"set\tx\tENSG\0\x01\x02\n".to_vec()),
        ("not UTF-8", b"set\tx\tENSG\xff\n".to_vec()),
        ("a set twice", b"set\tx\tENSG00000000100\nset\tx\tENSG00000000107\n".to_vec()),
        ("all genes unknown", b"set\tx\tNOT\tONE\n".to_vec()),
        ("two million sets", (0..2_000_000).flat_map(|n| format!("{n}\t\t{n}\n").into_bytes()).collect()),
        ("a weight that is none", b"set\tgene\tweight\na\tENSG00000000100\t-1\n".to_vec()),
    ]
}

/// The header of `whole` in other words, the data behind it as it was.
fn safetensors(whole: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (header, data) = (String::from_utf8(whole[8..8 + len].to_vec()).unwrap(), &whole[8 + len..]);
    let with_length = |n: u64| [&n.to_le_bytes(), &whole[8..]].concat();
    let with = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes(), data].concat();
    let swap = |from: &str, to: &str| {
        assert!(header.contains(from), "{from} not in {header}");
        with(&header.replacen(from, to, 1))
    };
    let of = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    vec![
        ("a header of all bytes there are", with_length(u64::MAX)),
        ("a header longer than the file", with_length(whole.len() as u64)),
        ("a header of 100 MB and a byte", with_length(100_000_001)),
        ("a header that ends where the word ends", with_length(0)),
        ("lists 100,000 deep", with(&"[".repeat(100_000))),
        ("objects 100,000 deep", with(&"{\"a\":".repeat(100_000))),
        ("overlapping tensors", swap("\"data_offsets\":[0,", "\"data_offsets\":[4,")),
        ("a negative offset", swap("\"data_offsets\":[0,", "\"data_offsets\":[-8,")),
        ("an offset that is no integer", swap("\"data_offsets\":[0,", "\"data_offsets\":[0.5,")),
        ("a shape that overflows", swap("\"shape\":[2,3]", "\"shape\":[18446744073709551615,2]")),
        (
            "a product that overflows to the size",
            swap("\"shape\":[2,3]", "\"shape\":[9223372036854775811,2]"),
        ),
        ("a negative shape", swap("\"shape\":[2,3]", "\"shape\":[-2,-3]")),
        ("an unknown type", swap("\"F32\"", "\"F33\"")),
        (
            "a tensor twice",
            swap("\"b\":{", "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]},\"b\":{"),
        ),
        (
            "a tensor twice, alike",
            of(
                r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
            ),
        ),
        ("bytes that belong to no tensor", [whole, &[0]].concat()),
        (
            "a hole",
            of(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#)
                .into_iter()
                .chain([0, 0])
                .collect(),
        ),
        (
            "offsets beyond all numbers",
            of(
                r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
            ),
        ),
    ]
}

/// Sizes that a network cannot have, of which lists and buffers would be made.
fn configs(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let mut all = Vec::new();
    for (field, what) in [
        ("num_hidden_layers", "four billion layers"),
        ("hidden_size", "a width of four billion"),
        ("vocab_size", "a vocabulary of four billion"),
        ("intermediate_size", "a feed-forward width of four billion"),
        ("num_attention_heads", "four billion heads"),
        ("max_position_embeddings", "four billion positions"),
    ] {
        let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
        assert!(json[field].is_u64(), "{field} not in {text}");
        json[field] = u32::MAX.into();
        all.push((what, json.to_string().into_bytes()));
    }
    all
}

fn indexes(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let name = "model-00001-of-00002.safetensors";
    let with = |other: &str| text.replacen(name, other, 1).into_bytes();
    vec![
        ("../ in a shard's name", with("../../x.safetensors")),
        ("a shard's name from the root", with("/etc/hostname.safetensors")),
        ("a shard's name with a zero byte", with("a\\u0000.safetensors")),
        ("a shard's name of 5,000 letters", with(&format!("{}.safetensors", "a".repeat(5_000)))),
        ("a shard that is not there", with("model-00003-of-00002.safetensors")),
        ("a shard that is the folder", with(".")),
        ("names that are numbers", with("1").into_iter().chain(*b"}").collect()),
    ]
}

fn arrow(whole: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    // The first message of a stream is the schema; the second a batch.
    let schema = u32::from_le_bytes(whole[4..8].try_into().unwrap()) as usize + 8;
    vec![
        ("four bytes that claim 4 GiB", vec![0xff, 0xff, 0xff, 0x7f]),
        ("eight bytes that claim 4 GiB", vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ("a schema and no cells", whole[..schema].to_vec()),
        ("two schemas", [&whole[..schema], whole].concat()),
        ("a batch before its schema", whole[schema..].to_vec()),
        ("a metadata of zeros", [&[0xff, 0xff, 0xff, 0xff, 0x00, 0x01, 0, 0][..], &[0; 256]].concat()),
        ("text", b"{\"a\": 1}\n".to_vec()),
    ]
}

fn states(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let name = "data-00000-of-00003.arrow";
    assert!(text.contains(name));
    let with = |other: &str| text.replacen(name, other, 1).into_bytes();
    vec![
        ("../ in _data_files", with("../V.tsv")),
        ("a name from the root", with("/etc/hostname")),
        ("a name with a zero byte", with("a\\u0000b")),
        ("a name of 5,000 letters", with(&"a".repeat(5_000))),
        ("the folder itself", with(".")),
        ("a file that is no stream", with("dataset_info.json")),
        ("no list", b"{\"_data_files\": 3}".to_vec()),
        ("an empty list", b"{\"_data_files\": []}".to_vec()),
        (
            "one file 200,000 times",
            format!(
                "{{\"_data_files\": [{}]}}",
                vec![format!("{{\"filename\": \"{name}\"}}"); 200_000].join(",")
            )
            .into_bytes(),
        ),
    ]
}

fn manifests(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} not in {text}");
        text.replacen(from, to, 1).into_bytes()
    };
    vec![
        ("../ in a shard's name", with("\"shard-00000.safetensors\"", "\"../shard-00000.safetensors\"")),
        ("a shard twice", with("\"shard-00001.safetensors\"", "\"shard-00000.safetensors\"")),
        ("more cells", with("\"cells\": 50", "\"cells\": 51")),
        ("cells beyond all numbers", with("\"cells\": 50", "\"cells\": 18446744073709551615")),
        ("another schema", with("\"schema\": 1", "\"schema\": 2")),
    ]
}

fn states_of_runs(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let name = "\"model.safetensors\"";
    assert!(text.contains(name));
    let with = |other: &str| text.replacen(name, other, 1).into_bytes();
    vec![
        ("../ in a file's name", with("\"../model.safetensors\"")),
        ("a name from the root", with("\"/etc/hostname\"")),
        ("a name with a zero byte", with("\"a\\u0000b\"")),
        ("the folder itself", with("\".\"")),
        ("a name of 5,000 letters", with(&format!("\"{}\"", "a".repeat(5_000)))),
        ("no files", b"{\"format\": 1, \"files\": 3}".to_vec()),
        ("an empty object", b"{}".to_vec()),
    ]
}

/// Shifts make a matrix of genes by prototypes: each line a new one of both.
fn prototypes_of_genes() -> Vec<u8> {
    let head = "gene_id\tsymbol\tcells\tsimilarity\tprototype\tshift\tshift_sd\ttowards\n";
    let lines = (0..40_000).map(|n| format!("{n}\t\t1\t0\t{n}\t0\t0\t0\n"));
    std::iter::once(head.to_string()).chain(lines).collect::<String>().into_bytes()
}

fn array(shape: &str) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16 + 1).to_le_bytes());
    bytes.extend(text.bytes());
    bytes.extend([b'\n', 0, 0, 0, 0]);
    bytes
}
