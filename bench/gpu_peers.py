"""gpu_peers.py - torch's attention, and LoRA steps of transformers + peft, on the shapes that `lapidary bench` times.

  python bench/gpu_peers.py attention [--tokens 4096]
  python bench/gpu_peers.py train [--tokens 4096] [--presets e2b,e4b,...] [--bits 4]

Weights are random and made on the GPU. Training: bf16, rank 16 on the seven usual targets, no checkpointing unless memory runs out, the
fastest of five steps, of two with --bits 4: bitsandbytes' NF4 below the adapters, and checkpointing; experts, which it does not pack, stay bf16.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = [("e2b sliding", 8, 1, 256, 512), ("e2b full", 8, 1, 512, 0), ("31b sliding", 32, 16, 256, 1024), ("31b full", 32, 4, 512, 0),
          ("causal 256", 16, 8, 256, 0)]


def seconds(work, runs=5):
    """The fastest of a few runs after a first."""
    best = 1e9
    for i in range(runs + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def attention(tokens):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"math": SDPBackend.MATH, "efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, heads, kv_heads, size, window in SHAPES:
        make = lambda h: torch.randn(1, h, tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = make(heads), make(kv_heads), make(kv_heads)
        n = torch.arange(tokens, device="cuda")
        mask = None
        if window:
            mask = (n[None] <= n[:, None]) & (n[None] > n[:, None] - window)
        keys = float(torch.clamp(n + 1, max=window or tokens).sum())
        for backend, kind in backends.items():
            try:
                def forward():
                    with sdpa_kernel(kind):
                        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

                grad = torch.randn_like(forward())
                ahead = seconds(lambda: forward())
                both = seconds(lambda: forward().backward(grad))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(json.dumps({"attention": name, "torch": backend, "refused": str(error).splitlines()[0][:100]}), flush=True)
                continue
            flops = 4 * keys * heads * size
            print(json.dumps({"attention": name, "torch": backend, "forward_tflops": round(flops / ahead / 1e12, 2),
                              "backward_tflops": round(2.5 * flops / max(both - ahead, 1e-9) / 1e12, 2)}), flush=True)


def train(presets, tokens, bits):
    import peft
    import transformers

    program = os.path.join(ROOT, "build/static/lapidary")
    if not os.path.exists(program):
        program = os.path.join(ROOT, "build/cuda/lapidary")
    for preset in presets:
        text = json.loads(subprocess.run([program, "init", preset, "--config"], check=True, capture_output=True, text=True).stdout)
        config = transformers.Gemma4TextConfig(**text.get("text_config", text))
        result = {"preset": preset, "peer": "transformers + peft", "bits": bits or 16, "tokens": tokens}
        try:
            torch.cuda.reset_peak_memory_stats()
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("cuda"):
                model = transformers.Gemma4ForCausalLM(config)
            torch.set_default_dtype(torch.float32)
            if bits == 4:
                import bitsandbytes as bnb

                for module in list(model.modules()):
                    for name, child in list(module.named_children()):
                        if name in TARGETS:
                            with torch.device("meta"):  # its own random weights are not needed
                                packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4",
                                                           compute_dtype=torch.bfloat16)
                            packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").cuda()
                            setattr(module, name, packed)
                child = None  # the last of what was replaced
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
            ids = torch.randint(3, config.vocab_size, (1, tokens), device="cuda")

            def step():
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            took = None
            try:
                took = None if bits else seconds(step)
            except torch.OutOfMemoryError:
                pass  # once out of here the failed step's memory is free
            if took is None:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
                result["checkpointing"] = True
                took = seconds(step, 2 if bits else 5)
            result.update(tokens_per_s=round(tokens / took, 1), peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2))
        except Exception as error:  # a peer that does not run is a result
            result["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        print(json.dumps(result), flush=True)
        model = optimizer = None
        torch.cuda.empty_cache()


def main():
    a = argparse.ArgumentParser()
    a.add_argument("what", choices=["attention", "train"])
    a.add_argument("--tokens", type=int, default=4096)
    a.add_argument("--presets", default="e2b,e4b,26b-a4b,31b")
    a.add_argument("--bits", type=int, default=0)
    args = a.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU")
    if args.what == "attention":
        attention(args.tokens)
    else:
        train(args.presets.split(","), args.tokens, args.bits)


main()
