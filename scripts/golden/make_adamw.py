"""Golden values of torch.optim.AdamW with clip_grad_norm_: five steps on twelve weights, in f64.

Writes tests/golden/adamw.json. Run from the repository root: python scripts/golden/make_adamw.py (numpy, torch).
"""
import json
import numpy as np
import torch

rng = np.random.default_rng(20251122)
start = rng.standard_normal(12)
grads = rng.standard_normal((5, 12)) * np.array([0.1, 3.0, 1e-3, 1.0, 10.0])[:, None]
hyper = dict(lr=3e-3, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05)
max_norm = 1.0
w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
optimizer = torch.optim.AdamW([w], **hyper)
weights = []
for grad in grads:
    w.grad = torch.tensor(grad, dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    optimizer.step()
    weights.append(w.detach().tolist())
state = optimizer.state[w]
golden = {
    "made_with": f"torch {torch.__version__}",
    "learning_rate": hyper["lr"], "beta1": hyper["betas"][0], "beta2": hyper["betas"][1], "eps": hyper["eps"],
    "weight_decay": hyper["weight_decay"], "max_norm": max_norm,
    "start": start.tolist(), "grads": grads.tolist(), "weights": weights,
    "m": state["exp_avg"].tolist(), "v": state["exp_avg_sq"].tolist(),
}
with open("tests/golden/adamw.json", "w") as f:
    json.dump(golden, f, indent=1)
    f.write("\n")
