"""Writes tests/golden/import/: one small data set in every way that .h5ad files store one, and what packing it must give.

    python scripts/golden/make_import_fixtures.py

Files are gzipped whole (HDF5 pads a lot); the tests unpack them. `expected.json` holds the tokens by Geneformer's ranking (numpy,
float64, stable ties in column order), totals, cell names and obs values; `V.tsv` is the vocabulary. Pickles and JSON of the same
dictionary are there for `vocab convert`. Needs numpy, scipy, pandas, h5py, anndata; nothing of this project.
"""

import gzip
import json
import pathlib
import pickle
import shutil
import tempfile
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

warnings.filterwarnings("ignore")
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/import"
rng = np.random.default_rng(7)

CELLS, GENES = 29, 23
counts = rng.negative_binomial(1, 0.25, size=(CELLS, GENES)) * (rng.random((CELLS, GENES)) < 0.5)
counts[5] = 0  # an empty cell
counts[11] = 0
counts[11, 4] = 3  # a cell whose only gene lies outside the vocabulary
counts[:, 4] += rng.integers(0, 3, CELLS) * (np.arange(CELLS) != 5)
counts[0, 0] = 40_000  # beyond int16
ensembl = [f"ENSG{100 + 7 * g:011d}" for g in range(GENES)]
ensembl[9] = ensembl[2]  # a duplicate: columns 2 and 9 are summed
written = [e + (f".{g}" if g % 3 == 0 else "") for g, e in enumerate(ensembl)]
written[6] = written[6].lower()
symbols = [f"SYM{g}" for g in range(GENES)]
unknown = {4, 13}
names = [f"cell-{i:02d}" for i in range(CELLS)]
label = [["T cell", "B cell", "NK", None][i % 4] for i in range(CELLS)]
batch = [["d1", "d2"][i % 2] for i in range(CELLS)]
score = rng.normal(size=CELLS)
score[3] = np.nan
plain = [f"text {i % 3}" for i in range(CELLS)]
flag = np.arange(CELLS) % 3 == 0

known = sorted({e for g, e in enumerate(ensembl) if g not in unknown})
medians = {e: float(m) for e, m in zip(known, np.round(rng.uniform(0.2, 4.0, len(known)), 3))}
for e in known[:4]:
    medians[e] = 1.0  # equal medians make ties
tokens = ["<pad>", "<mask>", *known]
token_id = {t: i for i, t in enumerate(tokens)}


def ranked(row):
    n = row.sum()
    place, total = {}, {}
    for g, x in enumerate(row):
        t = token_id.get(ensembl[g]) if g not in unknown else None
        if t is not None and x > 0:
            place.setdefault(t, g)
            total[t] = total.get(t, 0.0) + float(x)
    ids = np.array(sorted(place, key=place.get), dtype=int)
    if not len(ids):
        return [], []
    v = np.array([total[t] for t in ids]) / float(n) * 10000 / np.array([medians[tokens[t]] for t in ids])
    order = np.argsort(-v, kind="stable")
    value = np.log1p(np.array([total[t] for t in ids]) / float(n) * 10000).astype(np.float16)
    return ids[order].tolist(), value[order].astype(float).tolist()


obs = pd.DataFrame(
    {"label": pd.Categorical(label, categories=["T cell", "B cell", "NK", "unused"]), "batch": pd.Categorical(batch), "score": score, "plain": plain, "flag": flag},
    index=names,
)
var = pd.DataFrame({"symbol": symbols}, index=written)


def base(x):
    return anndata.AnnData(X=x, obs=obs.copy(), var=var.copy())


def save(name, write):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "f.h5ad"
        write(path)
        with open(path, "rb") as source, gzip.GzipFile(OUT / f"{name}.gz", "wb", 9, mtime=0) as target:
            shutil.copyfileobj(source, target)


def strings(group, name, values, fixed=False):
    if fixed:
        group.create_dataset(name, data=np.array([v.encode() for v in values]))
    else:
        group.create_dataset(name, data=values, dtype=h5py.string_dtype())
        group[name].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def frames(f, obs_fixed=False):
    """obs and var by hand, as small as they can be."""
    for slot, index, columns in (("obs", names, {"label": label, "batch": batch}), ("var", written, {"symbol": symbols})):
        g = f.create_group(slot)
        g.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        g.attrs.create("column-order", list(columns), dtype=h5py.string_dtype())
        strings(g, "_index", index, obs_fixed)
        for name, values in columns.items():
            if slot == "var":
                strings(g, name, values, obs_fixed)
                continue
            c = g.create_group(name)
            c.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            kinds = sorted({v for v in values if v})
            strings(c, "categories", kinds, obs_fixed)
            c.create_dataset("codes", data=np.array([kinds.index(v) if v else -1 for v in values], dtype="int16"))


def sparse(f, path, m, kind="csr", data="float32", index="int32", **storage):
    g = f.create_group(path)
    g.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0"})
    g.attrs["shape"] = np.array(m.shape)
    g.create_dataset("data", data=m.data.astype(data), **storage)
    g.create_dataset("indices", data=m.indices.astype(index), **storage)
    g.create_dataset("indptr", data=m.indptr.astype(index))


def by_hand(write, **options):
    def run(path):
        with h5py.File(path, "w", **options) as f:
            f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            write(f)

    return run


def legacy_compound(path):
    """anndata 0.6: obs and var as arrays of records, category names in uns, sparse format in h5sparse attributes."""
    text = h5py.string_dtype()
    kinds = {"label": ["B cell", "NK", "T cell"], "batch": ["d1", "d2"]}
    with h5py.File(path, "w") as f:
        m = sp.csr_matrix(counts)
        g = f.create_group("X")
        g.attrs["h5sparse_format"] = "csr"
        g.attrs["h5sparse_shape"] = np.array(m.shape)
        for part in ("data", "indices", "indptr"):
            g.create_dataset(part, data=getattr(m, part).astype("float32" if part == "data" else "int32"), chunks=True)
        code = lambda values, names: np.array([names.index(v) if v else -1 for v in values], dtype="int8")
        dtype = [("index", text), ("label", "i1"), ("batch", "i1"), ("score", "<f8"), ("plain", "S8")]
        rows = np.empty(CELLS, dtype=dtype)
        rows["index"], rows["label"], rows["batch"], rows["score"], rows["plain"] = names, code(label, kinds["label"]), code(batch, kinds["batch"]), score, [p.encode() for p in plain]
        f.create_dataset("obs", data=rows, dtype=dtype)
        rows = np.empty(GENES, dtype=[("index", text), ("symbol", text)])
        rows["index"], rows["symbol"] = written, symbols
        f.create_dataset("var", data=rows, dtype=rows.dtype)
        for name, values in kinds.items():
            f.create_dataset(f"uns/{name}_categories", data=values, dtype=text)


def legacy_categories(path):
    """anndata 0.7: columns as arrays, category names in obs/__categories, no encodings on arrays."""
    with h5py.File(path, "w") as f:
        sparse(f, "X", sp.csr_matrix(counts))
        for slot, index in (("obs", names), ("var", written)):
            g = f.create_group(slot)
            g.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "index"})
            g.create_dataset("index", data=index, dtype=h5py.string_dtype())
        f["obs"].attrs.create("column-order", ["label", "batch", "score", "plain"], dtype=h5py.string_dtype())
        f["var"].attrs.create("column-order", ["symbol"], dtype=h5py.string_dtype())
        for name, values in (("label", label), ("batch", batch)):
            kinds = sorted({v for v in values if v})
            f.create_dataset(f"obs/__categories/{name}", data=kinds, dtype=h5py.string_dtype())
            d = f.create_dataset(f"obs/{name}", data=np.array([kinds.index(v) if v else -1 for v in values], dtype="int8"))
            d.attrs["categories"] = f[f"obs/__categories/{name}"].ref
        f.create_dataset("obs/score", data=score)
        f.create_dataset("obs/plain", data=plain, dtype=h5py.string_dtype())
        f.create_dataset("var/symbol", data=symbols, dtype=h5py.string_dtype())


def unsorted(f):
    """Rows with columns in any order and entries that come in two parts."""
    m = sp.csr_matrix(counts)
    data, indices, indptr = [], [], [0]
    for r in range(CELLS):
        c, x = m.indices[m.indptr[r] : m.indptr[r + 1]], m.data[m.indptr[r] : m.indptr[r + 1]]
        order = rng.permutation(len(c))
        c, x = list(c[order]), list(x[order])
        if len(c) > 1 and len(c) < GENES and x[0] > 1:
            c.append(c[0])
            x.append(x[0] - 1)
            x[0] = 1
        data += x
        indices += c
        indptr.append(len(data))
    parts = sp.csr_matrix((np.array(data), np.array(indices), np.array(indptr)), shape=counts.shape)
    sparse(f, "X", parts)
    frames(f)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    csr, csc = sp.csr_matrix(counts), sp.csc_matrix(counts)
    # Written by anndata itself.
    save("csr_float32_gzip.h5ad", lambda p: base(csr.astype("float32")).write_h5ad(p, compression="gzip"))
    save("csr_int64_lzf.h5ad", lambda p: base(csr.astype("int64")).write_h5ad(p, compression="lzf"))
    save("csc_int32.h5ad", lambda p: base(csc.astype("int32")).write_h5ad(p))
    save("dense_float64.h5ad", lambda p: base(counts.astype("float64")).write_h5ad(p))
    save("dense_uint16_gzip.h5ad", lambda p: base(counts.astype("uint16")).write_h5ad(p, compression="gzip"))

    def with_raw(p):
        a = base(csr.astype("float32"))
        a.raw = a
        a = a[:, :7].copy()
        a.X = a.X * 0.37
        a.write_h5ad(p)

    def with_layer(p):
        a = base(csr.astype("float32") * 0.5)
        a.layers["counts"] = csr.astype("float32")
        a.layers["scaled"] = -counts.astype("float32")
        a.write_h5ad(p)

    save("raw.h5ad", with_raw)
    save("layer.h5ad", with_layer)

    def nullable(p):
        a = base(csr.astype("float32"))
        a.obs["whole"] = pd.array([None if i % 5 == 0 else i for i in range(CELLS)], dtype="Int64")
        a.obs["truth"] = pd.array([None if i % 7 == 0 else i % 2 == 0 for i in range(CELLS)], dtype="boolean")
        a.obs["year"] = pd.Categorical([2019 + i % 2 for i in range(CELLS)])
        a.obs["name"] = [f"very own name {i}" for i in range(CELLS)]
        a.write_h5ad(p)

    save("nullable.h5ad", nullable)
    # By hand: storage that anndata does not choose by itself.
    save("csr_int16_small_chunks_shuffle.h5ad", by_hand(lambda f: (sparse(f, "X", csr, data="int32", index="int64", chunks=(7,), compression="gzip", shuffle=True), frames(f))))
    save("csc_uint32_small_chunks.h5ad", by_hand(lambda f: (sparse(f, "X", csc, "csc", data="uint32", index="uint32", chunks=(5,), compression="lzf"), frames(f))))
    save("csr_big_endian.h5ad", by_hand(lambda f: (sparse(f, "X", csr, data=">f4", index=">i4"), frames(f))))
    save("csr_v110_fixed_strings.h5ad", by_hand(lambda f: (sparse(f, "X", csr, data="float64", chunks=(11,), fletcher32=True), frames(f, obs_fixed=True)), libver=("v110", "v110")))
    save("csr_unsorted.h5ad", by_hand(unsorted))
    save("dense_column_chunks.h5ad", by_hand(lambda f: (f.create_dataset("X", data=counts.astype("int64"), chunks=(CELLS, 2), compression="gzip"), frames(f))))
    save("legacy_compound.h5ad", legacy_compound)
    save("legacy_categories.h5ad", legacy_categories)

    cells = [ranked(row) for row in counts]
    normalised = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 10000
    built = {}
    for e in sorted(set(ensembl)):
        v = normalised[:, [g for g in range(GENES) if ensembl[g] == e]].sum(1)
        if (v > 0).any():
            built[e] = float(np.median(v[v > 0]))
    expected = {
        "ids": names,
        "tokens": [c[0] for c in cells],
        "values": [c[1] for c in cells],
        "total": [int(n) for n in counts.sum(1)],
        "obs": {"label": label, "batch": batch, "score": [None if np.isnan(v) else repr(v) for v in score.tolist()], "plain": plain, "flag": [str(v) for v in flag]},
        "built_medians": built,
    }
    (OUT / "expected.json").write_text(json.dumps(expected) + "\n")
    rows = "".join(f"{t}\t{i}\t{medians.get(t, 0)!r}\n" for i, t in enumerate(tokens))
    (OUT / "V.tsv").write_text("# cellrefine-vocabulary 1\ntoken\tid\tmedian\n" + rows)
    # The dictionaries as Geneformer ships them: V1's ids are numpy int16 scalars.
    as_numpy = {t: np.int16(i) for t, i in token_id.items()}
    for protocol in (0, 2, 4):
        if protocol:
            (OUT / f"tokens_p{protocol}.pkl").write_bytes(pickle.dumps(as_numpy, protocol=protocol))
        (OUT / f"medians_p{protocol}.pkl").write_bytes(pickle.dumps({e: (np.float64(m) if protocol else m) for e, m in medians.items()}, protocol=protocol))
    (OUT / "symbols_p4.pkl").write_bytes(pickle.dumps({f"SYM{g}": e for g, e in enumerate(ensembl) if g != 9}, protocol=4))
    (OUT / "tokens.json").write_text(json.dumps(token_id))
    (OUT / "medians.json").write_text(json.dumps(medians))
    rank_cells()


def rank_cells():
    """Cells of the size of real ones: little-endian u32 genes, cells; f64 medians; per cell u16 counts, u32 tokens, u16 order."""
    genes, cells = 6000, 5
    medians = np.exp(rng.normal(0.7, 0.8, genes))
    medians[rng.integers(0, genes, 300)] = 2.0  # equal medians: exact ties
    rate = np.exp(rng.normal(-1.5, 1.6, genes))
    out = [np.array([genes, cells], "<u4").tobytes(), medians.astype("<f8").tobytes()]
    for cell in range(cells):
        x = rng.poisson(rate * [0.1, 0.5, 1, 2, 5][cell]).astype("<u2")
        column = np.flatnonzero(x)
        v = x[column].astype(np.float64) / float(x.sum()) * 10000 / medians[column]
        order = column[np.argsort(-v, kind="stable")].astype("<u2")
        assert len(np.unique(v)) < len(v)
        out += [x.tobytes(), np.array([len(order)], "<u4").tobytes(), order.tobytes()]
    with gzip.GzipFile(OUT / "rank_cells.bin.gz", "wb", 9, mtime=0) as target:
        target.write(b"".join(out))


if __name__ == "__main__":
    main()
