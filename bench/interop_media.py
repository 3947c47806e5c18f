"""interop_media.py - adapters on towers and projections, ours in peft and in transformers.

  oracle/bin/python bench/interop_media.py OUT

For small models of three kinds (E2B's with both towers, 31B's standardised, 12B's without towers): an adapter on every linear
of text and towers with the projections beside it trains for a few steps, is saved and merged; a row with a picture (and a
recording) is scored here and by the reference, which gets pixels and features made by its own extractors.
"""
import argparse
import json
import os
import wave

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from program import ROOT, init_small, run

TARGETS = {
    "tiny": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_proj.linear", "o_proj.linear",
             "mlp.down_proj.linear", "patch_embedder.input_proj", "ffw_layer_1.linear", "lconv1d.linear_start.linear",
             "self_attn.post.linear", "relative_k_proj"],
    "31b": ["q_proj", "v_proj", "q_proj.linear", "v_proj.linear", "gate_proj.linear"],
    "12b": ["q_proj", "v_proj", "patch_dense"],
}


def draw(folder):
    rng = np.random.default_rng(4)
    Image.fromarray(rng.integers(0, 256, (336, 480, 3), dtype=np.uint8)).save(os.path.join(folder, "noise.png"))
    samples = (rng.normal(0, 3000, 9000)).astype("<i2")
    with wave.open(os.path.join(folder, "noise.wav"), "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
        f.writeframes(samples.tobytes())


def inputs_of(folder, kind, hears):
    side = 48 if kind == "12b" else 16
    picture = np.asarray(Image.open(os.path.join(folder, "noise.png")))
    h, w = picture.shape[0] // side, picture.shape[1] // side
    patches = picture.reshape(h, side, w, side, 3).swapaxes(1, 2).reshape(1, h * w, -1).astype(np.float32) / 255
    places = np.stack([np.tile(np.arange(w), h), np.repeat(np.arange(h), w)], 1)[None]
    inputs = dict(pixel_values=torch.tensor(patches), image_position_ids=torch.tensor(places))
    if hears:
        with wave.open(os.path.join(folder, "noise.wav")) as f:
            samples = np.frombuffer(f.readframes(f.getnframes()), "<i2").astype(np.float32) / 32768
        if kind == "12b":
            n = -(-len(samples) // 640)
            features = np.pad(samples, (0, n * 640 - len(samples))).reshape(1, n, 640)
            inputs.update(input_features=torch.tensor(features), input_features_mask=torch.ones(1, n, dtype=torch.bool))
        else:
            done = Gemma4AudioFeatureExtractor()([samples], sampling_rate=16000, return_tensors="pt")
            inputs.update(input_features=done["input_features"], input_features_mask=done["input_features_mask"].bool())
    return inputs


def check(out, kind):
    folder = os.path.join(out, kind)
    os.makedirs(folder, exist_ok=True)
    base, hears = os.path.join(folder, "base"), kind != "31b"
    draw(folder)
    init_small(kind, base, os.path.join(ROOT, "demo", "tokenizer"))
    content = [{"type": "image", "path": "noise.png"}] + ([{"type": "audio", "path": "noise.wav"}] if hears else [])
    messages = [{"role": "user", "content": content + [{"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "Noise, seen and heard."}]
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        f.write(json.dumps({"messages": messages}) + "\n")
    with open(os.path.join(folder, "run.yaml"), "w") as f:
        f.write(f"model: {base}\noutput: {folder}/run\ndtype: f32\nmethod: lora\n"
                f"lora: {{rank: 4, alpha: 8, targets: [{', '.join(TARGETS[kind])}], train_also: [embedding_projection]}}\n"
                f"data: {{train: {folder}/rows.jsonl, max_length: 1024, chat_format: small, image_tokens: 70}}\n"
                "optimizer: {lr: 2.0e-2}\nschedule: {name: constant, warmup: 0}\nsteps: 4\n")
    run("train", folder + "/run.yaml", "--device", "cpu")
    adapter, merged = folder + "/run/adapter", folder + "/merged"
    run("export", "--model", base, "--adapter", adapter, "--to", "safetensors", merged, "--dtype", "f32")

    def ours(*model):
        line = run("score", *model, "--dtype", "f32", "--device", "cpu", "--chat-format", "small", "--image-tokens", "70",
                   "--data", folder + "/rows.jsonl")
        return json.loads(line)["token_nll"]

    rendered = json.loads(run("tokenize", "--model", base, "--chat", "--chat-format", "small", "--data", folder + "/rows.jsonl"))
    inputs = inputs_of(folder, kind, hears)
    text = rendered["text"].replace("<|image|>", "<|image>" + "<|image|>" * 70 + "<image|>")
    if hears:
        frames = int(inputs["input_features_mask"].sum())
        text = text.replace("<|audio|>", "<|audio>" + "<|audio|>" * (frames if kind == "12b" else -(-frames // 4)) + "<audio|>")
    ids = PreTrainedTokenizerFast(tokenizer_file=base + "/tokenizer.json")(text, add_special_tokens=False)["input_ids"]

    def theirs(model):
        c = model.config
        kinds = torch.tensor([[{c.image_token_id: 1, c.audio_token_id: 3}.get(i, 0) for i in ids]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), mm_token_type_ids=kinds, use_cache=False, **inputs).logits[0].float()
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()

    def load(path):
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    def largest(a, b):
        assert len(a) == len(b), (len(a), len(b))
        return max(abs(x - y) for x, y in zip(a, b) if x is not None and y is not None)

    plain = ours("--model", base)
    result = {"kind": kind, "tokens": len(ids), "base": largest(plain, theirs(load(base))),
              "adapter_in_peft": largest(ours("--model", base, "--adapter", adapter),
                                         theirs(PeftModel.from_pretrained(load(base), adapter).eval())),
              "merged_in_transformers": largest(ours("--model", merged), theirs(load(merged))),
              "merged_and_adapter": largest(ours("--model", base, "--adapter", adapter), ours("--model", merged)),
              "adapter_changes_nll_by": largest(ours("--model", base, "--adapter", adapter), plain)}
    print(json.dumps(result))
    return max(result[k] for k in ("base", "adapter_in_peft", "merged_in_transformers", "merged_and_adapter"))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--kinds", nargs="*", default=list(TARGETS))
    a = p.parse_args()
    worst = max(check(os.path.abspath(a.out), kind) for kind in a.kinds)
    print(f"worst {worst:.2e}")
    raise SystemExit(int(worst > 1e-3))


if __name__ == "__main__":
    main()
