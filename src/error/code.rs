//! The stable codes of errors: `CR` and four digits, of which the first two say the area and fix the exit code.
//!
//! A code names a family of failures that a user meets and mends in one way; it never changes its meaning and is never
//! used again for another. What each means is in the tables beside this file, printed by `cellrefine explain CODE`.

use super::Kind;
use std::fmt;

macro_rules! codes {
    ($($name:ident = $number:literal,)*) => {
        /// What failed, as a stable code. Its number is the one that is printed: [`Code::SparseOffsets`] is `CR0307`.
        #[allow(missing_docs, reason = "each is explained in the tables beside this file, which docs/errors.md prints")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Code {
            $($name = $number,)*
        }

        impl Code {
            /// Every code, by number.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The name in the sources, as in `Code::SparseOffsets`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Code::$name => stringify!($name),)*
                }
            }
        }
    };
}

codes! {
    // 00: faults of the program, exit 1.
    Bug = 1,
    Panicked = 2,
    // 01: flags and settings, exit 2.
    CommandLine = 101,
    FlagConflict = 102,
    FlagValue = 103,
    SettingUnknown = 104,
    SettingValue = 105,
    SettingFixed = 106,
    SettingConflict = 107,
    OutputName = 108,
    OutputExists = 109,
    DeviceUnknown = 110,
    PresetUnknown = 111,
    SplitForm = 112,
    SplitOther = 113,
    LabelsNeeded = 114,
    MarkersNeeded = 115,
    NoInputs = 116,
    InputTwice = 117,
    KernelShape = 118,
    EmulatorVariable = 119,
    BenchCase = 120,
    CodeUnknown = 121,
    SettingsFile = 122,
    RankNumbers = 130,
    RankAddress = 131,
    RankBuild = 132,
    RankDevice = 133,
    // 02: files of any kind, exit 3.
    FileMissing = 201,
    FileForbidden = 202,
    FileKind = 203,
    FileEmpty = 204,
    FileCut = 205,
    FileTooLarge = 206,
    NotText = 207,
    NotJson = 208,
    NotToml = 209,
    GzipDamaged = 210,
    NpyDamaged = 211,
    PickleRefused = 212,
    NameLeadsOut = 213,
    FileChanged = 214,
    // 03: cells to pack, exit 3.
    InputUnknown = 301,
    Hdf5Damaged = 302,
    Hdf5Cut = 303,
    Hdf5Filter = 304,
    Hdf5Claims = 305,
    MatrixMissing = 306,
    SparseOffsets = 307,
    SparseIndices = 308,
    SparseParts = 309,
    MatrixShape = 310,
    NotRawCounts = 311,
    ValueNoCount = 312,
    FrameForm = 313,
    ColumnMissing = 314,
    ColumnUnusable = 315,
    ColumnDamaged = 316,
    NamesUnusable = 317,
    GeneNamesMissing = 318,
    MtxFolder = 319,
    MtxForm = 320,
    MtxNames = 321,
    TenxFeatures = 322,
    ArrowDamaged = 323,
    DatasetFolder = 324,
    DatasetTokens = 325,
    EmptyCell = 326,
    NoCounts = 327,
    CellRefused = 328,
    // 04: genes, vocabularies and marker sets, exit 3.
    VocabularyForm = 401,
    VocabularyDigest = 402,
    VocabularyMismatch = 403,
    VocabularyTokens = 404,
    VocabularyFile = 405,
    GenesNotRecognised = 406,
    GeneUnknown = 407,
    GeneAmbiguous = 408,
    DictionaryForm = 409,
    DictionaryIds = 410,
    DictionaryMedians = 411,
    GeneMap = 412,
    MarkerForm = 413,
    MarkerLimits = 414,
    MarkerSets = 415,
    MarkerGenesUnknown = 416,
    MarkerLabels = 417,
    MarkerMap = 418,
    MarkersNotDerived = 419,
    // 05: corpora, labels and splits, exit 3.
    CorpusMissing = 501,
    CorpusVersion = 502,
    ManifestDamaged = 503,
    ShardHeader = 504,
    ShardOffsets = 505,
    ShardBlock = 506,
    ShardDigest = 507,
    ShardContent = 508,
    TooManyCells = 509,
    NoCells = 510,
    ValuesMissing = 511,
    ObsMissing = 512,
    ObsType = 513,
    ObsValueMissing = 514,
    SplitEmpty = 515,
    SplitClasses = 516,
    SplitRecord = 517,
    SplitMismatch = 518,
    SamplerPosition = 519,
    MergeMismatch = 520,
    MergeTwice = 521,
    PartsIncomplete = 522,
    // 06: checkpoints and models, exit 3.
    CheckpointMissing = 601,
    CheckpointDamaged = 602,
    ModelConfig = 603,
    TensorFile = 604,
    TensorMissing = 605,
    TensorShape = 606,
    WeightsIndex = 607,
    WeightsPickled = 608,
    CheckpointVocabulary = 609,
    CheckpointState = 610,
    ResumeOther = 611,
    NoResume = 612,
    CheckpointLacksPrototypes = 613,
    CheckpointPrototypes = 614,
    CheckpointClassifier = 615,
    CellTooLong = 616,
    // 07: runs, scores and reports, exit 3.
    RunFolder = 701,
    ChartData = 702,
    BenchReport = 703,
    BenchLengths = 704,
    NoLabelledCells = 705,
    TooFewCells = 706,
    EmbeddingNotFinite = 707,
    CellsUnmatched = 708,
    H5adNotExtended = 709,
    NoPrototypeSource = 710,
    EmulatorLibrary = 711,
    // 08: the machine, exit 4.
    OutOfMemory = 801,
    DiskFull = 802,
    FileSystem = 803,
    AnotherWriter = 804,
    NoThread = 805,
    WriteFailed = 806,
    TransposeMemory = 807,
    NoGpuCode = 810,
    NoSuchGpu = 811,
    GpuDriver = 812,
    GpuFailed = 813,
    NoCublas = 814,
    NoEmulator = 815,
    SlowerThanBefore = 816,
    RankConnection = 830,
    RankLate = 831,
    RankLost = 832,
    RanksDiffer = 833,
    // 09: stopped by a signal, exit 5.
    Checkpointed = 901,
    // 10: beyond the finite numbers, exit 6.
    LossNotFinite = 1001,
    EmbeddingOverflow = 1002,
    KernelWrong = 1003,
    TrainingSpike = 1004,
}

impl Code {
    /// The code printed as `text` (`CR0307`, `cr0307`, `0307` or `307`); `None` where there is none.
    pub fn parse(text: &str) -> Option<Code> {
        let digits = text.trim_start_matches(['C', 'c', 'R', 'r']);
        let number: u16 = digits.parse().ok()?;
        Code::ALL.iter().copied().find(|c| c.number() == number)
    }
    /// The digits after `CR`.
    pub fn number(self) -> u16 {
        self as u16
    }
    /// The kind of every error with this code, and with it the exit code.
    pub fn kind(self) -> Kind {
        match self.number() / 100 {
            0 => Kind::Bug,
            1 => Kind::Usage,
            2..=7 => Kind::Input,
            8 => Kind::Environment,
            9 => Kind::Interrupted,
            _ => Kind::Numerical,
        }
    }
    /// What the code's first two digits stand for.
    pub fn area(self) -> &'static str {
        match self.number() / 100 {
            0 => "faults of the program",
            1 => "flags and settings",
            2 => "files of any kind",
            3 => "cells to pack",
            4 => "genes, vocabularies and marker sets",
            5 => "corpora, labels and splits",
            6 => "checkpoints and models",
            7 => "runs, scores and reports",
            8 => "the machine",
            9 => "stopped by a signal",
            _ => "beyond the finite numbers",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CR{:04}", self.number())
    }
}
