"""make_fixtures.py - writes tests/fixtures/*.h5 from the reference implementation.

  python3 -m venv oracle && oracle/bin/pip install -r tests/oracle/requirements.txt
  oracle/bin/python tests/oracle/make_fixtures.py [kind ...]

Each model_KIND.h5 holds what the reference saved (bytes of model.safetensors, config.json), token
sequences, their token NLLs, and the gradient of the mean loss for every parameter; further groups hold
variants: aux (with the balancing loss), span (with a bidirectional span), lora (AdamW steps by peft).
"""
import json
import os
import sys
import tempfile

import h5py
import numpy as np
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, os.path.dirname(__file__))
from models import KINDS, build, sequences  # noqa: E402

OUT = os.path.join(os.path.dirname(__file__), "..", "fixtures")


def file_bytes(path):
    return np.frombuffer(open(path, "rb").read(), dtype=np.uint8)


def token_nll(model, ids, **kwargs):
    logits = model(input_ids=ids[None], use_cache=False, **kwargs).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def mean_loss(model, seqs, **kwargs):
    parts = [token_nll(model, ids, **kwargs) for ids in seqs]
    return torch.cat(parts).mean(), parts


def save_grads(group, model):
    for name, p in model.named_parameters():
        if p.grad is not None and name != "lm_head.weight":
            group.create_dataset(name, data=p.grad.float().numpy())


def span_masks(T, window, span):
    """Masks of one image span on the two layer types, as the library's vision masks are."""
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    inside = lambda t: (t >= span[0]) & (t <= span[1])
    sliding = (i - j < window) & ((j <= i) | (inside(i) & inside(j)))
    full = j <= i
    low = torch.finfo(torch.float32).min
    return {k: torch.where(m, 0.0, low)[None, None] for k, m in
            (("sliding_attention", sliding), ("full_attention", full))}


def balancing_loss(probs, top_k):
    """Switch form, layers pooled: E * sum f_e P_e."""
    p = torch.cat(probs)
    chosen = torch.nn.functional.one_hot(p.topk(top_k).indices, p.shape[-1]).float().sum(1)
    return p.shape[-1] * (chosen.mean(0) * p.mean(0)).sum()


def make_base(f, model, seqs):
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        f["model.safetensors"] = file_bytes(os.path.join(d, "model.safetensors"))
        f["config.json"] = file_bytes(os.path.join(d, "config.json"))
    f["ids"] = torch.cat(seqs).numpy().astype(np.int32)
    f["lengths"] = np.array([len(s) for s in seqs], dtype=np.int32)
    loss, parts = mean_loss(model, seqs)
    loss.backward()
    f["nll"] = torch.cat(parts).detach().numpy()
    save_grads(f.create_group("grad"), model)
    model.zero_grad()


def make_bf16(f, model, seqs):
    """The same weights in bf16: what bf16 noise looks like."""
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        half = type(model).from_pretrained(d, dtype=torch.bfloat16, attn_implementation="eager")
        half.config._experts_implementation = "eager"
        with torch.no_grad():
            f["nll_bf16"] = torch.cat([token_nll(half, ids) for ids in seqs]).float().numpy()


def make_aux(f, model, seqs, coefficient=0.05):
    """Both sequences in one pass (packed by positions) so that the pooled loss has one meaning."""
    if not getattr(model.config, "enable_moe_block", False):
        return
    ids = torch.cat(seqs)
    positions = torch.cat([torch.arange(len(s)) for s in seqs])
    probs = []
    hooks = [m.register_forward_hook(lambda m, a, out: probs.append(out[0]))
             for n, m in model.named_modules() if n.endswith(".router")]
    logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
    starts = [sum(len(s) for s in seqs[:i]) for i in range(len(seqs))]
    losses = [torch.nn.functional.cross_entropy(logits[a:a + len(s) - 1], s[1:], reduction="none")
              for a, s in zip(starts, seqs)]
    aux = balancing_loss(probs, model.config.top_k_experts)
    (torch.cat(losses).mean() + coefficient * aux).backward()
    for h in hooks:
        h.remove()
    g = f.create_group("aux")
    g["coefficient"] = np.float64(coefficient)
    g["loss"] = aux.item()
    save_grads(g.create_group("grad"), model)
    model.zero_grad()


def make_span(f, model, seqs):
    if getattr(model.config, "use_bidirectional_attention", None) != "vision":
        return
    ids, span = seqs[0], (3, 9)
    loss = token_nll(model, ids, attention_mask=span_masks(len(ids), model.config.sliding_window, span))
    loss.mean().backward()
    g = f.create_group("span")
    g["span"] = np.array(span, dtype=np.int32)
    g["nll"] = loss.detach().numpy()
    save_grads(g.create_group("grad"), model)
    model.zero_grad()


def lora_config(kind, **extra):
    experts = KINDS[kind][1].get("enable_moe_block", False)
    return LoraConfig(r=4, lora_alpha=12, target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
                      target_parameters=["experts.gate_up_proj", "experts.down_proj"] if experts else None,
                      rank_pattern={r".*layers\.1\..*q_proj": 6}, alpha_pattern={r".*layers\.1\..*q_proj": 3}, **extra)


def make_lora(f, kind, name, seqs, **extra):
    """Four AdamW steps from a given adapter; large epsilon so that rounding stays rounding."""
    model = build(kind)
    peft = get_peft_model(model, lora_config(kind, **extra))
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in peft.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.1)
            if "magnitude" in n:
                p.mul_(torch.rand_like(p) * 0.4 + 0.8)
    g = f.create_group(name)
    with tempfile.TemporaryDirectory() as d:
        peft.save_pretrained(d)
        g["adapter_model.safetensors"] = file_bytes(os.path.join(d, "adapter_model.safetensors"))
        g["adapter_config.json"] = file_bytes(os.path.join(d, "adapter_config.json"))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=5e-4, eps=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss, _ = mean_loss(peft, seqs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    g["losses"] = np.array(losses)
    with tempfile.TemporaryDirectory() as d:
        peft.save_pretrained(d)
        g["after.safetensors"] = file_bytes(os.path.join(d, "adapter_model.safetensors"))


def main():
    os.makedirs(OUT, exist_ok=True)
    for kind in sys.argv[1:] or KINDS:
        seqs = sequences()
        with h5py.File(os.path.join(OUT, f"model_{kind}.h5"), "w") as f:
            model = build(kind)
            make_base(f, model, seqs)
            make_bf16(f, model, seqs)
            make_aux(f, model, seqs)
            make_span(f, model, seqs)
            make_lora(f, kind, "lora", seqs)
            make_lora(f, kind, "rslora", seqs, use_rslora=True)
            if not KINDS[kind][1].get("enable_moe_block", False):  # peft refuses DoRA on fused experts
                make_lora(f, kind, "dora", seqs, use_dora=True)
            print(kind, json.dumps({k: list(v) if isinstance(v, h5py.Group) else v.shape for k, v in f.items()})[:200])


if __name__ == "__main__":
    main()
