"""From an .h5ad to a UMAP and back: scanpy's file in, scanpy's file out, cellrefine between.

    pip install -r examples/requirements.txt
    python examples/scanpy_roundtrip.py [CELLS.h5ad] [--label cell_type] [--binary target/release/cellrefine] [--out FOLDER]

Raw counts are read from X, genes from var. The copy that cellrefine writes is the same AnnData with obsm["X_cellrefine"],
obs["cellrefine_label"], obs["cellrefine_score"] and uns["cellrefine"]: nothing has to be converted or put in order.
The few training steps here are for a demonstration; real runs take a Geneformer checkpoint or many more of them.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import anndata
import numpy as np
import scanpy as sc

root = pathlib.Path(__file__).resolve().parents[1]
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("cells", nargs="?", default=root / "data/pbmc700/pbmc700.h5ad")
p.add_argument("--markers", default=root / "data/pbmc700/markers.gmt", help="one set per cell type")
p.add_argument("--label", default="cell_type")
p.add_argument("--binary", default=root / "target/release/cellrefine")
p.add_argument("--out", help="where to keep everything [a temporary folder]")
a = p.parse_args()
keep = pathlib.Path(a.out or tempfile.mkdtemp(prefix="cellrefine-scanpy-"))
keep.mkdir(parents=True, exist_ok=True)
source, out = pathlib.Path(a.cells), keep / "embedded.h5ad"


def cellrefine(*arguments):
    done = subprocess.run([str(a.binary), *map(str, arguments), "--quiet"], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"cellrefine {arguments[0]} ended with exit code {done.returncode}")


# Each command writes one thing; --quiet leaves errors alone.
cellrefine("vocab", "build", source, "--out", keep / "vocab.tsv")
cellrefine("pack", source, "--vocab", keep / "vocab.tsv", "--out", keep / "x.cells")
few = ("--set", "batch.max_tokens=96")
cellrefine("pretrain", "--corpus", keep / "x.cells", "--preset", "tiny", "--label", a.label, "--split", "train=0.67,test=0.33",
           "--out", keep / "pretrained", "--set", "train.steps=40", *few)
cellrefine("refine", "--corpus", keep / "x.cells", "--checkpoint", keep / "pretrained", "--markers", a.markers, "--allow-unmatched",
           "--label", a.label, "--out", keep / "refined", "--set", "train.steps=40", *few)
cellrefine("embed", "--corpus", keep / "x.cells", "--checkpoint", keep / "refined", "--h5ad", source, "--out", out)

# Back in scanpy.
before, after = anndata.read_h5ad(source), anndata.read_h5ad(out)
x = after.obsm["X_cellrefine"]
assert x.shape == (before.n_obs, 128) and x.dtype == np.float32 and np.isfinite(x).all()
assert after.obs_names.equals(before.obs_names) and after.var.equals(before.var)
assert (after.X != before.X).sum() == 0, "the counts changed"
assert after.uns["cellrefine"]["program"].startswith("cellrefine ")
sc.pp.neighbors(after, use_rep="X_cellrefine", n_neighbors=15)
sc.tl.umap(after, random_state=0)
assert after.obsm["X_umap"].shape == (before.n_obs, 2) and np.isfinite(after.obsm["X_umap"]).all()

# Does the graph know the types? The share of neighbours of a cell's own type, beside that of a random pair.
graph = after.obsp["connectivities"].tocoo()
known = after.obs[a.label].notna().to_numpy()
edges = known[graph.row] & known[graph.col]
codes = after.obs[a.label].astype("category").cat.codes.to_numpy()
alike = (codes[graph.row] == codes[graph.col])[edges].mean()
chance = (after.obs[a.label].value_counts(normalize=True) ** 2).sum()
agree = (after.obs["cellrefine_label"].astype(str) == after.obs[a.label].astype(str)).mean()
print(f"{after.n_obs} cells: {alike:.0%} of neighbours are of the same type (by chance {chance:.0%}); "
      f"nearest prototype names {agree:.0%} of the cells right, mean score {after.obs['cellrefine_score'].mean():.2f}")
assert alike > chance + 0.15 and agree > chance, "the embedding says nothing of the types"
after.write_h5ad(keep / "umap.h5ad")
assert anndata.read_h5ad(keep / "umap.h5ad").uns["neighbors"]["params"]["use_rep"] == "X_cellrefine"
print(f"ok: {keep / 'umap.h5ad'}")
