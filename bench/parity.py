"""parity.py - token losses of a checkpoint against transformers, beside what transformers differs from itself.

  python bench/parity.py MODEL TEXT.txt [--tokens 256] [--dtype bf16|f32] [--program ./lapidary]

Prints one JSON line: mean and largest difference of token NLLs between Lapidary and transformers (eager
attention), and between eager and sdpa attention of transformers.
"""
import argparse
import json
import os
import subprocess
import tempfile

import torch
from transformers import AutoModelForCausalLM


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("text")
    a.add_argument("--tokens", type=int, default=256)
    a.add_argument("--dtype", default="bf16")
    a.add_argument("--program", default="./lapidary")
    args = a.parse_args()

    def lapidary(command, rows):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
            f.write("".join(json.dumps(r) + "\n" for r in rows))
            f.flush()
            out = subprocess.run([args.program, command, "--model", args.model, "--data", f.name]
                                 + (["--dtype", args.dtype] if command == "score" else []),
                                 check=True, capture_output=True, text=True).stdout
        return [json.loads(line) for line in out.splitlines()]

    text = open(args.text).read()[: 6 * args.tokens]
    ids = lapidary("tokenize", [{"text": text}])[0]["ids"][: args.tokens - 1]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write(json.dumps({"ids": ids}) + "\n")
        f.flush()
        out = subprocess.run([args.program, "tokenize", "--decode", "--model", args.model, "--data", f.name], check=True,
                             capture_output=True, text=True).stdout
    text = json.loads(out)["text"]
    ours = torch.tensor(lapidary("score", [{"text": text}])[0]["token_nll"])
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    nll = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=attention)
        x = torch.tensor([2] + ids)[None]
        with torch.no_grad():
            logits = model(input_ids=x, use_cache=False).logits[0, :-1].float()
        nll[attention] = torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none")
        del model
    assert len(ours) == len(nll["eager"]), (len(ours), len(nll["eager"]))
    diff = (ours - nll["eager"]).abs()
    own = (nll["sdpa"] - nll["eager"]).abs()
    print(json.dumps({"model": os.path.basename(args.model.rstrip("/")), "dtype": args.dtype, "tokens": len(ours),
                      "mean_nll": ours.mean().item(), "reference_mean_nll": nll["eager"].mean().item(),
                      "mean_difference": diff.mean().item(), "largest_difference": diff.max().item(),
                      "reference_eager_to_sdpa_mean": own.mean().item(), "reference_eager_to_sdpa_largest": own.max().item()}))


main()
