#!/usr/bin/env python3
"""PEFT reads the adapters of a LoRA run: base + adapter, merged by PEFT, is the network that the checkpoint holds.

    cellrefine refine --corpus X.cells --checkpoint BASE --markers M.gmt --label cell_type --set lora.rank=8 --out RUN
    python3 scripts/golden/peft_adapters.py RUN [--base BASE_FOLDER]

Needs peft, torch, transformers. Exits 1 at the first tensor or logit that differs.
"""
import argparse
import json
import pathlib
import sys

import torch
from peft import PeftModel
from transformers import BertForMaskedLM

# Two f32 products of width `rank`, summed in another order.
WEIGHTS, LOGITS = 1e-6, 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="run folder of refine or finetune with lora.rank")
    parser.add_argument("--base", type=pathlib.Path, help="model folder that the run started from [default: as recorded]")
    args = parser.parse_args()

    checkpoint = args.run / "checkpoints" / (args.run / "last").read_text().strip()
    adapter = checkpoint / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = args.base or config["base_model_name_or_path"]

    ours, info = BertForMaskedLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    theirs = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(base), adapter)
    adapted = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * len(config["target_modules"]), (len(adapted), len(config["target_modules"]))

    torch.manual_seed(0)
    tokens = torch.randint(4, ours.config.vocab_size, (3, min(64, ours.config.max_position_embeddings)))
    with torch.no_grad():
        logits = [model.eval()(tokens).logits for model in (theirs, ours, BertForMaskedLM.from_pretrained(base).eval())]
    apart, learned = ((a - logits[1]).abs().max().item() for a in (logits[0], logits[2]))
    assert apart < LOGITS < learned, f"logits differ by {apart:.1e}; the run moved them by {learned:.1e}"

    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        difference = (tensor - merged[name]).abs().max().item()
        assert difference < WEIGHTS, f"{name} differs by {difference:.1e}"
    print(f"{len(adapted) // 2} adapters of rank {config['r']}: logits of PEFT's network and ours differ by {apart:.1e}, "
          f"of the base by {learned:.1e}; all {len(merged)} tensors equal within {WEIGHTS:.0e}")


if __name__ == "__main__":
    sys.exit(main())
