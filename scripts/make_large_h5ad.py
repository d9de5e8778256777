"""Makes an .h5ad of any size from real cells, to measure packing: the cells of a file again and again, gzip or not.

    python scripts/make_large_h5ad.py IN.h5ad OUT.h5ad --cells 1000000 [--genes-per-cell 2000] [--plain]

Cells whose number of genes is nearest to --genes-per-cell make a block of 3,000; its compressed chunks are written as they are as
often as it takes, so the file is made at the speed of the disk and is, chunk by chunk, what anndata writes with compression="gzip".
"""

import argparse
import zlib

import anndata
import h5py
import numpy as np
import scipy.sparse as sp

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--cells", type=int, default=100_000)
parser.add_argument("--genes-per-cell", type=int, default=2000)
parser.add_argument("--plain", action="store_true", help="no compression")
args = parser.parse_args()

CHUNK, BLOCK = 1 << 16, 3000
source = anndata.read_h5ad(args.source)
x = sp.csr_matrix(source.X)
x.sort_indices()
genes = np.diff(x.indptr)
rows = np.sort(np.argsort(np.abs(genes - args.genes_per_cell), kind="stable")[:BLOCK])
block = x[np.resize(rows, BLOCK)]
# Whole chunks: the last cells of a block lose their counts, up to 40 of them.
entries = block.nnz // CHUNK * CHUNK
indptr = np.minimum(block.indptr, entries)
times = -(-args.cells // BLOCK)
cells = times * BLOCK
arrays = {"data": block.data[:entries].astype("float32"), "indices": block.indices[:entries].astype("int32")}
with h5py.File(args.out, "w") as f:
    f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    g = f.create_group("X")
    g.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    g.attrs["shape"] = np.array([cells, x.shape[1]])
    for name, values in arrays.items():
        options = {} if args.plain else {"compression": "gzip", "compression_opts": 4}
        d = g.create_dataset(name, (entries * times,), values.dtype, chunks=(CHUNK,), **options)
        chunks = [values[i : i + CHUNK].tobytes() for i in range(0, entries, CHUNK)]
        if not args.plain:
            chunks = [zlib.compress(c, 4) for c in chunks]
        for t in range(times):
            for n, chunk in enumerate(chunks):
                d.id.write_direct_chunk((t * entries + n * CHUNK,), chunk)
    start = (np.arange(times)[:, None] * entries + indptr[:-1]).ravel()
    g.create_dataset("indptr", data=np.r_[start, entries * times].astype("int64"))
    names = np.char.mod("cell-%d", np.arange(cells)).astype("S")
    kind = np.resize(np.arange(12, dtype="int8"), cells)
    text = h5py.string_dtype()
    for slot, index, size in (("obs", names, cells), ("var", [str(v).encode() for v in source.var_names], x.shape[1])):
        g = f.create_group(slot)
        g.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        column = "cell_type" if slot == "obs" else "ensembl_id"
        g.attrs.create("column-order", [column], dtype=text)
        g.create_dataset("_index", data=index, dtype=text if slot == "var" else None)
        if slot == "obs":
            c = g.create_group("cell_type")
            c.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            c.create_dataset("categories", data=[f"type {i}" for i in range(12)], dtype=text)
            c.create_dataset("codes", data=kind)
        else:
            g.create_dataset("ensembl_id", data=[str(v) for v in source.var.get("ensembl_id", source.var_names)], dtype=text)
print(f"{cells} cells, {entries * times / cells:.0f} genes per cell, {x.shape[1]} genes")
