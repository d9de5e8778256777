"""Makes data/pbmc700/pbmc700.h5ad from the reduced PBMC 68k example that scanpy's wheel ships (BSD-3-Clause).

The example holds log-normalised values; `ln(1 + count / n_counts * 10,000)` is inverted and rounded to whole counts. The
largest relative rounding error is printed. Usage: python scripts/make_demo_data.py OUT.h5ad   (needs scanpy, anndata)
"""
import sys

import anndata
import numpy as np
import pandas
import scanpy
import scipy.sparse as sparse

source = scanpy.datasets.pbmc68k_reduced()
values = sparse.csr_matrix(source.raw.X)
rows = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
exact = np.expm1(values.data.astype(np.float64)) * source.obs["n_counts"].to_numpy(np.float64)[rows] / 1e4
counts = np.rint(exact)
keep = counts > 0
print("largest relative rounding error:", np.max(np.abs(exact - counts)[keep] / counts[keep]))
matrix = sparse.csr_matrix((counts.astype(np.float32), values.indices, values.indptr), shape=values.shape)
matrix.eliminate_zeros()
matrix.sort_indices()
obs = pandas.DataFrame(
    {"cell_type": pandas.Categorical(source.obs["bulk_labels"].astype(str)),
     "n_counts_total": source.obs["n_counts"].round().astype(np.int32)},
    index=pandas.Index(source.obs_names.astype(str), name="barcode"))
var = pandas.DataFrame(index=pandas.Index(source.raw.var_names.astype(str), name="gene_symbol"))
anndata.AnnData(X=matrix, obs=obs, var=var).write_h5ad(sys.argv[1], compression="gzip", compression_opts=9)
print(matrix.shape, "cells x genes,", matrix.nnz, "counts")
