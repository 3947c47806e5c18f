"""interop.py - what Lapidary writes, loaded by the ecosystem: an adapter in peft, a merged checkpoint in transformers.

  python bench/interop.py BASE ADAPTER MERGED ROWS.jsonl [--dtype f32]

Rows are {"text"}. Prints one JSON line: the largest difference of token NLLs between `lapidary score` (adapter applied, and
merged) and peft on BASE + ADAPTER, and transformers on MERGED.
"""
import argparse
import json
import subprocess

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    a = argparse.ArgumentParser()
    a.add_argument("base")
    a.add_argument("adapter")
    a.add_argument("merged")
    a.add_argument("rows")
    a.add_argument("--program", default="./lapidary")
    a.add_argument("--dtype", default="f32")
    args = a.parse_args()
    dtype = torch.float32 if args.dtype == "f32" else torch.bfloat16

    def ours(*options):
        out = subprocess.run([args.program, "score", "--data", args.rows, "--dtype", args.dtype, *options], check=True,
                             capture_output=True, text=True).stdout
        return [json.loads(l)["token_nll"] for l in out.splitlines()]

    ids = []
    out = subprocess.run([args.program, "tokenize", "--data", args.rows, "--model", args.base], check=True, capture_output=True,
                         text=True).stdout
    for line in out.splitlines():
        ids.append([2] + json.loads(line)["ids"])

    def theirs(model):
        result = []
        for row in ids:
            x = torch.tensor(row)[None]
            with torch.no_grad():
                logits = model(input_ids=x, use_cache=False).logits[0, :-1].float()
            result.append(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none").tolist())
        return result

    def largest(a, b):
        return max(abs(x - y) for r, s in zip(a, b) for x, y in zip(r, s))

    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    adapted = theirs(PeftModel.from_pretrained(load(args.base), args.adapter))
    merged = theirs(load(args.merged))
    print(json.dumps({"rows": len(ids), "tokens": sum(len(r) - 1 for r in ids),
                      "adapter_in_peft": largest(ours("--model", args.base, "--adapter", args.adapter), adapted),
                      "merged_in_transformers": largest(ours("--model", args.merged), merged),
                      "adapter_changes_nll_by": largest(adapted, theirs(load(args.base)))}))


main()
