"""models.py - the tiny models that fixtures are made of: one of each released kind.

Run by make_fixtures.py inside an environment with the pinned versions of requirements.txt.
"""
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 80

COMMON = dict(
    vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, num_attention_heads=4,
    head_dim=8, global_head_dim=16, intermediate_size=40, sliding_window=6, max_position_embeddings=512,
    final_logit_softcapping=30.0, rms_norm_eps=1e-6, tie_word_embeddings=True, pad_token_id=0, bos_token_id=2,
    eos_token_id=1, hidden_activation="gelu_pytorch_tanh", attention_bias=False, attention_dropout=0.0,
)


def pattern(period, layers):
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


KINDS = {
    # per-layer embeddings, shared K/V, double-wide MLP
    "e2b": ("gemma4_text", dict(num_hidden_layers=8, layer_types=pattern(4, 8), num_key_value_heads=1,
                                num_kv_shared_layers=4, use_double_wide_mlp=True, hidden_size_per_layer_input=8)),
    # the same without the double width, and two key heads
    "e4b": ("gemma4_text", dict(num_hidden_layers=6, layer_types=pattern(3, 6), num_key_value_heads=2,
                                num_kv_shared_layers=3, use_double_wide_mlp=False, hidden_size_per_layer_input=8)),
    # experts, K = V on full layers with their own number of key heads
    "26b-a4b": ("gemma4_text", dict(num_hidden_layers=4, layer_types=pattern(2, 4), num_key_value_heads=2,
                                    num_global_key_value_heads=1, attention_k_eq_v=True, enable_moe_block=True,
                                    num_experts=8, top_k_experts=3, moe_intermediate_size=12,
                                    hidden_size_per_layer_input=0, use_bidirectional_attention="vision")),
    # dense, K = V
    "31b": ("gemma4_text", dict(num_hidden_layers=4, layer_types=pattern(2, 4), num_key_value_heads=4,
                                num_global_key_value_heads=2, attention_k_eq_v=True, hidden_size_per_layer_input=0,
                                use_bidirectional_attention="vision")),
    "12b": ("gemma4_unified_text", dict(num_hidden_layers=4, layer_types=pattern(2, 4), num_key_value_heads=4,
                                        num_global_key_value_heads=1, attention_k_eq_v=True,
                                        hidden_size_per_layer_input=0)),
}


def build(kind, seed=7):
    """A random f32 model of the kind: weights large enough that every path matters."""
    model_type, keys = KINDS[kind]
    config = CONFIG_MAPPING[model_type](**COMMON, **keys)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if "inv_freq" in name or "embed_scale" in name or p.numel() == 0:
                continue
            if name.endswith("layer_scalar"):
                p.uniform_(0.6, 1.1)
            elif "norm" in name or name.endswith("scale"):
                p.uniform_(0.7, 1.3)
            elif p.dim() >= 2:
                p.normal_(0, 0.18)
        model.model.embed_tokens.weight[0].normal_(0, 0.18)
    return model.eval()


def sequences(seed=11):
    """Two sequences of different lengths, both longer than the sliding window."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in (17, 11)]
