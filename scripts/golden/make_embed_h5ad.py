"""An .h5ad that holds one of everything that an embedding must leave alone: tests/golden/embed/everything.h5ad.

    python scripts/golden/make_embed_h5ad.py        (anndata 0.12, h5py, scipy, pandas)

Twelve of the bundled cells in another order, and two cells that no corpus has. Matrices as CSR, CSC and dense, gzip and lzf;
categorical, nullable, boolean and text columns; nested uns with empty parts; graphs; raw; old columns of this program's own.
"""
import pathlib

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

root = pathlib.Path(__file__).resolve().parents[2]
source = anndata.read_h5ad(root / "data/pbmc700/pbmc700.h5ad")
rng = np.random.default_rng(0)
a = source[rng.permutation(700)[:12], :40].copy()
names = a.obs_names.to_numpy().astype(object)
names[[3, 9]] = ["no such cell", "nor this, of Krähwinkel"]
a.obs_names = names
a.obs["flag"] = rng.random(12) < 0.5
a.obs["count"] = pd.array([None, *range(11)], dtype="Int64")
a.obs["note"] = [f"note {i} ü" for i in range(12)]
a.obs["cellrefine_score"] = np.arange(12.0)  # of an earlier run: replaced
a.obs["cellrefine_label"] = pd.Categorical(["old"] * 12)
a.raw = a.copy()
a.layers["by_column"] = sp.csc_matrix(a.X)
a.layers["dense"] = a.X.toarray()
a.X = sp.csr_matrix(a.X)
a.obsm["X_pca"] = rng.normal(size=(12, 5))
a.obsm["frame"] = pd.DataFrame({"x": np.arange(12)}, index=a.obs_names)
a.varm["loadings"] = rng.normal(size=(40, 5)).astype("f4")
a.obsp["connectivities"] = sp.random(12, 12, 0.2, "csr", random_state=0)
a.uns = {"text": "grüße", "number": 7, "array": np.arange(3), "empty": {}, "deep": {"er": {"still": [1.5, 2.5]}},
         "names": np.array(["a", "bc", ""], dtype=object), "cellrefine": {"program": "an older one", "stale": 1}}
out = root / "tests/golden/embed/everything.h5ad"
a.write_h5ad(out, compression="gzip")
with h5py.File(out, "r+") as f:  # what anndata's own options do not reach
    f.create_dataset("layers/lzf", data=f["layers/dense"][:], chunks=(4, 40), compression="lzf", shuffle=True)
    f["layers/lzf"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    f["uns/foreign"] = np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])
    f["uns"].attrs["an attribute of somebody's"] = "kept"
anndata.read_h5ad(out)
print(out, out.stat().st_size, "bytes")
