//! Checkpoints and models.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::CheckpointMissing,
        "no checkpoint here",
        "A checkpoint is a folder with `config.json` and weights; a run folder has them under `checkpoints`.",
        &["Name the run folder or the checkpoint's folder; the message lists what is there."],
    ),
    code(
        Code::CheckpointDamaged,
        "the checkpoint is damaged",
        "A file of it is missing, or its size, digest or content is not what the manifest says.",
        &[
            "`--resume=auto` continues from the newest checkpoint that verifies, and says what it skipped and why.",
            "Copy the folder again, if this is a copy.",
        ],
    ),
    code(
        Code::ModelConfig,
        "config.json describes no model that can be built",
        "A field is missing, unknown or out of range, or the architecture is not a BERT encoder for masked tokens.",
        &["Use the `config.json` that belongs to the weights, as `transformers` wrote it."],
    ),
    code(
        Code::TensorFile,
        "the safetensors file is damaged",
        "Its header is no JSON of tensors, or offsets overlap, leave holes or run beyond the file. It is refused before \
         memory is taken.",
        &["Download or copy it again; compare its SHA-256 with the source's."],
    ),
    code(
        Code::TensorMissing,
        "a tensor is missing",
        "The weights lack a tensor that the model needs; the message offers the nearest name.",
        &["Weights and `config.json` must be of one model."],
    ),
    code(
        Code::TensorShape,
        "a tensor of another shape or type",
        "The file's tensor is not the one that `config.json` describes.",
        &["Weights and `config.json` must be of one model; types read are F32, F16 and BF16."],
    ),
    code(
        Code::WeightsIndex,
        "the index of the weights cannot be used",
        "`model.safetensors.index.json` names files that are not there, a tensor twice, or a path out of the folder.",
        &["Download all files of the model again."],
    ),
    code(
        Code::WeightsPickled,
        "the weights are pickled",
        "`pytorch_model.bin` is a pickle: loading it would execute what it says. It is not read.",
        &["Save it again with `model.save_pretrained(DIR, safe_serialization=True)`."],
    ),
    code(
        Code::CheckpointVocabulary,
        "checkpoint and corpus belong to different vocabularies",
        "The model's rows mean other genes than the corpus's ids, or their numbers differ.",
        &["Pack the cells with the checkpoint's vocabulary: it is in its folder as `vocab.tsv`."],
    ),
    code(
        Code::CheckpointState,
        "the state of the run cannot be read",
        "`state.json` or the optimiser's tensors have another format or are damaged, so that training cannot continue to the \
         same bits.",
        &[
            "`--resume=auto` takes the newest checkpoint that verifies.",
            "Start a new run with `--checkpoint`.",
        ],
    ),
    code(
        Code::ResumeOther,
        "the run was started with something else",
        "A run continues only with the corpus, vocabulary, settings and stage that it was started with: anything else would \
         be another run under its name.",
        &["The message names what differs.", "Start a new run: `--checkpoint OLD_RUN --out NEW_RUN`."],
    ),
    code(
        Code::NoResume,
        "there is no checkpoint to resume from",
        "`--resume` was given, and the run folder holds no checkpoint.",
        &["Leave `--resume` out to begin, or check `--out`."],
    ),
    code(
        Code::CheckpointLacksPrototypes,
        "the checkpoint holds no prototypes",
        "Prototypes are written by `refine`; this checkpoint is of another stage.",
        &["Use a refined checkpoint, or give `--markers`."],
    ),
    code(
        Code::CheckpointPrototypes,
        "the checkpoint's prototypes are of other types",
        "Its types are not those of the marker sets or labels given.",
        &["Use the marker sets that the run was started with."],
    ),
    code(
        Code::CheckpointClassifier,
        "the checkpoint has no such classifier",
        "It holds none, or one of other classes than the labels.",
        &["Use a checkpoint of `finetune` with the same label column and classes."],
    ),
    code(
        Code::CellTooLong,
        "a cell is longer than the model's context",
        "The position table of the model has fewer rows than the cell has tokens.",
        &["Lower `batch.max_tokens`, which cuts cells after their highest ranks."],
    ),
];
