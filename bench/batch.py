"""batch.py - many sequences decoded at once beside llama.cpp, interleaved in one run.

  python bench/batch.py FILE.gguf [--rounds N] [--sequences N] [--tokens N]

Each round: llama.cpp with one sequence, Lapidary with many, llama.cpp with as many in one batch. Prints tokens a
second of all sequences together, and the ratios.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

from program import PROGRAM

PEER = r"""
import json, sys, time
import llama_cpp
path, sequences, tokens = sys.argv[1], *map(int, sys.argv[2:4])
llama_cpp.llama_backend_init()
mp = llama_cpp.llama_model_default_params()
model = llama_cpp.llama_model_load_from_file(path.encode(), mp)
cp = llama_cpp.llama_context_default_params()
cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_seq_max = sequences * (tokens + 16), 512, 512, sequences
cp.n_threads = cp.n_threads_batch = 2
ctx = llama_cpp.llama_init_from_model(model, cp)
batch = llama_cpp.llama_batch_init(512, 0, sequences)
def step(at):
    batch.n_tokens = sequences
    for s in range(sequences):
        batch.token[s] = 3 + (s * 7919 + at * 104729) % 250000
        batch.pos[s] = at
        batch.n_seq_id[s] = 1
        batch.seq_id[s][0] = s
        batch.logits[s] = 1
    assert llama_cpp.llama_decode(ctx, batch) == 0
for at in range(4):
    step(at)
start = time.time()
for at in range(4, 4 + tokens):
    step(at)
llama_cpp.llama_synchronize(ctx)
print(json.dumps({"rate": sequences * tokens / (time.time() - start)}))
"""


def run(command):
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--sequences", type=int, default=16)
    p.add_argument("--tokens", type=int, default=32)
    a = p.parse_args()
    rows = []
    for _ in range(a.rounds):
        one = run([sys.executable, "-c", PEER, a.model, "1", str(a.tokens)])["rate"]
        ours = run([PROGRAM, "bench", "--model", a.model, "--prompt", "0", "--sequences", str(a.sequences), "--tokens",
                    str(a.tokens)])
        many = run([sys.executable, "-c", PEER, a.model, str(a.sequences), str(a.tokens)])["rate"]
        rate = ours["decode_tokens_per_s"]
        rows.append({"one, llama.cpp": one, "many": rate, "many, llama.cpp": many, "many / one of llama.cpp": rate / one,
                     "many / many of llama.cpp": rate / many, "probe GB/s": ours["probe_gb_per_s"]})
        print(json.dumps({k: round(v, 2) for k, v in rows[-1].items()}), flush=True)
    print("medians:")
    for key in rows[0]:
        print(f"  {key:28} {statistics.median(r[key] for r in rows):9.2f}")


main()
