"""gguf_parity.py - the same GGUF in Lapidary and in llama.cpp: logits side by side.

  python bench/gguf_parity.py FILE.gguf ROWS.jsonl [--lora FILE.gguf --adapter DIR] [--dtype f32|bf16] [--by-llama TYPE]

Prints the mean and largest difference of logits, the KL divergence, and the share of positions with the same best
token among those whose two best logits differ by more than 0.05.
"""
import argparse
import ctypes
import json
import os
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


def requantised(model, kind, folder):
    """The file as llama.cpp itself quantises it."""
    out = os.path.join(folder, kind + ".gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind.upper())
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {model} to {kind}")
    return out


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
    p.add_argument("--by-llama", help="a type such as q4_k_m: llama.cpp quantises the file to it first")
    p.add_argument("--limit", type=int, default=16)
    a = p.parse_args()
    texts = [json.loads(line)["text"] for line in open(a.rows)][: a.limit]
    with tempfile.TemporaryDirectory() as d:
        rows = os.path.join(d, "rows.jsonl")
        with open(rows, "w") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        model = requantised(a.model, a.by_llama, d) if a.by_llama else a.model
        mine = ours(model, rows, a.dtype, a.adapter)
        sequences = [[2] + ids for ids in ids_of(model, texts)]
        theirs = peers(model, sequences, a.lora, a.kv)
        print(json.dumps(compare(mine.reshape(theirs.shape), theirs)))


if __name__ == "__main__":
    main()
