"""Reads what `cellrefine embed` wrote with the programs that people read it with, and compares.

    python scripts/golden/check_embed_out.py ROWS.npy ROWS.parquet COPY.h5ad SOURCE.h5ad

anndata and scanpy read the copy, pandas, pyarrow and polars (where installed) the Parquet file, h5py walks source and copy and
compares every object: type, shape, storage, bytes, attributes. Exits with an AssertionError at the first difference.
"""
import pathlib
import sys

import anndata
import h5py
import numpy as np

npy, parquet, copy, source = sys.argv[1:5]
rows = np.load(npy)
ids = pathlib.Path(npy).with_suffix(".ids.txt").read_text().splitlines()
assert rows.dtype == np.float32 and len(ids) == len(rows)
by_name = dict(zip(ids, rows))

# Parquet
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

table = pq.read_table(parquet)
assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32(), nullable=False), rows.shape[1])
flat = table["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.shape)
assert flat.tobytes() == rows.tobytes() and table["cell_id"].to_pylist() == ids
origin = {k.decode(): v.decode() for k, v in table.schema.metadata.items() if k.startswith(b"cellrefine.")}
assert origin["cellrefine.program"].startswith("cellrefine ") and len(origin["cellrefine.checkpoint_sha256"]) == 64
frame = pd.read_parquet(parquet).set_index("cell_id")
assert np.array_equal(np.stack(frame["embedding"]), rows)
try:
    import polars
    assert np.array_equal(polars.read_parquet(parquet)["embedding"].to_numpy(), rows)
except ImportError:
    print("polars is not installed: skipped")

# The .h5ad as AnnData
a = anndata.read_h5ad(copy)
x = a.obsm["X_cellrefine"]
assert x.dtype == np.float32 and x.shape == (a.n_obs, rows.shape[1])
absent = 0
for name, row in zip(a.obs_names, x):
    wanted = by_name.get(name)
    absent += wanted is None
    assert np.isnan(row).all() if wanted is None else np.array_equal(row, wanted), name
assert int(a.uns["cellrefine"]["cells_absent"]) == absent
assert a.uns["cellrefine"]["checkpoint_sha256"] == origin["cellrefine.checkpoint_sha256"]
labelled = a.uns["cellrefine"]["labels"].startswith("evidence ")
assert "stale" not in a.uns["cellrefine"]
if labelled:
    present = ~np.isnan(x[:, 0])
    label, score = a.obs["cellrefine_label"], a.obs["cellrefine_score"]
    assert label.dtype == "category" and not label.cat.ordered and score.dtype == np.float32
    assert (label.notna() == present).all() and (score.notna() == present).all()
    assert score[present].between(0, 1).all()

# Everything else, object by object
ours = {"obsm/X_cellrefine", "uns/cellrefine", *(["obs/cellrefine_label", "obs/cellrefine_score"] if labelled else [])}


def same(path, old, new):
    assert type(old) is type(new), path
    for name, value in old.attrs.items():
        if (path, name) == ("obs", "column-order"):
            assert [c for c in new.attrs[name] if not c.startswith("cellrefine_")] \
                == [c for c in value if not c.startswith("cellrefine_")]
        else:
            assert np.array_equal(value, new.attrs[name]), (path, name)
    assert set(old.attrs) == set(new.attrs), path
    if isinstance(old, h5py.Dataset):
        for what in ("dtype", "shape", "chunks", "compression", "compression_opts", "shuffle", "maxshape"):
            assert getattr(old, what) == getattr(new, what), (path, what)
        x, y = old[()], new[()]
        assert np.array_equal(x, y) if old.dtype.kind == "O" else np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def walk(path, old, new):
    global objects
    for name in old:
        at = f"{path}/{name}".lstrip("/")
        if at in ours:
            continue
        links = [g.get(name, getlink=True) for g in (old, new)]
        assert type(links[0]) is type(links[1]), at
        same(at, old[name], new[name])
        objects += 1
        if isinstance(old[name], h5py.Group):
            walk(at, old[name], new[name])


objects = 0
with h5py.File(source) as old, h5py.File(copy) as new:
    walk("", old, new)
    extra = {f"{g}/{n}" for g in ("obs", "obsm", "uns") if g in new for n in new[g] if g not in old or n not in old[g]}
    assert extra <= ours, extra
print(f"ok: {len(rows)} rows, {absent} absent, labels {'checked' if labelled else 'none'}, {objects} other objects unchanged")
