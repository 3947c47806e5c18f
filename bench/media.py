"""media.py - rows with media through lapidary score and generate, and through transformers.

  oracle/bin/pip install -r tests/oracle/requirements.txt pillow soxr soundfile av
  oracle/bin/python bench/media.py MODEL DATA

MODEL: a checkpoint with towers (lapidary init tiny OUT --media --tokenizer DIR --dtype f32). DATA: a folder
with images/, charts/, audio/ and video/. The chat is rendered by `lapidary tokenize --chat`; everything after
that, placeholders to slots, pixels, features, the forward pass, is transformers' own.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("--lapidary", default=os.path.join(os.path.dirname(__file__), "..", "lapidary"))
parser.add_argument("--tokens", type=int, default=12, help="of the greedy continuation")
options = parser.parse_args()
data = os.path.abspath(options.data)


def part(kind, name):
    return {"type": kind, "path": os.path.join(data, name)}


def text(value):
    return {"type": "text", "text": value}


def tool_row(*results):
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": f"look{i}", "arguments": {"at": i}}}
             for i in range(len(results))]
    tools = [{"role": "tool", "tool_call_id": f"c{i}", "name": f"look{i}", "content": c} for i, c in enumerate(results)]
    return [{"role": "user", "content": "What is there?"}, {"role": "assistant", "content": "", "tool_calls": calls},
            *tools, {"role": "assistant", "content": "A quartz crystal, I think."}]


def user_row(*content):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Rutile in quartz."}]


ROWS = {
    "image": user_row(part("image", "images/rocket.jpg"), text("What is this?")),
    "two images": user_row(text("Compare"), part("image", "images/astronaut.png"), part("image", "charts/bar.png"),
                           text("please.")),
    "audio": user_row(part("audio", "audio/jfk.wav"), text("What is said?")),
    "audio of 22 kHz": user_row(part("audio", "audio/LJ050-0131.wav"), text("What is said?")),
    "image, audio": user_row(part("image", "images/page.png"), part("audio", "audio/spk1_snt1.wav"), text("Both.")),
    "tool image": tool_row([part("image", "charts/bar.png"), text("The chart.")]),
    "two tools": tool_row([text("One."), part("image", "charts/arc_pie.png")], [part("audio", "audio/spk2_snt1.wav")]),
}


def run(*arguments, stdin=None):
    out = subprocess.run([options.lapidary, *arguments], input=stdin, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return out.stdout


def read_media(messages, inputs, config):
    """Pixels and features as transformers' processors make them; the slots of each."""
    images, sounds, slots = [], [], []
    for message in messages:
        for p in message["content"] if isinstance(message["content"], list) else []:
            if p["type"] == "image":
                images.append(ImageOps.exif_transpose(Image.open(p["path"])).convert("RGB"))
                slots.append(("image", len(images) - 1))
            elif p["type"] == "audio":
                samples, rate = soundfile.read(p["path"], dtype="float32", always_2d=True)
                samples = samples.mean(1)
                sounds.append(soxr.resample(samples, rate, 16000, quality="HQ") if rate != 16000 else samples)
                slots.append(("audio", len(sounds) - 1))
    counts = {}
    if images:
        done = Gemma4ImageProcessorPil()(images, return_tensors="pt")
        inputs.update(pixel_values=done["pixel_values"], image_position_ids=done["image_position_ids"])
        counts["image"] = ((done["image_position_ids"] >= 0).all(-1).sum(-1) // 9).tolist()
    if sounds:
        done = Gemma4AudioFeatureExtractor()(sounds, sampling_rate=16000, return_tensors="pt")
        inputs.update(input_features=done["input_features"], input_features_mask=done["input_features_mask"].bool())
        counts["audio"] = [-(-int(m) // 4) for m in done["input_features_mask"].sum(-1)]
    return [(kind, counts[kind][i]) for kind, i in slots]


def expand(rendered, slots):
    marks = {"image": ("<|image>", "<|image|>", "<image|>"), "audio": ("<|audio>", "<|audio|>", "<audio|>")}
    out, at = "", 0
    for kind, n in slots:
        begin, slot, end = marks[kind]
        found = rendered.index(slot, at)
        out += rendered[at:found] + begin + slot * n + end
        at = found + len(slot)
    return out + rendered[at:]


tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(options.model, "tokenizer.json"))
model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
config, worst, same = model.config, 0.0, 0
for name, messages in ROWS.items():
    line = json.dumps({"messages": messages}) + "\n"
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write(line)
        f.flush()
        ours = json.loads(run("score", "--model", options.model, "--dtype", "f32", "--chat-format", "small", "--device",
                              "cpu", "--data", f.name))
        rendered = json.loads(run("tokenize", "--model", options.model, "--chat", "--chat-format", "small", "--data",
                                  f.name))["text"]
    inputs = {}
    slots = read_media(messages, inputs, config)
    ids = torch.tensor([tokenizer(expand(rendered, slots), add_special_tokens=False)["input_ids"]])
    kinds = torch.where(ids == config.image_token_id, 1, torch.where(ids == config.audio_token_id, 3, 0))
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs).logits[0].float()
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").numpy()
    token = ours["token_nll"]
    assert len(token) == len(nll), (name, len(token), len(nll))
    assert all((t is None) == (int(k) > 0) for t, k in zip(token, kinds[0, 1:])), name
    error = max(abs(t - n) / max(1, abs(n)) for t, n in zip(token, nll) if t is not None)
    worst = max(worst, error)
    print(f"{name:18s} {ids.shape[1]:5d} tokens, {sum(n for _, n in slots):4d} soft: largest difference {error:.2e}")
print(f"worst {worst:.2e}")
sys.exit(worst > 1e-4)
