//! Faults of the program, flags and settings.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::Bug,
        "a fault of this program",
        "Something holds that the program has ruled out. Nothing that you typed and no file should be able to cause it; \
         the run stops because its results could not be trusted.",
        &[
            "Send in the report file that the message names: it holds the command line, the version and facts about the \
             machine, and nothing of your data.",
            "Training goes on from its last checkpoint with `--resume=auto`.",
        ],
    ),
    code(
        Code::Panicked,
        "the program broke off",
        "A check inside the program failed where no error could be returned. The report file that the message names holds \
         where, the stack, the command line, the version and facts about the machine, and nothing of your data.",
        &[
            "Send in the report file.",
            "Read it first if names of folders on the command line are private.",
            "Training goes on from its last checkpoint with `--resume=auto`.",
        ],
    ),
    code(
        Code::CommandLine,
        "the command line cannot be read",
        "A flag or command is unknown, lacks its value, has a value of the wrong form, or one that is required is missing.",
        &[
            "The message names the flag; `cellrefine COMMAND --help` lists all of them with defaults and examples.",
        ],
    ),
    code(
        Code::FlagConflict,
        "flags that do not go together",
        "Two flags contradict each other, one needs another that is absent, or one is for another kind of input. Ignoring \
         it would hide a misunderstanding.",
        &["Leave one of the flags out, or add the one that the message asks for."],
    ),
    code(
        Code::FlagValue,
        "a flag's value is out of range",
        "The value has the right form and no meaning: a share above 1, a count of 0, a place that no file has.",
        &["The message says what is allowed, and `cellrefine COMMAND --help` what the default is."],
    ),
    code(
        Code::SettingUnknown,
        "no such setting",
        "A key of `--config`, of `--set` or of a `CELLREFINE_*` variable names no setting. An ignored typo would train with \
         the default instead.",
        &["The message offers the nearest name; docs/guide.md lists the settings."],
    ),
    code(
        Code::SettingValue,
        "a setting's value cannot be used",
        "The value has the wrong type, is out of range, or does not fit the model: a context longer than the position \
         table, more adapter rank than a matrix has.",
        &["The message says which setting, where it was set, and what is allowed."],
    ),
    code(
        Code::SettingFixed,
        "the checkpoint fixes this setting",
        "Shapes of the model come from the checkpoint that training starts from, and a setting asks for others.",
        &["Leave the setting out.", "Train from the start with `--preset` to have another shape."],
    ),
    code(
        Code::SettingConflict,
        "settings that contradict each other",
        "Two settings cannot both hold for this command, such as adapters with nothing to adapt.",
        &["Change the one that the message names."],
    ),
    code(
        Code::OutputName,
        "the output's name cannot be used",
        "The output has no file name, a suffix that stands for no form, or a parent folder that is not there.",
        &["Give a path with a name, such as `--out cells.cells` or `--out vectors.npy`."],
    ),
    code(
        Code::OutputExists,
        "the output exists already",
        "Nothing is written over: the folder or file may be the only copy of a long run.",
        &["Name another `--out`, or remove the old one.", "A run folder is continued with `--resume=auto`."],
    ),
    code(
        Code::DeviceUnknown,
        "no such kind of device",
        "`--device` takes auto, cpu, cuda, cuda:N and emulated.",
        &["`cellrefine doctor` prints what this machine has."],
    ),
    code(
        Code::PresetUnknown,
        "no such preset",
        "`--preset` names a shape of model that is built in, and this is none.",
        &["The message lists them, and the nearest name."],
    ),
    code(
        Code::SplitForm,
        "a split cannot be read",
        "`--split` takes shares such as `train=0.67,test=0.33` that sum to at most 1, `--holdout` a column and a value such \
         as `donor=D3`.",
        &["The message says which part is not understood."],
    ),
    code(
        Code::SplitOther,
        "another split than the checkpoint's",
        "The checkpoint's run divided its cells in one way and this command asks for another: cells that it was trained on \
         would be tested on.",
        &["Leave the split, label and exclude flags out: the run's own record is then used."],
    ),
    code(
        Code::LabelsNeeded,
        "this needs labels",
        "What is asked for goes by the classes of cells, and no label column was named.",
        &["Add `--label COLUMN`; `cellrefine inspect X.cells` lists the columns."],
    ),
    code(
        Code::MarkersNeeded,
        "this needs marker sets",
        "Prototypes or evidence are to come from marker genes, and none were given.",
        &["Add `--markers FILE.gmt`, or `--markers derive` where cells have labels."],
    ),
    code(
        Code::NoInputs,
        "no inputs",
        "The command works on files or corpora, and none was named. A shell pattern that matches nothing is a frequent cause.",
        &["Name at least one."],
    ),
    code(
        Code::InputTwice,
        "an input is given twice",
        "Two inputs have the same bytes, under one name or two: every cell of it would be in the corpus twice, and on both \
         sides of a split.",
        &["Remove one of them."],
    ),
    code(
        Code::KernelShape,
        "the GPU kernels have no form for this shape",
        "A width is beyond what a thread block's shared memory holds, or a head width is not 32, 64 or 128.",
        &["Use `--device cpu`, which has no such bound, or a model of another width."],
    ),
    code(
        Code::EmulatorVariable,
        "a variable of the emulator cannot be read",
        "A `CELLREFINE_EMULATOR_*` variable chooses the schedule, the architecture or the memory of the emulated device, and \
         its value names none.",
        &["The message lists the values; unset the variable for the default."],
    ),
    code(
        Code::BenchCase,
        "there is nothing to time",
        "The case of a benchmark has no cells, no tokens, too few types, or an unknown mixture of lengths.",
        &["`cellrefine bench COMMAND --help` shows cases that work."],
    ),
    code(
        Code::CodeUnknown,
        "no such error code",
        "`explain` was asked for a code that this version does not have.",
        &["`cellrefine explain` lists all of them."],
    ),
    code(
        Code::SettingsFile,
        "the settings file is not TOML",
        "`--config` names a file that is no TOML; the message says the line and what stood there.",
        &["Every run folder has a `settings.toml` to start from."],
    ),
    code(
        Code::RankNumbers,
        "the ranks are not numbered rightly",
        "The launcher's variables or the flags give a rank beyond the number of ranks, the same rank twice, two different \
         numberings, or ranks of another job.",
        &[
            "Start all ranks of one job with one launcher; `--rank` and `--world` are stronger than all variables.",
            "Unset `RANK`, `WORLD_SIZE` and the like where an earlier job has left them in the environment.",
        ],
    ),
    code(
        Code::RankAddress,
        "the address of rank 0 is missing or unusable",
        "Ranks meet at a TCP address of rank 0, which no flag and no variable gives, or which names no host and port.",
        &["`--master HOST:PORT`, or `MASTER_ADDR` and `MASTER_PORT`, the same for all ranks."],
    ),
    code(
        Code::RankBuild,
        "this build does not speak that protocol",
        "Collectives over MPI are a feature of the build, and it was left out.",
        &["Build with the feature, or choose `--collective tcp`."],
    ),
    code(
        Code::RankDevice,
        "which GPU is this rank's?",
        "Several GPUs are visible and the launcher did not say which rank of the machine this is, or there are more ranks \
         than GPUs. Two ranks on one GPU would share its memory unseen.",
        &[
            "Give `--device cuda:N` for each rank, or set `LOCAL_RANK`.",
            "Start as many ranks a machine as it has GPUs.",
        ],
    ),
];
