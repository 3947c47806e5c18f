"""curve.py - the loss curve of a bf16 LoRA run, Lapidary's beside peft's, from one adapter on the same batches.

  python bench/curve.py MODEL ROWS.jsonl [--steps 100] [--accumulate 4] [--fields '{prompt: question, completion: answer}']

Prints one JSON line with the mean and largest absolute difference of the losses.
"""
import argparse
import csv
import json
import os
import subprocess
import tempfile

import h5py
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("rows")
    a.add_argument("--program", default="./lapidary")
    a.add_argument("--steps", type=int, default=100)
    a.add_argument("--accumulate", type=int, default=4)
    a.add_argument("--length", type=int, default=512)
    a.add_argument("--lr", type=float, default=2e-4)
    a.add_argument("--fields", default="{prompt: question, completion: answer}")
    args = a.parse_args()
    work = tempfile.mkdtemp(prefix="lapidary-curve-")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="eager")
    targets = r".*layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    init, yaml, store, out = (os.path.join(work, n) for n in ("init", "run.yaml", "rows.h5", "run"))
    model.save_pretrained(init)
    json.dump({"model": args.model, "output": out, "method": "lora", "lora": {"init": init}, "dtype": "bf16",
               "data": {"train": args.rows, "packing": False, "shuffle": False, "max_length": args.length, "chat_format": "small"},
               "steps": args.steps, "batch": {"sequences": 1, "accumulate": args.accumulate}, "optimizer": {"lr": args.lr},
               "schedule": {"name": "constant", "warmup": 0}}, open(yaml, "w"))
    subprocess.run([args.program, "prepare", yaml, f"data.fields={args.fields}", "--out", store], check=True, capture_output=True)
    subprocess.run([args.program, "train", yaml, f"data.fields={args.fields}"], check=True, capture_output=True)
    ours = [float(m["loss"]) for m in csv.DictReader(open(os.path.join(out, "metrics.csv")))]

    h5 = h5py.File(store)
    begins, tokens, mask = (h5["train/" + k][:] for k in ("begins", "tokens", "mask"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0)
    theirs, sample = [], 0
    for _ in range(args.steps):
        batch = []
        for _ in range(args.accumulate):
            s = slice(begins[sample], begins[sample + 1])
            batch.append((torch.tensor(tokens[s]).long(), torch.tensor(mask[s]).bool()))
            sample += 1
        count = sum(int(m[1:].sum()) for _, m in batch)
        total = 0.0
        for ids, m in batch:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[m[1:]].sum() / count
            nll.backward()
            total += nll.item()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(total)
    differences = [abs(x - y) for x, y in zip(ours, theirs)]
    print(json.dumps({"steps": args.steps, "first": [ours[0], theirs[0]], "last": [ours[-1], theirs[-1]],
                      "mean_difference": sum(differences) / len(differences), "largest_difference": max(differences)}))


main()
