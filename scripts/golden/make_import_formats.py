"""Writes tests/golden/formats/: the cells of tests/golden/import in the forms that 10x Genomics and Hugging Face give them.

    python scripts/golden/make_import_formats.py

The counts are those of csr_float32_gzip.h5ad, so tests/golden/import/expected.json says what packing any of these must give. The
10x HDF5 files follow Cell Ranger's layout (gzip, fixed strings) and are read back with scanpy.read_10x_h5, the MTX folders with
scanpy.read_10x_mtx or scipy.io.mmread; both must hold the counts. The tokenised data sets are written by `datasets` itself
(save_to_disk): one as it writes them today (`List`), one with the `Sequence` header of its versions before 4, one with int32
tokens in three files, one with large lists. Needs anndata, scanpy, h5py, scipy, datasets; nothing of this project.
"""

import gzip
import json
import pathlib
import shutil
import tempfile
import warnings

import anndata
import datasets
import h5py
import numpy as np
import scanpy
import scipy.io
import scipy.sparse as sp

warnings.filterwarnings("ignore")
GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests/golden"
OUT = GOLDEN / "formats"
shutil.rmtree(OUT, ignore_errors=True)
OUT.mkdir()

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "f.h5ad"
    path.write_bytes(gzip.decompress((GOLDEN / "import/csr_float32_gzip.h5ad.gz").read_bytes()))
    data = anndata.read_h5ad(path)
expected = json.loads((GOLDEN / "import/expected.json").read_text())
counts = sp.csc_matrix(data.X.astype("int32")).T.tocsc()  # genes × cells, by cells: Cell Ranger's storage
counts.sort_indices()
ids, symbols, barcodes = list(data.var_names), list(data.var["symbol"]), list(data.obs_names)
genes, cells = counts.shape

# Version 3 with two antibodies among the genes: their counts are no part of any total.
extra = sp.csc_matrix(np.arange(1, 2 * cells + 1).reshape(2, cells) % 7, dtype="int32")
order = np.r_[genes, np.arange(genes), genes + 1]
mixed = sp.vstack([counts, extra]).tocsr()[order].tocsc()
mixed.sort_indices()
all_ids = [(ids + ["AB1", "AB2"])[i] for i in order]
all_symbols = [(symbols + ["antibody 1", "antibody 2"])[i] for i in order]
types = [("Gene Expression" if i < genes else "Antibody Capture") for i in order]


def texts(group, name, values):
    group.create_dataset(name, data=np.array([v.encode() for v in values]), compression="gzip")


def matrix(group, m):
    for name, values in (("data", m.data.astype("int32")), ("indices", m.indices.astype("int64")), ("indptr", m.indptr.astype("int64"))):
        group.create_dataset(name, data=values, compression="gzip", shuffle=True)
    group.create_dataset("shape", data=np.array(m.shape, dtype="int32"))
    texts(group, "barcodes", barcodes)


def save(name, write):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{name}.h5"
        with h5py.File(path, "w") as f:
            write(f)
        (OUT / f"{name}.h5.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        if name == "v2_two_genomes":
            return
        read = scanpy.read_10x_h5(path)
        assert (read.X.toarray() == counts.T.toarray()).all() and list(read.obs_names) == barcodes, name
        assert list(read.var["gene_ids"]) == ids and list(read.var_names) == symbols, name


def version3(f):
    f.attrs["filetype"] = "matrix"
    g = f.create_group("matrix")
    matrix(g, mixed)
    features = g.create_group("features")
    texts(features, "_all_tag_keys", ["genome"])
    texts(features, "id", all_ids)
    texts(features, "name", all_symbols)
    texts(features, "feature_type", types)
    texts(features, "genome", ["GRCh38" if t == "Gene Expression" else "" for t in types])


def genome(f, name, m, gene_ids):
    g = f.create_group(name)
    matrix(g, m)
    texts(g, "genes", gene_ids)
    texts(g, "gene_names", symbols)


def two_genomes(f):
    genome(f, "GRCh38", counts, ids)
    genome(f, "mm10", counts, [i.upper().replace("ENSG", "ENSMUSG") for i in ids])


save("v3", version3)
save("v2", lambda f: genome(f, "GRCh38", counts, ids))
save("v2_two_genomes", two_genomes)


def mtx(name, m, features, feature_name, packed, prefix="", order=None, real=False, turned=False):
    folder = OUT / name
    folder.mkdir()
    m = m.tocoo()
    rows, columns, values = m.row, m.col, m.data
    by_cell = np.lexsort((rows, columns)) if order is None else order(rows, columns)
    field = "real" if real else "integer"
    shape = m.shape[::-1] if turned else m.shape
    lines = [f"%%MatrixMarket matrix coordinate {field} general", '%metadata_json: {"format_version": 2}', f"{shape[0]} {shape[1]} {m.nnz}"]
    for i in by_cell:
        r, c = rows[i] + 1, columns[i] + 1
        value = f"{values[i]:.6e}" if real else str(values[i])
        lines.append(f"{c} {r} {value}" if turned else f"{r} {c} {value}")
    files = {"matrix.mtx": "\n".join(lines) + "\n", "barcodes.tsv": "\n".join(barcodes) + "\n", feature_name: "".join(features)}
    for file, text in files.items():
        path = folder / f"{prefix}{file}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0) if packed else text.encode())
    if packed:
        read = scanpy.read_10x_mtx(folder, var_names="gene_ids", prefix=prefix or None)
        assert (read.X.toarray() == counts.T.toarray()).all() and list(read.obs_names) == barcodes, name
        assert list(read.var_names) == ids, name
    else:
        read = scipy.io.mmread(folder / f"{prefix}matrix.mtx").toarray()
        assert ((read.T if turned else read) == m.toarray()).all(), name


v2_lines = [f"{i}\t{s}\n" for i, s in zip(ids, symbols)]
v3_lines = [f"{i}\t{s}\t{t}\n" for i, s, t in zip(all_ids, all_symbols, types)]
mtx("mtx_v3", mixed, v3_lines, "features.tsv", True, prefix="GSM42_")
mtx("mtx_v2", counts, v2_lines, "genes.tsv", False, real=True)
mtx("mtx_by_gene", counts, v2_lines, "genes.tsv", False, order=lambda r, c: np.lexsort((c, r)))
mtx("mtx_turned", counts, v2_lines, "genes.tsv", False, turned=True)

# Tokenised data sets: what Geneformer's tokenizer keeps of the same cells.
kept = [i for i in range(cells) if expected["tokens"][i]]
obs = data.obs.iloc[kept]
table = {
    "input_ids": [expected["tokens"][i] for i in kept],
    "length": [len(expected["tokens"][i]) for i in kept],
    "label": [v if isinstance(v, str) else None for v in obs["label"]],
    "batch": list(obs["batch"]),
    "score": [None if np.isnan(v) else float(v) for v in obs["score"]],
    "plain": list(obs["plain"]),
    "flag": [bool(v) for v in obs["flag"]],
    "cell_id": list(obs.index),
    "total_count": [float(expected["total"][i]) for i in kept],
}


def features(tokens):
    value = datasets.Value
    return datasets.Features(
        {"input_ids": tokens, "length": value("int64"), "label": value("string"), "batch": datasets.ClassLabel(names=["d1", "d2"]),
         "score": value("float64"), "plain": value("string"), "flag": value("bool"), "cell_id": value("string"), "total_count": value("float32")}
    )


def dataset(name, tokens, shards=1):
    datasets.Dataset.from_dict(table, features=features(tokens)).save_to_disk(str(OUT / name), num_shards=shards)
    state = json.loads((OUT / name / "state.json").read_text())
    state["_fingerprint"] = "0123456789abcdef"  # the same in every run
    (OUT / name / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    assert datasets.load_from_disk(str(OUT / name))["input_ids"][:] == table["input_ids"]


dataset("list.dataset", datasets.List(datasets.Value("int64")))
dataset("int32_three_files.dataset", datasets.List(datasets.Value("int32")), 3)
dataset("large_list.dataset", datasets.LargeList(datasets.Value("int64")))
dataset("sequence.dataset", datasets.List(datasets.Value("int64")))
path = OUT / "sequence.dataset/dataset_info.json"
info = json.loads(path.read_text())
assert info["features"]["input_ids"]["_type"] == "List"
info["features"]["input_ids"]["_type"] = "Sequence"
path.write_text(json.dumps(info, indent=2, sort_keys=True))
assert datasets.load_from_disk(str(path.parent))["input_ids"][:] == table["input_ids"]
print("datasets", datasets.__version__, "scanpy", scanpy.__version__, sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")
