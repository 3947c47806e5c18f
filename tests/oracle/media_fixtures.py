"""media_fixtures.py - writes tests/fixtures/media_*.h5: tiny models with towers, from the reference.

  oracle/bin/python tests/oracle/media_fixtures.py [kind ...]

Each file holds the model (model.safetensors, config.json), one sequence with pictures of two sizes, a
video of two frames and, where the model hears, a recording; the raw pixels and features; the sequence's
token NLLs, the gradient of their mean for every parameter, towers included; and a greedy continuation.
"""
import os
import sys
import tempfile

import h5py
import numpy as np
import torch
from transformers import AutoModelForImageTextToText, CONFIG_MAPPING

sys.path.insert(0, os.path.dirname(__file__))
from make_fixtures import OUT, file_bytes, save_grads  # noqa: E402
from models import COMMON, KINDS, VOCAB  # noqa: E402

IMAGE, VIDEO, AUDIO, BOI, EOI, BOA, EOA = range(70, 77)
PATCH, CELL = 4, 3
SIDE = PATCH * CELL

TOWER = dict(model_type="gemma4_vision", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8, global_head_dim=8, intermediate_size=24, patch_size=PATCH,
             pooling_kernel_size=CELL, position_embedding_size=32, rms_norm_eps=1e-6,
             rope_parameters=dict(rope_theta=100.0, rope_type="default"))
HEARING = dict(model_type="gemma4_audio", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
               subsampling_conv_channels=[128, 4], conv_kernel_size=5, output_proj_dims=20,
               attention_chunk_size=12, attention_context_left=13, attention_context_right=0,
               use_clipped_linears=True)

MODELS = {
    "e2b": ("gemma4", dict(vision_config=dict(TOWER, use_clipped_linears=True, standardize=False),
                           audio_config=HEARING)),
    "31b": ("gemma4", dict(vision_config=dict(TOWER, use_clipped_linears=False, standardize=True),
                           audio_config=None)),
    "12b": ("gemma4_unified", dict(
        vision_config=dict(model_type="gemma4_unified_vision", patch_size=PATCH, pooling_kernel_size=CELL,
                           model_patch_size=SIDE, mm_embed_dim=24, output_proj_dims=24, mm_posemb_size=16,
                           num_soft_tokens=280),
        audio_config=dict(model_type="gemma4_unified_audio", audio_embed_dim=10, hidden_size=10,
                          output_proj_dims=10, audio_samples_per_token=10))),
}


def build(kind, seed=5):
    model_type, parts = MODELS[kind]
    text_type, keys = KINDS[kind]
    text = dict(COMMON, **keys, model_type=text_type)
    if kind != "e2b":
        text["use_bidirectional_attention"] = "vision"
    config = CONFIG_MAPPING[model_type](text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
                                        audio_token_id=AUDIO, boi_token_id=BOI, eoi_token_id=EOI,
                                        boa_token_id=BOA, eoa_token_id=EOA, **parts)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if "inv_freq" in name or "embed_scale" in name or "timescales" in name or p.numel() == 0:
                continue
            if name.endswith("layer_scalar"):
                p.uniform_(0.6, 1.1)
            elif name.endswith(("input_min", "output_min")):
                p.fill_(-2.25)
            elif name.endswith(("input_max", "output_max")):
                p.fill_(2.125)
            elif name.endswith("std_bias") or name.endswith(".bias") or "per_dim_scale" in name:
                p.normal_(0, 0.3)
            elif "norm" in name or "_ln" in name or name.endswith("scale"):
                p.uniform_(0.7, 1.3)
            elif p.dim() >= 2:
                p.normal_(0, 0.18)
    return model.eval()


def cut(picture, side):
    """(h, w, 3) bytes -> patches (n, 3 side^2) in [0, 1], places (n, 2) as x, y, line by line."""
    h, w = picture.shape[0] // side, picture.shape[1] // side
    patches = picture.reshape(h, side, w, side, 3).swapaxes(1, 2).reshape(h * w, -1)
    places = np.stack([np.tile(np.arange(w), h), np.repeat(np.arange(h), w)], 1)
    return patches.astype(np.float32) / 255, places


def padded(pictures, side):
    """As the reference's image processor hands them over: padded to the largest."""
    cuts = [cut(p, side) for p in pictures]
    most = max(len(c[0]) for c in cuts)
    values = np.zeros((len(cuts), most, cuts[0][0].shape[1]), np.float32)
    places = np.full((len(cuts), most, 2), -1)
    for i, (v, xy) in enumerate(cuts):
        values[i, :len(v)], places[i, :len(v)] = v, xy
    return torch.tensor(values), torch.tensor(places)


def make(kind):
    model = build(kind)
    unified, hears = kind == "12b", kind != "31b"
    rng = np.random.default_rng(3)
    picture = lambda h, w: rng.integers(0, 256, (h * SIDE, w * SIDE, 3), dtype=np.uint8)
    images, frames = [picture(2, 3), picture(1, 1)], [picture(1, 2), picture(1, 2)]
    side = SIDE if unified else PATCH
    pixels, places = padded(images, side)
    video, video_places = padded(frames, side)
    inputs = dict(pixel_values=pixels, image_position_ids=places, pixel_values_videos=video,
                  video_position_ids=video_places, num_frames_per_video=torch.tensor([2]))
    slots = 0
    if hears:
        features = rng.normal(0, 1, (4 if unified else 19, 10 if unified else 128)).astype(np.float32)
        slots = 4 if unified else 5
        inputs.update(input_features=torch.tensor(features)[None],
                      input_features_mask=torch.ones(1, len(features), dtype=torch.bool))
    text = lambda n: rng.integers(3, 70, n).tolist()
    ids = [2] + text(4) + [BOI] + [IMAGE] * 6 + [EOI] + text(3) + [BOI] + [IMAGE] + [EOI] + text(2)
    ids += [BOI] + [VIDEO] * 2 + [EOI] + text(1) + [BOI] + [VIDEO] * 2 + [EOI] + text(2)
    ids += ([BOA] + [AUDIO] * slots + [EOA] if slots else []) + text(6)
    ids = torch.tensor(ids)[None]
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, torch.where(ids == AUDIO, 3, 0)))
    with h5py.File(os.path.join(OUT, f"media_{kind}.h5"), "w") as f:
        with tempfile.TemporaryDirectory() as d:
            model.save_pretrained(d)
            f["model.safetensors"] = file_bytes(os.path.join(d, "model.safetensors"))
            f["config.json"] = file_bytes(os.path.join(d, "config.json"))
        f["ids"] = ids[0].numpy().astype(np.int32)
        f["lengths"] = np.array([ids.shape[1]], dtype=np.int32)
        for i, p in enumerate(images + frames):
            f[f"picture{i}"] = p
        if hears:
            f["features"] = features
        out = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs)
        nll = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:], reduction="none")
        nll.mean().backward()
        f["nll"] = nll.detach().numpy()
        save_grads(f.create_group("grad"), model)
        for name in [n for n in f["grad"] if "embed_vision." in n and unified]:  # as the file names them
            stored = name.replace(".multimodal_embedder", "") if "projection" in name else \
                name.replace("embed_vision", "vision_embedder")
            f["grad"].move(name, stored)
        with torch.no_grad():
            f["answer"] = model.generate(input_ids=ids, mm_token_type_ids=kinds, do_sample=False, max_new_tokens=12,
                                         attention_mask=torch.ones_like(ids), eos_token_id=None,
                                         **inputs)[0, ids.shape[1]:].numpy().astype(np.int32)
        print(kind, ids.shape[1], float(nll.mean()), f["answer"][:])


def formula(t, count):
    """Numbers in [-1, 1) of stream t, as tests/model/test_media.c makes them."""
    h = np.arange(count, dtype=np.uint64) + 0x9e3779b9 * (t + 1) & 0xffffffff
    h ^= h >> 16
    h = h * 0x7feb352d & 0xffffffff
    h ^= h >> 15
    h = h * 0x846ca68b & 0xffffffff
    h ^= h >> 16
    return (h / 2147483648.0 - 1.0).astype(np.float32)


def make_long():
    """media_long.h5: 30 seconds of sound (features by formula) through the model of media_e2b.h5: losses and gradients."""
    with tempfile.TemporaryDirectory() as d, h5py.File(os.path.join(OUT, "media_e2b.h5")) as f:
        for name in ("model.safetensors", "config.json"):
            with open(os.path.join(d, name), "wb") as out:
                out.write(f[name][:].tobytes())
        model = AutoModelForImageTextToText.from_pretrained(d, dtype=torch.float32, attn_implementation="eager").eval()
    features = torch.tensor(3 * formula(1000, 2999 * 128).reshape(1, 2999, 128))
    rng = np.random.default_rng(6)
    text = lambda n: rng.integers(3, 70, n).tolist()
    ids = torch.tensor([2] + text(4) + [BOA] + [AUDIO] * 750 + [EOA] + text(8))[None]
    out = model(input_ids=ids, mm_token_type_ids=torch.where(ids == AUDIO, 3, 0), use_cache=False, input_features=features,
                input_features_mask=torch.ones(1, 2999, dtype=torch.bool))
    nll = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:], reduction="none")
    nll.mean().backward()
    with h5py.File(os.path.join(OUT, "media_long.h5"), "w") as f:
        f["ids"] = ids[0].numpy().astype(np.int32)
        f["lengths"] = np.array([ids.shape[1]], dtype=np.int32)
        f["nll"] = nll.detach().numpy()
        save_grads(f.create_group("grad"), model)
    print("long", ids.shape[1], float(nll.mean()))


if __name__ == "__main__":
    assert VOCAB > EOA
    for kind in sys.argv[1:] or [*MODELS, "long"]:
        make_long() if kind == "long" else make(kind)
