"""prequantised.py - quantised checkpoint folders, theirs in Lapidary and ours in transformers.

  python bench/prequantised.py MODEL ROWS.jsonl

MODEL is a dense checkpoint folder. Quantised by bitsandbytes (nf4, plain and nested scales) and by compressed-tensors
(int4 in groups of 32, int8 a row, with and without int8 activations), it is scored by Lapidary; exported by Lapidary as
w4a16 and int8, it is loaded by transformers. Prints the mean and largest difference of f32 logits for each.
"""
import argparse
import glob
import json
import os
import shutil
import subprocess
import tempfile

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

from program import ROOT, ids_of, ours

LAPIDARY = os.path.join(ROOT, "lapidary")


def companions(source, folder):
    for path in glob.glob(os.path.join(source, "*token*")) + glob.glob(os.path.join(source, "chat_template*")):
        shutil.copy(path, folder)


def by_bitsandbytes(source, folder, nested):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
                                bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)


def by_compressed_tensors(source, folder, args, activations):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    dynamic = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], input_activations=dynamic,
                                weights=QuantizationArgs(type="int", symmetric=True, **args))
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*router.*"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight, how = module.weight.data.float(), module.quantization_scheme.weights
        groups = weight.reshape(weight.shape[0], -1, how.group_size or weight.shape[1])
        module.weight_scale.data.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), how)[0])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def exact_weights(folder):
    """The weights as f32, from the codes: transformers' own loaders round them to bf16."""
    stored = load_file(os.path.join(folder, "model.safetensors"))
    weights = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        scale = stored.get(module + ".weight_scale")
        if part == "weight_packed":
            bits = 32 * value.shape[1] // int(stored[module + ".weight_shape"][1])
            value = unpack_from_int32(value, bits, torch.Size(stored[module + ".weight_shape"].tolist()))
        if part in ("weight_packed", "weight") and scale is not None:
            groups = value.float().reshape(value.shape[0], scale.shape[1], -1)
            weights[module + ".weight"] = (groups * scale.float()[:, :, None]).reshape(value.shape)
        elif part == "weight" and name + ".quant_state.bitsandbytes__nf4" in stored:
            state = {k[len(name) + 1:]: v for k, v in stored.items() if k.startswith(name + ".")}
            state = QuantState.from_dict(state, device="cpu")
            absmax = state.absmax
            if state.nested:
                absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[: absmax.numel()] + state.offset
            codes = torch.stack([value.reshape(-1) >> 4, value.reshape(-1) & 15], 1).reshape(-1).long()
            weights[name] = (state.code[codes].reshape(-1, 64) * absmax[:, None]).reshape(state.shape)
        elif part in ("weight", "layer_scalar") or part == name:
            weights[name] = value.float()
    return weights


def logits(model, sequences):
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([ids])).logits[0, :-1].float().numpy() for ids in sequences])


def show(name, theirs, mine):
    difference = np.abs(theirs - mine)
    print(json.dumps({"folder": name, "positions": len(theirs), "mean_difference": float(difference.mean()),
                      "largest_difference": float(difference.max()), "logits_std": float(theirs.std())}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    a = parser.parse_args()
    with open(a.rows) as f:
        sequences = [[2] + ids for ids in ids_of(a.model, [json.loads(line)["text"] for line in f])]
    makers = {
        "bitsandbytes nf4": lambda d: by_bitsandbytes(a.model, d, False),
        "bitsandbytes nf4, nested": lambda d: by_bitsandbytes(a.model, d, True),
        "compressed-tensors int4": lambda d: by_compressed_tensors(a.model, d, dict(num_bits=4, strategy="group", group_size=32), False),
        "compressed-tensors int8, packed": lambda d: by_compressed_tensors(a.model, d, dict(num_bits=8, strategy="channel"), False),
        "compressed-tensors int8": lambda d: by_compressed_tensors(a.model, d, dict(num_bits=8, strategy="channel"), True),
    }
    for to in ("w4a16", "int8"):
        makers["lapidary " + to] = lambda d, to=to: subprocess.run(
            [LAPIDARY, "export", "--model", a.model, "--to", to, "--verify", d], check=True, stdout=subprocess.DEVNULL)
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as d:
            folder = os.path.join(d, "quantised")
            make(folder)
            companions(a.model, folder)
            dense = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="eager").eval()
            dense.load_state_dict(exact_weights(folder), strict=False)
            mine = ours(folder, a.rows, "f32", None).reshape(sum(map(len, sequences)) - len(sequences), -1)
            show(name, logits(dense, sequences), mine)
            if name.startswith("lapidary"):
                loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                              quantization_config=CompressedTensorsConfig(dequantize=True)).eval()
                show(name + ", loaded by transformers (weights rounded to bf16)", logits(loaded, sequences), mine)


if __name__ == "__main__":
    main()
