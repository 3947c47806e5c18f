"""media.py - rows with media through lapidary score and serve (the openai client), and through transformers.

  oracle/bin/pip install -r tests/oracle/requirements.txt pillow soxr soundfile av openai
  oracle/bin/python bench/media.py MODEL DATA

Videos: frames and times as transformers' processor chooses them (its pixels are torchvision's resizing, a level or two
beside Pillow's; here frames are resized by Pillow, which Lapidary equals bit for bit).

MODEL: a checkpoint with towers (lapidary init tiny OUT --media --tokenizer DIR --dtype f32). DATA: a folder
with images/, charts/, audio/ and video/. The chat is rendered by `lapidary tokenize --chat`; everything after
that, placeholders to slots, pixels, features, the forward pass, is transformers' own.
"""
import argparse
import base64
import json
import os
import re
import subprocess
import sys
import tempfile

import av
import numpy as np
import openai
import soundfile
import soxr
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.video_utils import VideoMetadata

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
    "video": user_row(part("video", "video/car-detection.mp4"), text("What moves?")),
    "video, image": user_row(part("video", "video/bottle-detection.mp4"), part("image", "images/rocket.jpg"), text("Both?")),
    "two tools": tool_row([text("One."), part("image", "charts/arc_pie.png")], [part("audio", "audio/spk2_snt1.wav")]),
}


def sound(name, seconds):
    """The start of a recording, or as much of it again and again, as a file of so many seconds."""
    samples, rate = soundfile.read(os.path.join(data, "audio/jfk.wav"), dtype="int16")
    path = os.path.join(made.name, name)
    soundfile.write(path, np.resize(samples, int(seconds * rate)), rate)
    return {"type": "audio", "path": path}


made = tempfile.TemporaryDirectory()
ROWS["audio of 0.2 s"] = user_row(sound("short.wav", 0.2), text("What is said?"))
ROWS["audio of 35 s"] = user_row(sound("long.wav", 35), text("What is said?"))  # the first 30 are heard


def run(*arguments, stdin=None):
    out = subprocess.run([options.lapidary, *arguments], input=stdin, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return out.stdout


def read_video(path):
    """The frames that the processor would choose, as pictures, and the second each is of."""
    with av.open(path) as clip:
        frames = [f.to_image() for f in clip.decode(video=0)]
        fps = float(clip.streams.video[0].average_rate)
    metadata = VideoMetadata(total_num_frames=len(frames), fps=fps, duration=len(frames) / fps)
    chosen = Gemma4VideoProcessor().sample_frames(metadata)
    return [frames[i] for i in chosen], [i / fps for i in chosen]


def read_media(messages, inputs, config):
    """Pixels and features as transformers' processors make them; the slots of each."""
    images, sounds, videos, slots = [], [], [], []
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
            elif p["type"] == "video":
                videos.append(read_video(p["path"]))
                slots.append(("video", len(videos) - 1))
    counts = {}
    if videos:
        done = [Gemma4ImageProcessorPil(max_soft_tokens=70)(frames, return_tensors="pt") for frames, _ in videos]
        inputs.update(pixel_values_videos=torch.cat([d["pixel_values"] for d in done]),
                      video_position_ids=torch.cat([d["image_position_ids"] for d in done]),
                      num_frames_per_video=torch.tensor([len(frames) for frames, _ in videos]))
        counts["video"] = [(times, int((d["image_position_ids"][0] >= 0).all(-1).sum()) // 9)
                           for d, (_, times) in zip(done, videos)]
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
        if kind == "video":
            times, n = n
            groups = [f"{int(t) // 60:02d}:{int(t) % 60:02d} <|image>{'<|video|>' * n}<image|>" for t in times]
            slot, run = "<|video|>", " ".join(groups)
        else:
            begin, slot, end = marks[kind]
            run = begin + slot * n + end
        found = rendered.index(slot, at)
        out += rendered[at:found] + run
        at = found + len(slot)
    return out + rendered[at:]


def served(messages):
    """The messages as OpenAI's clients send them: pictures and sound in data URLs, videos as files of --media."""
    def send(p):
        if p["type"] not in ("image", "audio"):
            return p
        with open(p["path"], "rb") as f:
            data = base64.b64encode(f.read()).decode()
        if p["type"] == "image":
            return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [dict(m, content=[send(p) for p in m["content"]]) if isinstance(m["content"], list) else m for m in messages]


class Reference:
    def __init__(self, path):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(path, "tokenizer.json"))
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        self.config = self.model.config

    def ids(self, messages, slots, **more):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
            f.write(json.dumps({"messages": messages, **more}) + "\n")
            f.flush()
            rendered = json.loads(run("tokenize", "--model", options.model, "--chat", "--chat-format", "small", "--data", f.name))
        return self.tokenizer(expand(rendered["text"], slots), add_special_tokens=False)["input_ids"]

    def kinds(self, ids):
        c = self.config
        return [{c.image_token_id: 1, c.video_token_id: 2, c.audio_token_id: 3}.get(i, 0) for i in ids]

    def logits(self, ids, inputs, last=0):
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]), mm_token_type_ids=torch.tensor([self.kinds(ids)]), use_cache=False,
                              logits_to_keep=last, **inputs).logits[0].float()

    def greedy(self, ids, inputs, most):
        ends = self.config.eos_token_id
        out = []
        while len(out) < most and not (out and out[-1] in (ends if isinstance(ends, list) else [ends])):
            out.append(int(self.logits(ids + out, inputs, 1)[-1].argmax()))
        return out


def nlls(reference, name, messages, slots, inputs):
    """The largest difference of a token's loss."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write(json.dumps({"messages": messages}) + "\n")
        f.flush()
        token = json.loads(run("score", "--model", options.model, "--dtype", "f32", "--chat-format", "small", "--device", "cpu",
                               "--data", f.name))["token_nll"]
    ids = reference.ids(messages, slots)
    kinds = reference.kinds(ids)
    logits = reference.logits(ids, inputs)
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").numpy()
    assert len(token) == len(nll), (name, len(token), len(nll))
    assert all((t is None) == (k > 0) for t, k in zip(token, kinds[1:])), name
    error = max(abs(t - n) / max(1, abs(n)) for t, n in zip(token, nll) if t is not None)
    print(f"{name:18s} {len(ids):5d} tokens, {sum(k > 0 for k in kinds):4d} soft: largest difference {error:.2e}", end="")
    return error


def main():
    reference, worst, same = Reference(options.model), 0.0, 0
    server = subprocess.Popen([options.lapidary, "serve", "--model", options.model, "--port", "0", "--dtype", "f32",
                               "--chat-format", "small", "--media", data, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)/", server.stderr.readline()).group(1))
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for name, messages in ROWS.items():
            inputs = {}
            slots = read_media(messages, inputs, reference.config)
            worst = max(worst, nlls(reference, name, messages, slots, inputs))
            ids = reference.ids(messages[:-1], slots, add_generation_prompt=True)
            theirs = reference.tokenizer.decode(reference.greedy(ids, inputs, options.tokens), skip_special_tokens=True).strip()
            answer = client.chat.completions.create(model=client.models.list().data[0].id, messages=served(messages[:-1]),
                                                    temperature=0, max_tokens=options.tokens)
            ours = (answer.choices[0].message.content or "").strip()
            same += ours == theirs and answer.usage.prompt_tokens == len(ids)
            print(f"; served {'the same' if ours == theirs else repr(ours) + ' for ' + repr(theirs)}")
    finally:
        server.terminate()
        server.wait()
    print(f"worst {worst:.2e}; {same} of {len(ROWS)} answers of the server the same")
    sys.exit(int(worst > 1e-4 or same < len(ROWS)))


if __name__ == "__main__":
    main()
