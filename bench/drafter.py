"""A tiny model with a tiny assistant: transformers' assisted generation and lapidary generate --draft.

    python bench/drafter.py [FOLDER]

Vocabularies are small, so that guesses of random weights are right now and then: equal counts of right
guesses over many tokens say that both sides guess the same. With and without grouped tokens.

transformers 5.23.0 lets the assistant see the key of a guess that was just refused (it crops to the
tokens there are, of which the last has no key of its own yet); here it is cropped one earlier, which
is what lapidary sees.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from program import PROGRAM, ROOT

VOCABULARY, NEW = 1024, 120

# transformers 5.23.0 refuses configs in which every layer shares, which assistants' are.
_modes = Gemma4TextConfig.kv_sharing_modes
Gemma4TextConfig.kv_sharing_modes = property(
    lambda self: ["reuse"] * self.num_hidden_layers
    if self.num_kv_shared_layers == self.num_hidden_layers
    else _modes.fget(self)
)


def text_config(layers, hidden, **more):
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, layer_types=kinds,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, global_head_dim=64,
        intermediate_size=2 * hidden, sliding_window=512, vocab_size_per_layer_input=VOCABULARY,
        enable_moe_block=False, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0,
        bos_token_id=2, **more,
    )


def make(folder, ordered):
    torch.manual_seed(3)
    target = Gemma4ForCausalLM(
        text_config(4, 64, num_kv_shared_layers=2, hidden_size_per_layer_input=32,
                    use_double_wide_mlp=True)
    ).float().eval()
    small = text_config(2, 48, num_kv_shared_layers=2, hidden_size_per_layer_input=0)
    small.vocab_size_per_layer_input = 0
    assistant = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(
            text_config=small, backbone_hidden_size=64, use_ordered_embeddings=ordered,
            num_centroids=32, centroid_intermediate_top_k=4,
        )
    ).float().eval()
    with torch.no_grad():
        # Few tokens stand out, the same ones on both sides: guesses are right often enough.
        boost = torch.zeros(VOCABULARY, 1)
        boost[100:116] = 1.0
        for model in (target, assistant):
            table = model.get_input_embeddings().weight
            table.mul_(0.2 + 3 * boost)
        if ordered:
            order = torch.randperm(VOCABULARY)
            assistant.masked_embedding.token_ordering.copy_(order)
    for model, name in ((target, "target"), (assistant, "assistant")):
        path = f"{folder}/{name}"
        model.save_pretrained(path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            source = os.path.join(ROOT, "demo/tokenizer", file)
            if os.path.exists(source) and name == "target":
                open(f"{path}/{file}", "w").write(open(source).read())
        with open(f"{path}/generation_config.json", "w") as f:
            json.dump({"eos_token_id": 1, "num_assistant_tokens": 4,
                       "num_assistant_tokens_schedule": "constant"}, f)
    return target, assistant


def theirs(target, assistant, ids):
    from transformers.generation import candidate_generator as c

    guessed = []
    original = c.SinglePositionMultiTokenCandidateGenerator.get_candidates

    def recorded(self, input_ids, *args, **kwargs):
        outputs, known = kwargs.get("model_outputs"), input_ids.shape[1] - 1
        if outputs is not None and getattr(outputs, "shared_kv_states", None) is not None:
            outputs.shared_kv_states = {
                kind: tuple(states[:, :, :known] for states in pair)
                for kind, pair in outputs.shared_kv_states.items()
            }
        out = original(self, input_ids, *args, **kwargs)
        guessed.append((input_ids.shape[1], out[0][0, input_ids.shape[1] :].tolist()))
        return out

    c.SinglePositionMultiTokenCandidateGenerator.get_candidates = recorded
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    out = target.generate(
        torch.tensor([ids]), assistant_model=assistant, do_sample=False, max_new_tokens=NEW,
        eos_token_id=None,
    )[0, len(ids) :].tolist()
    c.SinglePositionMultiTokenCandidateGenerator.get_candidates = original
    right = total = 0
    for at, tokens in guessed:
        total += len(tokens)
        for i, token in enumerate(tokens):
            where = at + i - len(ids)
            if where >= len(out) or out[where] != token:
                break
            right += 1
    return out, right, total


def ours(folder, prompt, draft):
    command = [PROGRAM, "generate", "--model", f"{folder}/target", "--raw", "--json", "--dtype",
               "f32", "--temperature", "0", "--max-tokens", str(NEW), prompt]
    if draft:
        command += ["--draft", f"{folder}/assistant"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = re.search(r"(\d+) of (\d+) guesses", run.stderr)
    return json.loads(run.stdout)["ids"], counts and (int(counts[1]), int(counts[2]))


def main():
    failed = 0
    for ordered in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            folder = sys.argv[1] if len(sys.argv) > 1 else folder
            target, assistant = make(folder, ordered)
            for prompt in ("How hard is topaz?", "A", "Give the formula of fluorite, please."):
                line = subprocess.run(
                    [PROGRAM, "tokenize", "--model", f"{folder}/target", prompt],
                    capture_output=True, text=True, check=True,
                ).stdout
                ids = [2] + json.loads(line)["ids"]
                want, right, total = theirs(target, assistant, ids)
                plain, _ = ours(folder, prompt, False)
                drafted, counts = ours(folder, prompt, True)
                same = plain == drafted and plain == want[: len(plain)]
                print(
                    f"{'grouped' if ordered else 'whole head'}, {len(ids)} tokens of prompt: "
                    f"answers {'the same' if same else 'DIFFER'}; right guesses {right} of {total} "
                    f"there, {counts[0]} of {counts[1]} here"
                )
                failed += not same or (right, total) != counts
    return failed


if __name__ == "__main__":
    sys.exit(main())
