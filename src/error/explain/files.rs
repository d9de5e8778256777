//! Files of any kind.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::FileMissing,
        "no such file or folder",
        "The path names nothing, or a part of it is missing; or nothing can have such a name: a link that leads to itself, \
         a name too long.",
        &["Look for a typo and at the working folder: paths are taken from where the command is started."],
    ),
    code(
        Code::FileForbidden,
        "no permission",
        "The operating system refuses to open, write or list the path for this user.",
        &["`ls -ld` the path and its folder; the reader needs r, and x on every folder above it."],
    ),
    code(
        Code::FileKind,
        "a folder where a file is wanted, or the reverse",
        "A corpus, a checkpoint and a tokenised data set are folders; .h5ad, vocabularies and marker sets are files. zarr \
         stores are folders too, and are not read.",
        &["Name the folder itself rather than a file in it, or the other way round."],
    ),
    code(
        Code::FileEmpty,
        "the file is empty",
        "It has no bytes at all, as after a copy or download that did not begin.",
        &["Copy or download it again."],
    ),
    code(
        Code::FileCut,
        "the file cannot be read to its end",
        "Fewer bytes came than the file should have, or they do not decode.",
        &["Compare its size and checksum with the source, and copy it again."],
    ),
    code(
        Code::FileTooLarge,
        "the file is too large for what it should be",
        "Small files (maps, lists, descriptions) are read whole, up to a bound that no real one comes near; this is most \
         likely another file.",
        &["Check the path; the message says the bound."],
    ),
    code(
        Code::NotText,
        "the file is not UTF-8 text",
        "A table or list holds bytes that are no UTF-8, as from a spreadsheet's other encodings, or it is a binary file.",
        &["`iconv -f LATIN1 -t UTF-8 FILE`, or export it as UTF-8."],
    ),
    code(
        Code::NotJson,
        "the file is not valid JSON",
        "A description or report does not parse; the message says the line and column.",
        &["Copy it again; do not edit the JSON files of corpora and checkpoints by hand."],
    ),
    code(
        Code::NotToml,
        "a run's settings are not TOML",
        "`settings.toml` of a run folder does not parse, so that nothing can be said about the run.",
        &["Undo edits to it, or copy the run folder again."],
    ),
    code(
        Code::GzipDamaged,
        "the gzip file is damaged or cut off",
        "It starts as gzip and does not decompress to its end, or it unpacks to more than a hundred times its size, as no \
         table of names or counts does.",
        &["`gzip -t FILE` says the same; download it again."],
    ),
    code(
        Code::NpyDamaged,
        "not a .npy array that can be used",
        "The header or the size of a NumPy file is wrong, or it holds something else than rows of 32- or 64-bit floats.",
        &["`numpy.save` a two-dimensional float array, or run `cellrefine embed` again."],
    ),
    code(
        Code::PickleRefused,
        "this pickle cannot be read",
        "Pickles are programs. Only dictionaries of names to numbers are read, by a reader that executes nothing; this one \
         holds something else or is damaged.",
        &["Save it again as JSON: `json.dump(dictionary, open(\"FILE.json\", \"w\"))`."],
    ),
    code(
        Code::NameLeadsOut,
        "a name leads out of its folder",
        "A list of files inside a data set names an absolute path, `..`, or a link to elsewhere. Following it would read \
         files that you did not name.",
        &["Save the data set again where all its files are in the folder."],
    ),
    code(
        Code::FileChanged,
        "the file changed while in use",
        "A corpus is mapped into memory, and a shard became shorter while it was read. Its bytes can no longer be trusted.",
        &["Leave a corpus alone while a command reads it; copy it again, then run the command again."],
    ),
];
