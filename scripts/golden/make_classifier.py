"""Golden values for tests/eval_runs.rs: a classifier on tests/golden/parity, run by transformers, scored by sklearn.

    python scripts/golden/make_classifier.py tests/golden/parity tests/golden/classifier.json

Cells of random genes; a cell's class decides which genes it prefers. Their vectors are the mean over the second-to-last hidden
state (Geneformer's convention), in float64. The classifier is a logistic regression on the cells of fold "train", its weights
rounded; it knows a class that no cell has and lacks one that some cells have. The scores are those of fold "test". Every
prediction is clear of the next by more than 1e-3. Made with torch 2.15.0, transformers 5.23.0, scikit-learn 1.9.1.
"""
import json, sys
import numpy as np, torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from transformers import BertForMaskedLM

model = BertForMaskedLM.from_pretrained(sys.argv[1]).double().eval()
random = np.random.default_rng(5)
names = ["T", "B", "NK", "mono", "rare"]  # "rare" is unknown to the classifier
cells = []
for i in range(150):
    k = int(random.choice(5, p=[.35, .25, .2, .15, .05]))
    weight = np.ones(39)
    weight[k * 7:k * 7 + 7] = 15
    n = int(random.integers(3, 13))
    gene = 2 + random.choice(39, n, replace=False, p=weight / weight.sum())
    cells.append({"gene": gene.tolist(), "class": names[k], "fold": "test" if i % 5 < 2 else "train"})
rows = []
with torch.no_grad():
    for c in cells:
        hidden = model(input_ids=torch.tensor([c["gene"]]), output_hidden_states=True).hidden_states[-2]
        rows.append(hidden[0].mean(0).numpy())
rows, truth = np.array(rows), np.array([c["class"] for c in cells])
train = np.array([c["fold"] == "train" for c in cells])
known = train & (truth != "rare")
fit = LogisticRegression(C=1.0, max_iter=10_000).fit(rows[known], truth[known])
# Order of the classifier: neither alphabetical nor that of the cells; "ghost" is never right and sometimes predicted.
classes = ["mono", "ghost", "T", "NK", "B"]
at = {c: i for i, c in enumerate(fit.classes_)}
weight = np.array([fit.coef_[at[c]] if c in at else 0.5 * fit.coef_[at["T"]] for c in classes]).round(4)
bias = np.array([fit.intercept_[at[c]] if c in at else 0 for c in classes]).round(4)
other = rows[~train] @ weight.T + bias
short = np.sort(np.delete(other, 1, 1).max(1) - other[:, 1])  # by how much "ghost" loses: let it win on six cells
bias[1] = ((short[5] + short[6]) / 2).round(4)
logits = rows[~train] @ weight.T + bias
ranked = np.sort(logits, 1)
margin = (ranked[:, -1] - ranked[:, -2]).min()
assert margin > 1e-3, margin
predicted, truth = np.array(classes)[logits.argmax(1)], truth[~train]
assert "ghost" in predicted and "rare" in truth and len(set(predicted)) == 5, set(predicted)
labels = sorted(set(truth) | set(predicted))
precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
json.dump({
    "cells": cells, "classes": classes, "weight": weight.ravel().tolist(), "bias": bias.tolist(),
    "accuracy": accuracy_score(truth, predicted), "macro_f1": f1_score(truth, predicted, average="macro", zero_division=0),
    "per_class": {l: {"precision": p, "recall": r, "f1": f, "support": int(s)} for l, p, r, f, s in zip(labels, precision, recall, f1, support)},
}, open(sys.argv[2], "w"))
print(margin, accuracy_score(truth, predicted), dict(zip(labels, f1)))
