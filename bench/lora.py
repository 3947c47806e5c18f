"""lora.py - LoRA steps of Lapidary and of peft on the same samples: tokens per second and peak memory.

  python bench/lora.py MODEL ROWS.jsonl [--length 512] [--steps 4] [--rounds 2] [--no-peer] [--no-shortcut]

Rows are prepared by `lapidary prepare`; both trainers take one sample a step, in order, rank 16 on the seven
usual targets, bf16. Rounds alternate the two, so that both see the same machine. With --no-shortcut Lapidary runs
a second time with the exact shortcut off, and the adapters of both runs are compared bit for bit.
"""
import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import h5py

HERE = os.path.dirname(os.path.abspath(__file__))


def run(command, env=None):
    """Standard output of a command, and its peak resident bytes."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        assert status == 0, (command, status)
        out.seek(0)
        return out.read(), usage.ru_maxrss * 1024


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("rows")
    a.add_argument("--program", default="./lapidary")
    a.add_argument("--length", type=int, default=512)
    a.add_argument("--steps", type=int, default=4)
    a.add_argument("--rounds", type=int, default=2)
    a.add_argument("--no-peer", action="store_true")
    a.add_argument("--no-shortcut", action="store_true")
    a.add_argument("--chat-format", default="small")
    a.add_argument("--fields", default="{}")
    args = a.parse_args()
    work = tempfile.mkdtemp(prefix="lapidary-bench-")
    data = ["data.packing=false", "data.shuffle=false", f"data.max_length={args.length}", f"data.fields={args.fields}",
            f"data.chat_format={args.chat_format}"]
    yaml = os.path.join(work, "run.yaml")
    json.dump({"model": args.model, "output": "none", "method": "lora", "data": {"train": args.rows}, "steps": args.steps,
               "batch": {"sequences": 1, "accumulate": 1}, "optimizer": {"lr": 1e-4}, "schedule": {"name": "constant", "warmup": 0},
               "save": {"every": 100000}}, open(yaml, "w"))
    store = os.path.join(work, "rows.h5")
    run([args.program, "prepare", yaml, *data, "--out", store])
    h5 = h5py.File(store)
    begins, tokens, mask = (h5["train/" + k][:] for k in ("begins", "tokens", "mask"))
    rows = os.path.join(work, "rows.jsonl")
    with open(rows, "w") as f:
        for i in range(args.steps):
            s = slice(begins[i], begins[i + 1])
            f.write(json.dumps({"ids": tokens[s].tolist(), "trained": mask[s].tolist()}) + "\n")

    def lapidary(name, env=None):
        out = os.path.join(work, name)
        _, peak = run([args.program, "train", yaml, f"output={out}", *data], env)
        metrics = list(csv.DictReader(open(os.path.join(out, "metrics.csv"))))
        adapter = hashlib.sha256(open(os.path.join(out, "adapter/adapter_model.safetensors"), "rb").read()).hexdigest()
        seconds = [int(m["tokens"]) / float(m["tokens_per_s"]) for m in metrics[1:]]
        rate = sum(int(m["tokens"]) for m in metrics[1:]) / sum(seconds)
        return rate, peak, [float(m["loss"]) for m in metrics], adapter


    for r in range(args.rounds):
        rate, peak, losses, adapter = lapidary(f"on{r}")
        row = {"round": r, "lapidary_tokens_per_s": rate, "lapidary_peak_gb": peak / 1e9, "lapidary_losses": losses}
        if args.no_shortcut:
            off, _, off_losses, off_adapter = lapidary(f"off{r}", {"LAPIDARY_SHORTCUT": "0"})
            row |= {"without_shortcut_tokens_per_s": off, "shortcut_ratio": rate / off,
                    "bit_for_bit": adapter == off_adapter and losses == off_losses}
        if not args.no_peer:
            out, peer_peak = run([sys.executable, os.path.join(HERE, "peft_lora.py"), args.model, rows, "--steps", str(args.steps)])
            lines = [json.loads(l) for l in out.splitlines() if l.startswith("{")]
            steps = [l for l in lines if "step" in l][1:]
            peer = sum(l["tokens"] for l in steps) / sum(l["tokens"] / l["tokens_per_s"] for l in steps)
            row |= {"peft_tokens_per_s": peer, "peft_peak_gb": peer_peak / 1e9, "ratio": rate / peer,
                    "peft_losses": [l["loss"] for l in lines if "step" in l]}
        print(json.dumps(row), flush=True)


main()
