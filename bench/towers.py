"""towers.py - seconds of the vision and audio towers beside transformers, on the same machine in the same run.

  oracle/bin/python bench/towers.py MODEL [--rounds N]

MODEL: a checkpoint with towers, for example `lapidary init e2b OUT --media --layers 2 --tokenizer DIR`: the
towers are full-size whatever the text model is. A picture of 280 soft tokens, 30 seconds of sound, bf16.
"""
import argparse
import json
import os
import subprocess
import time

import torch
from transformers import AutoModelForImageTextToText

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--lapidary", default=os.path.join(os.path.dirname(__file__), "..", "lapidary"))
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()

torch.set_num_threads(os.cpu_count())
model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16).eval().model
w, h = 60, 42  # patches: 20 x 14 cells
places = torch.stack([torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)], 1)[None]
pixels = torch.rand(1, w * h, 768)
features, mask = torch.randn(1, 2999, 128), torch.ones(1, 2999, dtype=torch.bool)


def timed(work):
    start = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - start


def ours():
    out = subprocess.run([options.lapidary, "bench", "towers", "--model", options.model, "--device", "cpu"],
                         capture_output=True, text=True, check=True).stdout
    return json.loads(out)


best = {}
for _ in range(options.rounds):  # in turns: the machine's speed changes
    mine = ours()
    theirs = {"picture_s": timed(lambda: model.get_image_features(pixels, image_position_ids=places)),
              "sound_s": timed(lambda: model.get_audio_features(features, mask)) if model.audio_tower else None}
    for key in ("picture_s", "sound_s"):
        for who, figures in (("lapidary", mine), ("transformers", theirs)):
            if figures.get(key):
                best[who, key] = min(best.get((who, key), 1e9), figures[key])
for key in ("picture_s", "sound_s"):
    if ("transformers", key) in best and ("lapidary", key) in best:
        a, b = best["lapidary", key], best["transformers", key]
        print(f"{key[:-2]:8s} lapidary {a:.3f} s, transformers {b:.3f} s: {b / a:.2f} times as fast")
