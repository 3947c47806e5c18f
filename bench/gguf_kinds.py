"""gguf_kinds.py - our GGUF files of every kind of model in llama.cpp, and where its logits part from ours.

  python bench/gguf_kinds.py OUT

Trains tiny models on the demo's corpus (shared K/V with per-layer inputs; K as V; experts), exports each to bf16, q8_0
and q4_0, and compares logits of held-out rows. Of the bf16 file it also says how far the reference itself moves when it
computes as llama.cpp does: GELU by a table of f16, inputs of products rounded to bf16.
"""
import argparse
import json
import os
import subprocess

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gguf_parity import compare, peers
from program import ROOT, ids_of, ours

PROGRAM = os.path.join(ROOT, "lapidary")
DEMO = os.path.join(ROOT, "demo")
COMMON = {
    "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "vocab_size": 1024, "vocab_size_per_layer_input": 1024,
    "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "global_head_dim": 64, "num_key_value_heads": 2,
    "intermediate_size": 384, "sliding_window": 128, "max_position_embeddings": 4096, "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    "tie_word_embeddings": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False,
    "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
                        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}}
KINDS = {
    "shared": {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "layers": 6},
    "dense": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "layers": 4},
    "experts": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 8,
                "top_k_experts": 2, "moe_intermediate_size": 64, "layers": 4}}


def run(*arguments):
    subprocess.run([PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(kind, out):
    config = COMMON | KINDS[kind]
    layers = config.pop("layers")
    full = {2, 5} if layers == 6 else {1, 3}
    config |= {"num_hidden_layers": layers, "layer_types": [("full" if i in full else "sliding") + "_attention" for i in range(layers)]}
    os.makedirs(out, exist_ok=True)
    path = lambda name: os.path.join(out, name)
    if not os.path.exists(path("tuned/model")):
        with open(path("config.json"), "w") as f:
            json.dump(config, f)
        run("init", path("config.json"), path("start"), "--tokenizer", f"{DEMO}/tokenizer", "--dtype", "f32")
        run("train", f"{DEMO}/base.yaml", f"model={path('start')}", f"output={path('base')}", f"data.train={DEMO}/base.jsonl")
        run("train", f"{DEMO}/lora.yaml", f"model={path('base/model')}", f"output={path('tuned')}", "method=full",
            "optimizer.lr=1.0e-3", f"data.train={DEMO}/gems.jsonl", "data.eval=null", "eval_every=null")
    for to in ("bf16", "q8_0", "q4_0"):
        if not os.path.exists(path(to + ".gguf")):
            run("export", "--model", path("tuned/model"), "--to", to + "-gguf", path(to + ".gguf"))
    if not os.path.exists(path("dense")):
        run("export", "--model", path("bf16.gguf"), "--to", "safetensors", "--dtype", "f32", path("dense"))
    return path


def reference(folder, sequences, table, inputs):
    """Logits of transformers in f32, with llama.cpp's GELU table, with its rounded inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules():
        if table and hasattr(module, "act_fn"):
            module.act_fn.register_forward_pre_hook(lambda _, x: (x[0].half().float(),))
            module.act_fn.register_forward_hook(lambda _, x, y: y.half().float())
        if inputs and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x: (x[0].bfloat16().float(),))
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([ids])).logits[0, :-1].numpy() for ids in sequences])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    a = parser.parse_args()
    with open(f"{DEMO}/gems_eval.jsonl") as f:
        chats = [json.loads(line)["messages"] for line in f][:24]
    texts = ["".join(f"<|turn>{'model' if m['role'] == 'assistant' else m['role']}\n{m['content']}<turn|>\n" for m in chat) for chat in chats]
    for kind in KINDS:
        path = train(kind, os.path.join(a.out, kind))
        rows = path("rows.jsonl")
        with open(rows, "w") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        sequences = [[2] + ids for ids in ids_of(path("tuned/model"), texts)]
        for to in ("bf16", "q8_0", "q4_0"):
            theirs = peers(path(to + ".gguf"), sequences, None, "f32")
            mine = ours(path(to + ".gguf"), rows, "f32", None).reshape(theirs.shape)
            print(json.dumps({"model": kind, "file": to} | compare(mine, theirs)), flush=True)
            if to == "bf16":
                difference = lambda x, y: float(np.abs(x - y).mean())
                plain, both = reference(path("dense"), sequences, False, False), reference(path("dense"), sequences, True, True)
                print(json.dumps({
                    "model": kind, "ours, transformers": difference(mine, plain),
                    "transformers, with the GELU table": difference(plain, reference(path("dense"), sequences, True, False)),
                    "transformers, with rounded inputs": difference(plain, reference(path("dense"), sequences, False, True)),
                    "transformers, with both": difference(plain, both), "transformers with both, llama.cpp": difference(both, theirs)}), flush=True)


if __name__ == "__main__":
    main()
