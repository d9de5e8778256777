"""Golden values for marker sets: one-versus-rest derivation, weighted Jaccard, marker scores. numpy only.

Dense and written from the formulas (src/genes/markers_derive.rs, markers.rs, marker_score.rs), not from the Rust code:
    python scripts/golden/make_markers.py > tests/golden/markers.json
"""
import json
import numpy as np

rng = np.random.default_rng(20)
V, C, K, TOP = 700, 32, 4, 12
label = rng.choice(K, C, p=[0.5, 0.3, 0.15, 0.05])
label[:K] = np.arange(K)
high = [rng.choice(np.arange(2, V), 25, replace=False) for _ in range(K)]
counts = rng.poisson(rng.uniform(0.2, 1.8, C)[:, None], (C, V))  # lengths on both sides of 512
for i in range(C):
    counts[i, high[label[i]]] += rng.poisson(4.0, 25)
counts[:, :2] = 0  # special tokens
total = counts.sum(1)
X = np.log1p(1e4 * counts / total[:, None]).astype(np.float16)
tokens = [np.argsort(-counts[i] * (1 + 0.001 * rng.random(V)), kind="stable")[: (counts[i] > 0).sum()] for i in range(C)]


def derive(E, present, a, b):
    E = E.astype(np.float64)
    n = np.bincount(label, minlength=K)
    mu = np.array([E[label == k].mean(0) for k in range(K)])
    var = np.array([E[label == k].var(0) for k in range(K)])
    fr = np.array([present[label == k].mean(0) for k in range(K)])
    out = []
    for k in range(K):
        rest = label != k
        t = (mu[k] - E[rest].mean(0)) / np.sqrt((var[k] + a) / n[k] + (E[rest].var(0) + b) / rest.sum())
        s = np.where((fr[k] >= 0.25) & (mu[k] > E[rest].mean(0)), t * mu[k] / (mu.sum(0) + 1e-6), 0)
        g = np.argsort(-s, kind="stable")[:TOP]
        g = g[s[g] > 0]
        out.append([[int(j), float(w)] for j, w in zip(g, s[g] / s[g].sum())])
    return out


ranks = np.zeros((C, V))
for i, t in enumerate(tokens):
    ranks[i, t] = 1 - np.arange(len(t)) / len(t)
present = counts > 0
values = derive(X, present, 0.1, 0.01)
by_rank = derive(ranks, present, 0.01, 0.001)

A = np.zeros((K, V))
for k, s in enumerate(values):
    for g, w in s:
        A[k, g] = w
jaccard = [[float(np.minimum(a, b).sum() / np.maximum(a, b).sum()) for b in A] for a in A]
U = np.zeros((C, K))
for i, t in enumerate(tokens):
    R = min(len(t), 512)
    for r in range(R):
        U[i] += A[:, t[r]] * (1 - r / R)
fitted = U[: C // 2]
Z = (U - fitted.mean(0)) / (fitted.std(0) + 1e-6)
# Specificity weights of unweighted sets that share genes: ln((1 + P) / holders).
plain = [[10, 11, 12], [11, 12, 13, 14], [12]]
holders = {g: sum(g in s for s in plain) for s in plain for g in s}
idf = []
for s in plain:
    w = np.array([np.log((1 + len(plain)) / holders[g]) for g in s])
    idf.append([[g, float(x)] for g, x in zip(s, w / w.sum())])
print(json.dumps(dict(
    vocab=V, top=TOP, label=label.tolist(), tokens=[t.tolist() for t in tokens], total=total.tolist(),
    values=[[float(f"{x:.5g}") for x in X[i, t]] for i, t in enumerate(tokens)],
    derived_values=values, derived_ranks=by_rank, jaccard=jaccard, scores=U.tolist(), fitted_cells=C // 2,
    standardised=Z.tolist(), plain=plain, idf=idf)))
