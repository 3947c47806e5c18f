"""quantize_fixtures.py - writes tests/fixtures/quantize.h5: what llama.cpp, the gguf package, bitsandbytes and
compressed-tensors make of the same numbers.

The million values are made from integers alone, so that C and numpy make the same ones; of their blocks the file
holds SHA-256 sums. Edge cases, and K-quants with what they read as, are there in full.
"""
import ctypes
import glob
import hashlib
import os

import bitsandbytes.functional as bnb
import gguf
import h5py
import llama_cpp
import numpy as np
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save

OUT = os.path.join(os.path.dirname(__file__), "..", "fixtures", "quantize.h5")
COUNT = 1 << 20


def splitmix(i):
    z = (i + np.uint64(0x9E3779B97F4A7C15))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def values(count):
    """Sums of four 16-bit integers, centred, times 2^-20: exact in f32, nearly normal, about 0.04 wide."""
    with np.errstate(over="ignore"):
        bits = splitmix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    total = sum(((bits >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4))
    return ((total - 131070).astype(np.float32) * np.float32(2.0 ** -20)).astype(np.float32)


def edges():
    """Rows of 64: zeros, denormals, ties of every kind, opposite extremes, one large value, tiny scales."""
    rows = [np.zeros(64), np.full(64, 1e-40), np.linspace(-8, 7, 64), np.arange(64) % 16 - 8,
            (np.arange(64) % 17 - 8) / 2, np.where(np.arange(64) % 2, 1, -1) * 3.0, np.eye(64)[5] * 4e4,
            np.eye(64)[40] * -1e-6, (np.arange(64) - 32) * 127 / 32.0, (np.arange(64) % 9 - 4.5) * 2.0 ** -10,
            np.where(np.arange(64) < 32, 0, 0.3), np.full(64, -0.0)]
    return np.stack(rows).astype(np.float32)


lib = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(llama_cpp.__file__), "lib", "libggml-base.so"))[0])
lib.ggml_quantize_chunk.restype = ctypes.c_size_t
lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]


def ggml(x, kind):
    x = np.ascontiguousarray(x, dtype=np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty(x.size // block * size, dtype=np.uint8)
    used = lib.ggml_quantize_chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, x.size // x.shape[-1], x.shape[-1], None)
    assert used == out.size
    return out


def sha(x):
    """The sum as 64 ASCII bytes."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest().encode(), dtype=np.uint8)


MODULE = "model.layers.0.mlp.up_proj"


def stored(codes, expected, f, name):
    """A safetensors file of one quantised module, and the sum of the f32 that its package reads from it."""
    file = np.frombuffer(save({k: v.contiguous() for k, v in codes.items()}), dtype=np.uint8)
    f.create_dataset(name, data=file, compression="gzip")
    f[name + "_sha256"] = sha(expected.float().numpy())


def bitsandbytes_module(x, nested, f, name):
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
    codes = {f"{MODULE}.weight": packed}
    codes.update({f"{MODULE}.weight.{k}": v for k, v in state.as_dict(packed=True).items()})
    stored(codes, bnb.dequantize_4bit(packed, state), f, name)


def compressed_module(x, args, activations, f, name):
    how = QuantizationArgs(type="int", symmetric=True, **args)
    dynamic = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=how, input_activations=dynamic)
    groups = x.reshape(x.shape[0], -1, how.group_size or x.shape[1])
    scale = calculate_qparams(groups.amin(-1), groups.amax(-1), how)[0].to(torch.bfloat16).float()
    compressor = IntQuantizationCompressor if activations else PackedQuantizationCompressor
    codes = compressor.compress({"weight": x, "weight_scale": scale}, scheme)
    values = compressor.decompress(codes, scheme)["weight"]
    codes["weight_scale"] = scale.to(torch.bfloat16)
    stored({f"{MODULE}.{k}": v for k, v in codes.items()}, values, f, name)


def main():
    Q = gguf.GGMLQuantizationType
    x, e = values(COUNT).reshape(-1, 1024), edges()
    with h5py.File(OUT, "w") as f:
        f["edges"] = e
        for name, kind in (("q4_0", Q.Q4_0), ("q8_0", Q.Q8_0)):
            f[name + "_sha256"] = sha(ggml(x, kind))
            f["edges_" + name] = ggml(e, kind)
        k = values(1 << 12).reshape(-1, 1024)
        for name, kind in (("q4_k", Q.Q4_K), ("q5_k", Q.Q5_K), ("q6_k", Q.Q6_K)):
            packed = ggml(k, kind)
            f[name] = packed
            f[name + "_values"] = gguf.quants.dequantize(packed, kind).astype(np.float32)
        packed, state = bnb.quantize_4bit(torch.from_numpy(x), quant_type="nf4", compress_statistics=False)
        f["nf4" + "_sha256"] = sha(packed.numpy())
        f["nf4_absmax" + "_sha256"] = sha(state.absmax.numpy())
        packed, state = bnb.quantize_4bit(torch.from_numpy(x), quant_type="nf4", compress_statistics=True)
        f["nf4_nested_absmax"] = state.absmax.numpy()
        f["nf4_nested_scale"] = state.state2.absmax.numpy()
        f["nf4_nested_offset"] = np.array([state.offset.item()], dtype=np.float32)
        f["nf4_values"] = bnb.dequantize_4bit(packed, state).reshape(-1)[:4096].numpy()
        m = torch.from_numpy(values(1 << 15).reshape(64, 512))
        bitsandbytes_module(m, False, f, "module_nf4")
        bitsandbytes_module(m, True, f, "module_nf4_nested")
        compressed_module(m, dict(num_bits=4, strategy="group", group_size=32), False, f, "module_int4")
        compressed_module(m, dict(num_bits=4, strategy="group", group_size=128), False, f, "module_int4_128")
        compressed_module(m, dict(num_bits=8, strategy="channel"), False, f, "module_int8_packed")
        compressed_module(m, dict(num_bits=8, strategy="channel"), True, f, "module_int8")
        f["dynamic"] = bnb.create_dynamic_map(True).numpy()
        f["dynamic_unsigned"] = bnb.create_dynamic_map(False).numpy()


main()
