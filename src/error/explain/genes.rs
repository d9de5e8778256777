//! Genes, vocabularies and marker sets.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::VocabularyForm,
        "this is not a vocabulary that can be used",
        "A vocabulary is tab-separated text with a first line of its own, token ids that count up from 0, names once each \
         and medians above 0.",
        &[
            "`cellrefine vocab build` makes one from cells, `cellrefine vocab convert` from Geneformer's dictionaries.",
        ],
    ),
    code(
        Code::VocabularyDigest,
        "the vocabulary does not fit its own digest",
        "The file was changed after it was written. A corpus packed with it would hold ids that mean other genes.",
        &["Take the original file again, or build a new one and pack again."],
    ),
    code(
        Code::VocabularyMismatch,
        "two vocabularies that differ",
        "Token ids of one would be read as genes of another. The message gives both digests.",
        &["Use the vocabulary that the corpus was packed with: it is in the corpus folder as `vocab.tsv`."],
    ),
    code(
        Code::VocabularyTokens,
        "the vocabulary lacks a special token",
        "`<pad>` and `<mask>`, and for models that begin a cell with one `<cls>` and `<eos>`, must be tokens.",
        &["Build or convert the vocabulary with this program, which adds them."],
    ),
    code(
        Code::VocabularyFile,
        "the corpus's vocabulary file is missing or was changed",
        "A corpus carries its vocabulary, and its digest is in the manifest. The file in the folder is absent or another.",
        &[
            "Copy the corpus folder again, whole.",
            "Name the right file with `--vocab` where the command takes it.",
        ],
    ),
    code(
        Code::GenesNotRecognised,
        "too few gene names are in the vocabulary",
        "Fewer than `--min-gene-match` of the names are known: another species, another kind of id, or symbols where the \
         vocabulary has Ensembl ids. Most of each cell would be lost without a word.",
        &[
            "Name the right column: `--genes COLUMN`.",
            "Give a map from symbols: `--gene-map MAP.tsv`.",
            "`--min-gene-match 0.1` if a small panel is what you have.",
        ],
    ),
    code(
        Code::GeneUnknown,
        "no such gene",
        "A gene that was named is not in the vocabulary, or in no cell.",
        &["Use the id or symbol of the vocabulary: `grep NAME vocab.tsv`."],
    ),
    code(
        Code::GeneAmbiguous,
        "a symbol that several genes have",
        "More than one Ensembl id has this symbol, and a choice would be silent.",
        &["Name the gene by its Ensembl id."],
    ),
    code(
        Code::DictionaryForm,
        "the gene dictionary cannot be read",
        "A dictionary is a pickle, JSON object or table of names and numbers; this holds no pair, a name twice, or a row of \
         another form.",
        &["Take the dictionaries of one release of Geneformer."],
    ),
    code(
        Code::DictionaryIds,
        "token ids must be 0, 1, 2 and so on",
        "Ids of the dictionary leave gaps, occur twice or are no integers. They are rows of the model's table.",
        &["Take the token dictionary of the model unchanged."],
    ),
    code(
        Code::DictionaryMedians,
        "genes without a usable median",
        "Ranks divide each count by the gene's median, so that every gene of the dictionary needs one above 0.",
        &["Token and median dictionary must be of one release."],
    ),
    code(
        Code::GeneMap,
        "the gene map cannot be used",
        "A map has a symbol and an Ensembl gene id a line; this one lacks them.",
        &["Lines of `CD3E<TAB>ENSG00000198851`, plain or gzip."],
    ),
    code(
        Code::MarkerForm,
        "this is not a marker file",
        "Marker sets are GMT (name, description, genes; tabs between) or a table with a set and a gene a row, in UTF-8.",
        &["The message names the line; spaces instead of tabs are the usual cause."],
    ),
    code(
        Code::MarkerLimits,
        "a marker file beyond all measure",
        "A line, a name, or the number of sets is larger than any real file has; most likely it is another kind of file.",
        &["Check the path; the message says the bound."],
    ),
    code(
        Code::MarkerSets,
        "a marker set cannot be used",
        "A set has no gene, occurs twice, has weights for only some genes, or all of them are 0.",
        &["Mend the set that the message names, or remove it."],
    ),
    code(
        Code::MarkerGenesUnknown,
        "no marker gene is in the vocabulary",
        "All sets are empty after looking up their genes: symbols of another species, or ids of another kind.",
        &[
            "`cellrefine markers check --markers FILE --vocab vocab.tsv` shows what is matched; `--gene-map` maps symbols.",
        ],
    ),
    code(
        Code::MarkerLabels,
        "labels without a usable marker set",
        "Prototypes are matched to labels by name, and some label has no set, or a set without known genes.",
        &["Name sets as the labels, or give `--marker-map MAP.tsv` with label and set a line."],
    ),
    code(
        Code::MarkerMap,
        "the marker map cannot be used",
        "A row lacks its label or set, names a set that is not there, or a label occurs twice or fits several sets.",
        &["Lines of `label<TAB>set name`, each label once."],
    ),
    code(
        Code::MarkersNotDerived,
        "no markers can be derived",
        "Markers set one class against the rest: two classes are needed, and a gene that is more frequent in one of them.",
        &["Check `--label`, and that the training part holds at least two classes."],
    ),
];
