"""qat.py - what Q4_0 costs a trained model, and what training through it brings back.

  python bench/qat.py OUT [--epochs N]

Trains the demo's tiny model (every weight, f32) on its minerals, then compares on held-out wordings: the model itself,
plain rounding to Q4_0 (also after training on in f32 for as long as the others), QAT, and QAT-LoRA, each as the q4_0
GGUF that was exported. Prints a table of perplexities.
"""
import argparse
import json
import math
import os
import subprocess

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
PROGRAM = os.path.join(ROOT, "lapidary")
DEMO = os.path.join(ROOT, "demo")


def run(*arguments, out=None):
    return subprocess.run([PROGRAM, *arguments], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def train(config, model, output, *more):
    if not os.path.exists(output):
        data = "base" if config == "base" else "gems"
        extra = [f"data.train={DEMO}/{data}.jsonl"] + ([f"data.eval={DEMO}/gems_eval.jsonl"] if config == "lora" else [])
        run("train", f"{DEMO}/{config}.yaml", f"model={model}", f"output={output}", *extra, *more)


def export(model, out, adapter=None):
    if not os.path.exists(out):
        run("export", "--model", model, *(["--adapter", adapter] if adapter else []), "--to", "q4_0-gguf", out)


def perplexity(model):
    """Over the trained tokens of the held-out rows: the answers."""
    common = ["--model", model, "--chat-format", "small", "--data", f"{DEMO}/gems_eval.jsonl"]
    scores = run("score", "--dtype", "f32", *common).splitlines()
    masks = run("tokenize", "--chat", *common).splitlines()
    total = count = 0
    for score, mask in zip(map(json.loads, scores), map(json.loads, masks)):
        for nll, trained in zip(score["token_nll"], mask["trained"][1:]):
            if trained:
                total, count = total + nll, count + 1
    return math.exp(total / count)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--epochs", default="4")
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    path = lambda name: os.path.join(a.out, name)
    if not os.path.exists(path("start")):
        run("init", "tiny", path("start"), "--tokenizer", f"{DEMO}/tokenizer", "--dtype", "f32")
    train("base", path("start"), path("base"))
    model = path("full/model")
    train("lora", path("base/model"), path("full"), "method=full", "optimizer.lr=1.0e-3", "epochs=8")
    train("lora", model, path("longer"), "method=full", "optimizer.lr=3.0e-4", f"epochs={a.epochs}")
    train("lora", model, path("qat"), "method=qat", "optimizer.lr=3.0e-4", f"epochs={a.epochs}")
    train("lora", model, path("qat-lora"), "method=qat-lora", "optimizer.lr=1.0e-3", f"epochs={a.epochs}")
    learned = "quant.learned_scale=true"
    train("lora", model, path("qat-learned"), "method=qat", learned, "optimizer.lr=3.0e-4", f"epochs={a.epochs}")
    train("lora", model, path("qat-lora-learned"), "method=qat-lora", learned, "optimizer.lr=1.0e-3", f"epochs={a.epochs}")
    export(model, path("plain.gguf"))
    export(path("longer/model"), path("longer.gguf"))
    export(path("qat/model"), path("qat.gguf"))
    export(model, path("qat-lora.gguf"), path("qat-lora/adapter"))
    export(path("qat-learned/model"), path("qat-learned.gguf"))
    export(model, path("qat-lora-learned.gguf"), path("qat-lora-learned/adapter"))
    print(f"{'model':48} {'f32':>10} {'q4_0':>10}")
    lines = [("trained in f32; plain rounding", model, "plain.gguf"),
             ("trained as long again in f32; plain rounding", path("longer/model"), "longer.gguf"),
             ("then qat", None, "qat.gguf"), ("then qat-lora", None, "qat-lora.gguf"),
             ("then qat, learned scales", None, "qat-learned.gguf"),
             ("then qat-lora, learned scales", None, "qat-lora-learned.gguf")]
    for name, folder, file in lines:
        exact = f"{perplexity(folder):10.4f}" if folder else " " * 10
        print(f"{name:48} {exact} {perplexity(path(file)):10.4f}")


main()
