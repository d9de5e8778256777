//! Corpora, labels and splits.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::CorpusMissing,
        "this is no corpus",
        "A corpus is a folder with a `corpus.json`, named `NAME.cells`; there is none here, or a file.",
        &[
            "Make one with `cellrefine pack`.",
            "A folder named `.NAME.cells.partial` is one that `pack` did not finish.",
        ],
    ),
    code(
        Code::CorpusVersion,
        "a corpus of another format",
        "Its format number is not this program's. Reading on would guess at bytes.",
        &["Pack it again with this version, or use the version that wrote it."],
    ),
    code(
        Code::ManifestDamaged,
        "the corpus's manifest is damaged",
        "`corpus.json` does not parse, lacks a field, or contradicts itself.",
        &["Copy the corpus folder again, or pack it again from its inputs."],
    ),
    code(
        Code::ShardHeader,
        "a shard is cut short or damaged",
        "The size or header of a shard file is not what the manifest says: a copy that was broken off, or flipped bits.",
        &[
            "Copy the shard again; `cellrefine inspect X.cells --verify` reads everything and compares digests.",
        ],
    ),
    code(
        Code::ShardOffsets,
        "a shard's offsets are damaged",
        "Offsets of cells fall or do not end at the last token. Opening checks this, so that no later read can go astray.",
        &["Copy the shard again, or pack the corpus again."],
    ),
    code(
        Code::ShardBlock,
        "a block of a shard is damaged",
        "A checksum over a block does not fit its bytes. Blocks are checked when they are first touched; the message names \
         the bytes and the cells in them.",
        &[
            "Copy the shard again from the original.",
            "If the original is sound, look at this machine's disk and memory: `cellrefine inspect X.cells --verify` twice.",
        ],
    ),
    code(
        Code::ShardDigest,
        "a shard is not the one that was packed",
        "The file's digest differs from the manifest's, though it may be well formed: a shard of another corpus, or bits \
         flipped in a copy.",
        &["Copy the shard again, or pack the corpus again."],
    ),
    code(
        Code::ShardContent,
        "a shard holds an impossible value",
        "A gene id is beyond the vocabulary, a category code beyond its categories, or a cell name is no UTF-8, though \
         checksums hold: the writer was at fault, or the file was made by hand.",
        &["Pack the corpus again."],
    ),
    code(
        Code::TooManyCells,
        "too many cells for one corpus",
        "Cells are numbered with 32 bits: one corpus holds at most 4,294,967,295.",
        &["Make several corpora."],
    ),
    code(
        Code::NoCells,
        "no cells",
        "After filters, splits and labels nothing is left to train on, to time or to draw from.",
        &[
            "Look at `--split`, `--label`, `--exclude-label`, and at what `cellrefine inspect X.cells` counts.",
        ],
    ),
    code(
        Code::ValuesMissing,
        "the model reads expression values, the corpus has none",
        "A model with value bins needs the values beside the ranks; they are stored on request.",
        &["`cellrefine pack … --values`, or a model without `value_bins`."],
    ),
    code(
        Code::ObsMissing,
        "the corpus has no such obs column",
        "The columns of a corpus are chosen when it is packed.",
        &["The message lists those there are.", "Pack again with `--obs COLUMN`."],
    ),
    code(
        Code::ObsType,
        "an obs column of the other type",
        "Labels and batches are categories, targets are numbers; this column is the other.",
        &["Choose another column.", "Store it as a category (`astype(str)`) in the input, and pack again."],
    ),
    code(
        Code::ObsValueMissing,
        "no cell has this value",
        "A value that was named is in no cell of the obs column.",
        &["The message offers the nearest; values are case-sensitive."],
    ),
    code(
        Code::SplitEmpty,
        "a part of the split is empty",
        "A share is so small, or a held-out value so rare, that a part has no cell.",
        &["Raise the share, or leave the part out."],
    ),
    code(
        Code::SplitClasses,
        "too few classes, or cells of a class, for this split",
        "Telling classes apart needs at least two in the training part, and a class with one cell cannot be on both sides.",
        &["`--exclude-label VALUE` leaves a class out; a larger training share keeps more."],
    ),
    code(
        Code::SplitRecord,
        "the split's record cannot be read",
        "A run writes how it divided its cells to `split.json`; the file is damaged. Without it training cells could be \
         tested on.",
        &["Copy the run folder again."],
    ),
    code(
        Code::SplitMismatch,
        "the split belongs to another corpus",
        "The record names another corpus, or its settings no longer give the same cells: the corpus was packed anew in \
         another way.",
        &["Use the corpus that the run was trained on."],
    ),
    code(
        Code::SamplerPosition,
        "the saved position belongs to other cells",
        "A run continues at the cell where it stopped, which has a meaning only for the same cells, seed and sampling.",
        &["Continue with the corpus, split, seed and sampling of the run; start a new one for others."],
    ),
    code(
        Code::MergeMismatch,
        "corpora that do not fit together",
        "They differ in vocabulary, format, obs columns or stored values.",
        &["Pack all of them with the same vocabulary file and the same flags."],
    ),
    code(
        Code::MergeTwice,
        "the same cells twice",
        "Two of the corpora hold the same shard: every cell of it would be in the result twice, and on both sides of a split.",
        &["Remove one of them from the list."],
    ),
    code(
        Code::PartsIncomplete,
        "the parts are not all there, or not all of one corpus",
        "Parts that `pack --shard I/N` made are merged only together: every one of them once, and nothing else. A missing part \
         would be cells missing without a word.",
        &[
            "Run `pack --shard` for the parts that the message names, then merge again.",
            "Name each part once.",
        ],
    ),
];
