"""peft_lora.py - LoRA steps of peft on a checkpoint: tokens per second, peak memory, losses.

  python bench/peft_lora.py MODEL ROWS.jsonl [--length 512] [--steps 3] [--rank 16]

The peer of bench/lora.py: bf16, gradient checkpointing, AdamW, the seven usual targets. Rows are
{"ids": [...], "trained": [0|1, ...]} as `lapidary` trains them, so both see the same tokens.
"""
import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("rows")
    a.add_argument("--steps", type=int, default=3)
    a.add_argument("--rank", type=int, default=16)
    a.add_argument("--lr", type=float, default=1e-4)
    a.add_argument("--attention", default="sdpa")
    a.add_argument("--no-checkpointing", action="store_true")
    args = a.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation=args.attention)
    model.config.use_cache = False
    targets = r".*layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=32, target_modules=targets))
    if not args.no_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0)
    rows = [json.loads(line) for line in open(args.rows)]
    rates = []
    for step in range(args.steps):
        row = rows[step % len(rows)]
        ids = torch.tensor(row["ids"])[None]
        labels = torch.where(torch.tensor(row["trained"])[None] > 0, ids, -100)
        begin = time.time()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.time() - begin
        rates.append(ids.numel() / seconds)
        print(json.dumps({"step": step + 1, "tokens": ids.numel(), "loss": loss.item(), "tokens_per_s": rates[-1]}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peer": "peft", "best_tokens_per_s": max(rates), "peak_bytes": peak}))


main()
