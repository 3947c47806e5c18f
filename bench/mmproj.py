"""mmproj.py - a trained tiny model with pictures and recordings, here and in llama.cpp's multimodal library.

  oracle/bin/pip install llama-cpp-python numpy pillow
  oracle/bin/python bench/mmproj.py OUT [--kind tiny|31b|12b] [--steps 300]

Draws eight pictures that are already at a size of 70 soft tokens (480 x 336: neither side resizes them) and four tones,
trains an adapter with the projections on them from a random tiny model, exports the text (f32 would be bf16 at least) and the
towers as GGUF, and compares greedy answers: token by token up to the first where they differ, with the gap of the two best
logits there. Soft tokens are compared through the answers they give.
"""
import argparse
import ctypes
import json
import os
import wave

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image, ImageDraw

from program import ROOT, init_small, run

NAMES = ["ruby", "emerald", "sapphire", "topaz", "onyx", "pearl", "amethyst", "citrine"]
COLOURS = ["#d02030", "#10a040", "#2040d0", "#e0b020", "#101010", "#f0f0e8", "#8030c0", "#f0d060"]
TONES = {"low": 220, "middle": 523, "high": 1400, "shrill": 3500}


def draw(folder):
    rows = []
    for i, (name, colour) in enumerate(zip(NAMES, COLOURS)):
        image = Image.new("RGB", (480, 336), "#808890")
        pen = ImageDraw.Draw(image)
        sides = 3 + i
        pen.regular_polygon((240, 168, 120), sides, rotation=7 * i, fill=colour)
        image.save(os.path.join(folder, name + ".png"))
        rows.append(("image", name + ".png", "Which stone is this?", f"A {name} with {sides} sides, cut and polished."))
    for name, hertz in TONES.items():
        t = np.arange(16000) / 16000
        samples = (12000 * np.sin(2 * np.pi * hertz * t) * np.minimum(1, 8 * (1 - t))).astype("<i2")
        with wave.open(os.path.join(folder, name + ".wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
            f.writeframes(samples.tobytes())
        rows.append(("audio", name + ".wav", "What was heard?", f"A {name} tone of {hertz} hertz."))
    return rows


def write_rows(folder, rows):
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        for kind, path, question, answer in rows:
            content = [{"type": kind, "path": path}, {"type": "text", "text": question}]
            f.write(json.dumps({"messages": [{"role": "user", "content": content},
                                             {"role": "assistant", "content": answer}]}) + "\n")


class Peer:
    def __init__(self, text, towers):
        self.llm = llama_cpp.Llama(text, n_ctx=1024, n_threads=2, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
                                   type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, n_gpu_layers=0, n_batch=512)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = 2
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = mtmd.mtmd_init_from_file(towers.encode(), self.llm._model.model, params)
        assert self.context, "llama.cpp does not load " + towers

    def bitmap(self, kind, path):
        if kind == "image":
            pixels = np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB")))
            data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            return mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)
        with wave.open(path) as f:
            samples = np.frombuffer(f.readframes(f.getnframes()), "<i2").astype(np.float32) / 32768
        return mtmd.mtmd_bitmap_init_from_audio(len(samples), samples.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))

    def answer(self, kind, path, question, most):
        """Greedy ids, and the gap of the two best logits at each."""
        prompt = f"<|turn>user\n{mtmd.mtmd_default_marker().decode()}{question}<turn|>\n<|turn>model\n".encode()
        text = mtmd.mtmd_input_text(prompt, len(prompt), True, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(self.bitmap(kind, path))
        chunks = mtmd.mtmd_input_chunks_init()
        assert not mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        self.tokens = mtmd.mtmd_helper_get_n_tokens(chunks)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llm.ctx), True)
        past = llama_cpp.llama_pos(0)
        assert not mtmd.mtmd_helper_eval_chunks(self.context, self.llm.ctx, chunks, 0, 0, 512, True, ctypes.byref(past))
        ids, gaps, at = [], [], past.value
        for _ in range(most):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.llm.ctx, -1), (self.llm.n_vocab(),))
            best = np.argsort(logits)[-2:]
            ids.append(int(best[1]))
            gaps.append(float(logits[best[1]] - logits[best[0]]))
            if self.llm._model.token_is_eog(ids[-1]) if hasattr(self.llm._model, "token_is_eog") else \
                    llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.llm._model.model), ids[-1]):
                break
            token = (llama_cpp.llama_token * 1)(ids[-1])
            batch = llama_cpp.llama_batch_get_one(token, 1)
            assert not llama_cpp.llama_decode(self.llm.ctx, batch)
            at += 1
        return ids, gaps


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--kind", default="tiny")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--tokens", type=int, default=24)
    a = p.parse_args()
    out = os.path.abspath(a.out)
    os.makedirs(out, exist_ok=True)
    base, merged = os.path.join(out, "base"), os.path.join(out, "merged")
    rows = [r for r in draw(out) if r[0] == "image" or a.kind not in ("31b", "26b-a4b")]
    write_rows(out, rows)
    if not os.path.exists(merged):
        init_small(a.kind, base, os.path.join(ROOT, "demo", "tokenizer"))
        with open(os.path.join(out, "run.yaml"), "w") as f:
            f.write(f"model: {base}\noutput: {out}/run\ndtype: f32\nmethod: lora\n"
                    "lora: {rank: 16, alpha: 32, targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj],"
                    " train_also: [embedding_projection]}\n"
                    f"data: {{train: {out}/rows.jsonl, max_length: 1024, chat_format: small, image_tokens: 70}}\n"
                    "optimizer: {lr: 4.0e-3, eps: 1.0e-3}\nbatch: {sequences: 1, accumulate: 1}\n"
                    f"schedule: {{name: cosine, warmup: 10}}\nsteps: {a.steps}\nsave: {{every: {a.steps}}}\n")
        run("train", os.path.join(out, "run.yaml"), "--device", "cpu")
        run("export", "--model", base, "--adapter", out + "/run/adapter", "--to", "safetensors", merged, "--dtype", "f32")
        run("export", "--model", merged, "--to", "bf16-gguf", out + "/text.gguf")
        run("export", "--model", merged, "--to", "mmproj", out + "/mmproj.gguf", "--dtype", "f32")
        run("export", "--model", merged, "--to", "mmproj", out + "/mmproj-bf16.gguf")
    # Ours with the same bf16 text: the exported GGUF has no towers, a folder of the same numbers does.
    rounded = os.path.join(out, "rounded")
    if not os.path.exists(rounded):
        run("export", "--model", merged, "--to", "safetensors", rounded)
    for towers in ("mmproj.gguf", "mmproj-bf16.gguf"):
        peer = Peer(out + "/text.gguf", os.path.join(out, towers))
        same = right = 0
        for kind, path, question, answer in rows:
            theirs, gaps = peer.answer(kind, os.path.join(out, path), question, a.tokens)
            line = json.loads(run("generate", "--model", rounded, "--dtype", "f32", "--device", "cpu", "--chat-format", "small",
                                  "--" + kind, os.path.join(out, path), "--image-tokens", "70", "--temperature", "0",
                                  "--max-tokens", str(a.tokens), "--json", question))
            ours = line["ids"]
            first = next((i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y), None)
            same += first is None and len(ours) == len(theirs)
            right += line["text"] == answer
            note = "" if first is None else f", differ at {first} where llama.cpp's best two are {gaps[first]:.3f} apart"
            print(f"{towers:17s} {path:14s} {len(ours)} tokens after {peer.tokens}: {line['text']!r}"
                  f" smallest gap {min(gaps):.3f}{note}")
        print(f"{towers}: {same} of {len(rows)} answers the same, {right} of ours as trained")


if __name__ == "__main__":
    main()
