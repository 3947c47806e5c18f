"""program.py - running Lapidary from a benchmark."""
import json
import os
import subprocess
import tempfile

import numpy as np

ROOT = os.path.join(os.path.dirname(__file__), "..")
PROGRAM = os.path.join(ROOT, "lapidary")


def ours(model, rows, dtype, adapter):
    with tempfile.TemporaryDirectory() as d:
        out = os.path.join(d, "logits")
        command = [PROGRAM, "score", "--model", model, "--dtype", dtype, "--data", rows, "--logits", out]
        if adapter:
            command += ["--adapter", adapter]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return np.fromfile(out, dtype=np.float32)


def ids_of(model, texts):
    command = [PROGRAM, "tokenize", "--model", model, "--data", "-"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    out = subprocess.run(command, input=lines, text=True, check=True, capture_output=True).stdout
    return [json.loads(line)["ids"] for line in out.splitlines()]


def small_config(kind, tokenizer):
    """config.json of a small model with everything that makes the kind: tiny (E2B's), 31b, 26b-a4b or 12b."""
    command = [PROGRAM, "init", kind, "--media", "--config"] + (["--layers", "6"] if kind != "tiny" else [])
    config = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if kind == "tiny":
        return config
    words = json.load(open(os.path.join(tokenizer, "tokenizer.json")))
    vocabulary = 1 + max([*words["model"]["vocab"].values(), *(t["id"] for t in words["added_tokens"])])
    text = config["text_config"]
    text.update(vocab_size=vocabulary, vocab_size_per_layer_input=vocabulary, hidden_size=128, num_attention_heads=4,
                num_key_value_heads=2, num_global_key_value_heads=1, head_dim=32, global_head_dim=64, intermediate_size=256,
                max_position_embeddings=4096, sliding_window=64)
    if text.get("num_experts"):
        text.update(num_experts=8, top_k_experts=2, moe_intermediate_size=64)
    vision = config["vision_config"]
    if kind == "12b":
        vision.update(mm_embed_dim=128, output_proj_dims=128)
    else:
        vision.update(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, global_head_dim=16,
                      intermediate_size=128, num_hidden_layers=2)
    return config


def run(*arguments, **more):
    """Standard output; what is wrong ends the script."""
    out = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, **more)
    if out.returncode:
        raise SystemExit(out.stderr)
    return out.stdout


def init_small(kind, out, tokenizer):
    """A checkpoint of small_config's, f32 and random."""
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "config.json")
        with open(path, "w") as f:
            json.dump(small_config(kind, tokenizer), f)
        run("init", "tiny" if kind == "tiny" else path, out, "--tokenizer", tokenizer, "--dtype", "f32",
            *(["--media"] if kind == "tiny" else []))
