"""decode.py - prefill and decoding of one GGUF beside llama.cpp, interleaved in one run.

  python bench/decode.py FILE.gguf [--rounds N] [--prompt N] [--tokens N] [--depth N]

Each round runs Lapidary, whose own probe reads memory every few tokens, and then llama.cpp. Prints each round
and the medians: tokens a second, ratios, share of the probed bandwidth, peak resident memory.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")

PEER = r"""
import json, sys, time
import llama_cpp
path, prompt, tokens, depth, everything = sys.argv[1], *map(int, sys.argv[2:6])
n = max(prompt, depth)
ids = [3 + i * 7919 % 250000 for i in range(n + 1)]
llm = llama_cpp.Llama(path, n_ctx=n + tokens + 64, n_batch=512, n_ubatch=512, logits_all=bool(everything), verbose=False,
                      n_threads=2, n_threads_batch=2)
prefill = 1e9
for _ in range(2 if prompt else 0):
    llm.reset()
    start = time.time()
    llm.eval(ids[:prompt])
    prefill = min(prefill, time.time() - start)
llm.reset()
if depth:
    llm.eval(ids[:depth])
llm.eval(ids[:4])
start = time.time()
for i in range(tokens):
    llm.eval([ids[i % n]])
print(json.dumps({"prefill": prompt / prefill if prompt else 0, "decode": tokens / (time.time() - start)}))
"""


def run(command):
    """The last JSON line, and the peak resident size in GB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return json.loads(out.strip().splitlines()[-1]), usage.ru_maxrss * 1024 / 1e9


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--tokens", type=int, default=48)
    p.add_argument("--depth", type=int, default=0)
    a = p.parse_args()
    rows = []
    for _ in range(a.rounds):
        ours, ours_gb = run([os.path.join(ROOT, "lapidary"), "bench", "--model", a.model, "--prompt", str(a.prompt), "--tokens",
                             str(a.tokens), "--depth", str(a.depth)])
        last, last_gb = run([sys.executable, "-c", PEER, a.model, str(a.prompt), str(a.tokens), str(a.depth), "0"])
        every, _ = run([sys.executable, "-c", PEER, a.model, str(a.prompt), "4", "0", "1"]) if a.prompt else ({"prefill": 0}, 0)
        probe = ours["probe_gb_per_s"]
        row = {"decode": ours["decode_tokens_per_s"], "decode llama.cpp": last["decode"],
               "bandwidth share": ours["decode_gb_per_s"] / probe, "probe GB/s": probe,
               "private GB": ours["private_gb"], "peak GB": ours_gb, "peak GB llama.cpp": last_gb}
        if a.prompt:
            row |= {"prefill, last logits": ours["prefill_tokens_per_s"], "prefill, last logits, llama.cpp": last["prefill"],
                    "prefill, all logits": ours["scoring_tokens_per_s"], "prefill, all logits, llama.cpp": every["prefill"]}
        rows.append(row)
        print(json.dumps({k: round(v, 3) for k, v in row.items()}), flush=True)
    print("medians:")
    for key in rows[0]:
        print(f"  {key:34} {statistics.median(r[key] for r in rows):9.3f}")
    for ours, peer in (("decode", "decode llama.cpp"), ("prefill, last logits", "prefill, last logits, llama.cpp"),
                       ("prefill, all logits", "prefill, all logits, llama.cpp")):
        if ours in rows[0]:
            print(f"  ratio {ours:28} {statistics.median(r[ours] / r[peer] for r in rows):9.2f}")


main()
