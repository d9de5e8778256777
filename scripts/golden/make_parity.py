"""Golden values for tests/parity.rs: a tiny BertForMaskedLM of transformers with random weights, run in float64.

    python scripts/golden/make_parity.py tests/golden/parity

Writes the model as transformers saves it (float16, so that the weights are exact in every type) and `expected.safetensors`:
ragged cells packed end to end, hidden states of every layer, logits and loss of the masked tokens, and the gradient of every
parameter. transformers itself runs the cells padded, with an attention mask. Made with torch 2.15.0, transformers 5.23.0.
"""
import sys, torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

out = sys.argv[1]
torch.manual_seed(7)
lengths = [5, 12, 1, 8]
config = BertConfig(
    vocab_size=41, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=70, max_position_embeddings=12,
    hidden_act="relu", layer_norm_eps=1e-12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, pad_token_id=0)
config._attn_implementation = "eager"
model = BertForMaskedLM(config).eval()
with torch.no_grad():
    for name, p in model.named_parameters():
        norm = "LayerNorm.weight" in name
        p.copy_((torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.1) + norm).half().float())
    model.bert.embeddings.word_embeddings.weight[0] = 0
model.half().save_pretrained(out)
model = model.double()

longest, cells = max(lengths), len(lengths)
ids = torch.zeros(cells, longest, dtype=torch.long)
mask = torch.zeros(cells, longest, dtype=torch.long)
labels = torch.full((cells, longest), -100)
for c, n in enumerate(lengths):
    ids[c, :n] = torch.randint(2, 41, (n,))
    mask[c, :n] = 1
for c, t in [(0, 1), (0, 4), (1, 0), (1, 5), (1, 11), (2, 0), (3, 2)]:
    labels[c, t] = ids[c, t]
    ids[c, t] = 1 if (c, t) != (1, 5) else 17
result = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
result.loss.backward()

real, masked = mask.bool(), labels >= 0
f32 = lambda t: t.detach().float().contiguous()
expected = {
    "input_ids": ids[real].int(),
    "cell_start": torch.tensor([0] + lengths).cumsum(0).int(),
    "masked_index": masked[real].nonzero().flatten().int(),
    "target": labels[masked].int(),
    "loss": f32(result.loss).reshape(1),
    "logits": f32(result.logits[masked]),
}
for i, h in enumerate(result.hidden_states):
    expected[f"hidden.{i}"] = f32(h[real])
for name, p in model.named_parameters():
    expected["grad." + name] = f32(p.grad)
save_file(expected, f"{out}/expected.safetensors")
