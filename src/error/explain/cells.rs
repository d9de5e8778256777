//! Cells to pack: .h5ad, 10x .h5 and MTX, tokenised data sets.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::InputUnknown,
        "no input that can be packed",
        "`pack` takes .h5ad, 10x .h5, a folder with a 10x matrix.mtx, and a tokenised .dataset folder; this is none of them.",
        &["docs/formats.md says what makes each; zarr stores can be written as .h5ad with anndata."],
    ),
    code(
        Code::Hdf5Damaged,
        "the HDF5 data cannot be read",
        "The file does not begin as HDF5, or one of its structures contradicts itself. What it holds beyond that place is \
         unknown.",
        &[
            "`python -c \"import anndata; anndata.read_h5ad('FILE')\"` tells whether others can read it.",
            "Copy or download it again; if it opens there, write it again with `write_h5ad`.",
        ],
    ),
    code(
        Code::Hdf5Cut,
        "the HDF5 file is cut short",
        "The header says a longer file than there is: a download or copy that was broken off, or a writer that is still at it.",
        &["Compare the size with the source, and copy it again."],
    ),
    code(
        Code::Hdf5Filter,
        "compressed with a filter that is not supported",
        "gzip, lzf, shuffle, Fletcher's checksum and no compression are read; blosc, zstd and other plug-ins are not.",
        &["Write the file again: `anndata.read_h5ad('FILE').write_h5ad('NEW', compression='gzip')`."],
    ),
    code(
        Code::Hdf5Claims,
        "an array claims more data than the file can hold",
        "A size in the file is impossible for its length, even fully compressed. It is refused before memory is taken.",
        &["The file is damaged, or made to exhaust memory: do not use it."],
    ),
    code(
        Code::MatrixMissing,
        "there is no matrix in this slot",
        "Counts are looked for in `X`, `raw` and `layers/NAME`; the slot is absent or holds something that AnnData would not \
         write.",
        &[
            "The message lists the slots that are there; choose one with `--counts raw` or `--counts layers/counts`.",
        ],
    ),
    code(
        Code::SparseOffsets,
        "the row offsets of a sparse matrix are wrong",
        "`indptr` falls, is negative, or does not end at the number of stored values, so that cells would get each other's \
         genes.",
        &["Write the file again with anndata from its source; the message names the first bad row."],
    ),
    code(
        Code::SparseIndices,
        "an index of a sparse matrix lies outside it",
        "A stored value names a row or column that the matrix does not have.",
        &["Write the file again from its source: `X.indices.max()` must be below the number of columns."],
    ),
    code(
        Code::SparseParts,
        "the arrays of a sparse matrix do not fit together",
        "One of `data`, `indices` and `indptr` is missing, has the wrong type or dimension, or differs in length.",
        &["Write the file again with anndata from its source."],
    ),
    code(
        Code::MatrixShape,
        "the matrix has no usable shape",
        "It has not two dimensions, no shape attribute, or more rows or columns than can be numbered.",
        &["Cells must be rows and genes columns; split matrices with more than 4,294,967,295 rows."],
    ),
    code(
        Code::NotRawCounts,
        "these are not raw counts",
        "Ranks are taken from integer counts. Values with fractions are normalised, scaled or corrected, and their order \
         over genes is another one.",
        &[
            "Raw counts are often kept beside: `--counts raw`, `--counts layers/counts`.",
            "`--allow-non-integer` ranks the values as they are, for corrected counts such as SoupX's.",
        ],
    ),
    code(
        Code::ValueNoCount,
        "a value cannot be a count",
        "A stored value is negative, NaN or infinite.",
        &["Look at the source: z-scored matrices have negative values. Choose another slot with `--counts`."],
    ),
    code(
        Code::FrameForm,
        "obs or var is no data frame",
        "The table of cells or genes lacks its index or has another form than anndata writes, old or new.",
        &["Open the file with a current anndata and write it again."],
    ),
    code(
        Code::ColumnMissing,
        "there is no such column",
        "A column named by a flag is not in the table of cells or genes.",
        &["The message lists the columns that there are; names are case-sensitive."],
    ),
    code(
        Code::ColumnUnusable,
        "a column has a form that cannot be packed",
        "Columns of strings, categories, booleans and numbers are packed. This one holds something else, or is of another \
         kind than in an earlier input.",
        &["Convert it: `adata.obs['c'] = adata.obs['c'].astype(str)`.", "Leave it out of `--obs`."],
    ),
    code(
        Code::ColumnDamaged,
        "a column does not fit its own description",
        "A category code is beyond the categories, or the column is shorter than the table.",
        &["Write the file again from its source; the message names the first bad row."],
    ),
    code(
        Code::NamesUnusable,
        "the names of cells or genes cannot be used",
        "An index holds something else than strings.",
        &["`adata.obs_names = adata.obs_names.astype(str)`, the same for `var_names`, and write again."],
    ),
    code(
        Code::GeneNamesMissing,
        "there is no column of gene names",
        "No column of the gene table looks like Ensembl ids or symbols of the vocabulary.",
        &["Name it: `--genes COLUMN`."],
    ),
    code(
        Code::MtxFolder,
        "the folder does not hold one 10x matrix",
        "A `matrix.mtx`, its features or genes and its barcodes are wanted, each plain or gzip, under one prefix.",
        &["The message lists the names that were tried; keep one matrix a folder."],
    ),
    code(
        Code::MtxForm,
        "the MatrixMarket file is damaged",
        "Its header, an entry or the number of entries is not what the format says.",
        &["The message names the line; download the file again."],
    ),
    code(
        Code::MtxNames,
        "the names do not fit the matrix",
        "Barcodes or features are more or fewer than the matrix has, or their table is empty or ragged.",
        &[
            "Use the three files of one run of Cell Ranger; filtered and raw matrices have different barcodes.",
        ],
    ),
    code(
        Code::TenxFeatures,
        "the 10x file has no genes of this kind",
        "It holds no gene expression, no such genome, or several genomes and no choice.",
        &["The message lists what there is: `--genome GRCh38`."],
    ),
    code(
        Code::ArrowDamaged,
        "the Arrow file is damaged or cut short",
        "A message of the stream has impossible sizes, offsets or types. Sizes are checked against the file before memory is \
         taken.",
        &["Copy the data set again, or save it again with `datasets`: `save_to_disk`."],
    ),
    code(
        Code::DatasetFolder,
        "the data set does not describe itself",
        "`state.json` lists no files, its files have different columns, or there is no column of token ids.",
        &["Save it again with `datasets`: `save_to_disk`; the tokens are the column `input_ids`."],
    ),
    code(
        Code::DatasetTokens,
        "a cell's tokens cannot be used",
        "A token id is beyond the vocabulary, a list is missing or not as long as its length column says, or a cell holds a \
         masked gene.",
        &["Tokenise the cells again with the vocabulary that is given; the message names the row."],
    ),
    code(
        Code::EmptyCell,
        "a cell has no gene of the vocabulary",
        "Such a cell would be an empty sentence. `pack` drops them with a note, unless it is told not to.",
        &["Look at the gene report of `pack`; `--empty-cells skip` leaves such cells out."],
    ),
    code(
        Code::NoCounts,
        "there are no counts to take medians from",
        "Medians come from raw counts of the chosen cells; the inputs hold tokens alone, none of these cells, or zeros.",
        &["Give .h5ad or 10x inputs, and check the list of cells."],
    ),
    code(
        Code::CellRefused,
        "a cell cannot be written",
        "Its id holds a line break or a zero byte, or its tokens are not what a corpus stores.",
        &["The message names the cell and what is wrong with it."],
    ),
];
