"""gguf_parity.py - the same GGUF in Lapidary and in llama.cpp: logits side by side.

  python bench/gguf_parity.py FILE.gguf ROWS.jsonl [--lora FILE.gguf --adapter DIR] [--dtype f32|bf16]

Prints the mean and largest difference of logits, the KL divergence, and the share of positions with the same best
token among those whose two best logits differ by more than 0.05.
"""
import argparse
import json
import tempfile

import llama_cpp
import numpy as np

from program import ids_of, ours


def peers(model, sequences, lora, kv):
    types = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}
    llm = llama_cpp.Llama(model, n_ctx=max(map(len, sequences)) + 8, logits_all=True, verbose=False, n_threads=2,
                          type_k=types[kv], type_v=types[kv], flash_attn=False, lora_path=lora, n_gpu_layers=0)
    rows = []
    for ids in sequences:
        llm.reset()
        llm.eval(ids)
        rows.append(np.array(llm.scores[: len(ids) - 1], dtype=np.float32))
    return np.concatenate(rows)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(a, b):
    best = np.sort(a, -1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 0.05
    p, q = log_softmax(a.astype(np.float64)), log_softmax(b.astype(np.float64))
    same = a.argmax(-1) == b.argmax(-1)
    return {"positions": len(a), "clear": int(clear.sum()), "mean_difference": float(np.abs(a - b).mean()),
            "largest_difference": float(np.abs(a - b).max()), "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
            "same_top": float(same.mean()), "same_top_clear": float(same[clear].mean()) if clear.any() else None}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("rows")
    p.add_argument("--dtype", default="f32")
    p.add_argument("--lora")
    p.add_argument("--adapter")
    p.add_argument("--kv", default="f32")
    p.add_argument("--limit", type=int, default=16)
    a = p.parse_args()
    texts = [json.loads(line)["text"] for line in open(a.rows)][: a.limit]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        f.flush()
        mine = ours(a.model, f.name, a.dtype, a.adapter)
    sequences = [[2] + ids for ids in ids_of(a.model, texts)]
    theirs = peers(a.model, sequences, a.lora, a.kv)
    print(json.dumps(compare(mine.reshape(theirs.shape), theirs)))


main()
