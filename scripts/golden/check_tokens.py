"""Checks a packed corpus against Geneformer's ranking computed with numpy, cell by cell.

    python scripts/golden/check_tokens.py cells.h5ad V.tsv cells.cells [--genes COL] [--slot X|raw/X|layers/NAME]

For each cell v = x / n_counts * 10000 / median in float64, genes with a count in descending order of v. Groups of exactly equal v
are compared as sets (numpy's order of ties is the CPU's) and, apart from that, in the order that this project defines: ascending
matrix column. Needs anndata, numpy, safetensors; nothing of this project.
"""

import argparse
import json
import pathlib
import re
import sys

import anndata
import numpy as np
import scipy.sparse as sp
from safetensors.numpy import load_file

ENSEMBL = re.compile(r"^ENS[A-Z]{0,4}G\d{11}(\.\d+)?$")


def read_vocab(path):
    ids, medians, header = {}, [], None
    for line in open(path, encoding="utf-8"):
        if line.startswith("#"):
            continue
        fields = line.rstrip("\n").split("\t")
        if header is None:
            header = fields
            continue
        ids[fields[0]] = int(fields[1])
        medians.append(float(fields[2]))
    return ids, np.array(medians)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("h5ad")
    parser.add_argument("vocab")
    parser.add_argument("corpus")
    parser.add_argument("--genes", help="var column of Ensembl ids; default: the index or column with most of them")
    parser.add_argument("--slot", default="X")
    args = parser.parse_args()

    data = anndata.read_h5ad(args.h5ad)
    matrix, var = data.X, data.var
    if args.slot.startswith("raw"):
        matrix, var = data.raw.X, data.raw.var
    elif args.slot.startswith("layers/"):
        matrix = data.layers[args.slot.removeprefix("layers/")]
    matrix = sp.csr_matrix(matrix)
    matrix.sum_duplicates()
    columns = {"": [str(v) for v in var.index], **{c: [str(v) for v in var[c]] for c in var.columns}}
    if args.genes is None:
        name = max(columns, key=lambda c: sum(bool(ENSEMBL.match(v.upper())) for v in columns[c]))
    else:
        name = args.genes if args.genes in columns else ""
    ids, medians = read_vocab(args.vocab)
    token = np.array([ids.get(v.upper().split(".")[0], -1) for v in columns[name]])

    corpus = pathlib.Path(args.corpus)
    manifest = json.loads((corpus / "corpus.json").read_text())
    packed = []
    for shard in manifest["shards"]:
        t = load_file(corpus / shard["file"])
        start, gene = t["cell_start"].astype(np.int64), t["gene"].astype(np.int64)
        packed += [(gene[a:b], total) for a, b, total in zip(start[:-1], start[1:], t["total_count"])]

    at = same = tied = tokens = 0
    for row in range(matrix.shape[0]):
        span = slice(matrix.indptr[row], matrix.indptr[row + 1])
        column, count = matrix.indices[span], matrix.data[span].astype(np.float64)
        n_counts = count.sum()
        known = (token[column] >= 0) & (count > 0)
        # Several columns of one gene are summed; the first column is the gene's place.
        first, total = {}, {}
        for c, x in sorted(zip(column[known], count[known])):
            first.setdefault(token[c], c)
            total[token[c]] = total.get(token[c], 0.0) + x
        if not first:
            continue
        gene = np.array(sorted(first, key=first.get))
        v = np.array([total[g] for g in gene]) / n_counts * 10000 / medians[gene]
        order = np.argsort(-v, kind="stable")
        expected, v = gene[order], v[order]
        found, found_total = packed[at]
        at += 1
        tokens += len(expected)
        if len(found) != len(expected) or np.float32(n_counts) != np.float32(found_total):
            sys.exit(f"cell {row}: {len(found)} tokens, total {found_total}; expected {len(expected)}, {n_counts}")
        if np.array_equal(found, expected):
            same += 1
            continue
        groups = np.flatnonzero(np.r_[True, v[1:] != v[:-1], True])
        for a, b in zip(groups[:-1], groups[1:]):
            if set(found[a:b]) != set(expected[a:b]):
                sys.exit(f"cell {row}: rank {a}: {found[a:b][:5]} where {expected[a:b][:5]} was expected")
        tied += 1
    if at != len(packed):
        sys.exit(f"{len(packed)} cells packed, {at} expected")
    print(f"{at} cells, {tokens} tokens: {same} cells identical, {tied} equal up to the order of exact ties")


if __name__ == "__main__":
    main()
