"""Opens a model folder with transformers and says whether every key was found and none was left over.

    python scripts/golden/check_hf_roundtrip.py FOLDER [OTHER]

With OTHER, a folder of the same model, the logits of both on random tokens must agree to 1e-5.
"""
import sys, torch
from transformers import BertForMaskedLM

def load(folder):
    model, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    left = {k: sorted(map(str, v)) for k, v in info.items() if v}
    print(folder, "keys amiss:", left or "none")
    assert not left, left
    assert model.config.hidden_act == "relu" and model.config.architectures == ["BertForMaskedLM"]
    return model.eval()

model = load(sys.argv[1])
torch.manual_seed(0)
c = model.config
ids = torch.randint(0, c.vocab_size, (3, min(64, c.max_position_embeddings)))
with torch.no_grad():
    logits = model(ids).logits
assert torch.isfinite(logits).all()
if len(sys.argv) > 2:
    with torch.no_grad():
        difference = (load(sys.argv[2])(ids).logits - logits).abs().max().item()
    print("largest difference of logits:", difference)
    assert difference < 1e-5
print("ok")
