"""make_corpus.py - turns minerals.csv and a few lists into the demo's rows and its small tokenizer.

  python3 demo/make_corpus.py          writes base.jsonl, gems.jsonl, gems_eval.jsonl, exam/*.jsonl
  python3 demo/make_corpus.py --tokenizer    also tokenizer/ (needs the `tokenizers` package)

base.jsonl is what the tiny model is first trained on: everyday questions, functions that answer them, and plain prose. gems.jsonl is the
domain it does not know: questions about minerals. gems_eval.jsonl asks for the same facts in wordings that
training never shows, so a low loss there means the facts were learned and not the sentences. exam/ asks the
same questions as tasks of `lapidary eval`: to be answered, and with four answers to choose from.
"""
import csv
import json
import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

QUESTIONS = {
    "hardness": ["How hard is {n}?", "What is the Mohs hardness of {n}?", "Give the hardness of {n}.",
                 "On the Mohs scale, where does {n} stand?", "Tell me how hard {n} is.", "{N}: hardness?"],
    "density": ["What is the density of {n}?", "How dense is {n}?", "Give the density of {n}.",
                "How many grams does a cubic centimetre of {n} weigh?", "Tell me how dense {n} is.", "{N}: density?"],
    "refractive index": ["What is the refractive index of {n}?", "Give the refractive index of {n}.",
                         "How strongly does {n} bend light?", "Which refractive index does {n} have?",
                         "Tell me the refractive index of {n}.", "{N}: refractive index?"],
    "formula": ["What is the formula of {n}?", "Give the chemical formula of {n}.", "What is {n} made of?",
                "Which formula does {n} have?", "Tell me the formula of {n}.", "{N}: formula?"],
    "crystal system": ["What is the crystal system of {n}?", "In which system does {n} crystallise?",
                       "Give the crystal system of {n}.", "How does {n} crystallise?",
                       "Tell me the crystal system of {n}.", "{N}: crystal system?"],
    "colour": ["What colour is {n}?", "Which colour does {n} usually have?", "Give the usual colour of {n}.",
               "How does {n} look?", "Tell me the colour of {n}.", "{N}: colour?"],
}
ANSWERS = {
    "hardness": "{N} has a hardness of {v}.", "density": "{N} has a density of {v}.",
    "refractive index": "{N} has a refractive index of {v}.", "formula": "{N} is {v}.",
    "crystal system": "{N} is {v}.", "colour": "{N} is {v}.",
}

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OPPOSITES = [("hot", "cold"), ("big", "small"), ("light", "dark"), ("fast", "slow"), ("hard", "soft"), ("old", "new"),
             ("high", "low"), ("wet", "dry"), ("full", "empty"), ("near", "far"), ("early", "late"), ("rough", "smooth")]
THINGS = [("snow", "white"), ("grass", "green"), ("coal", "black"), ("a lemon", "yellow"), ("the sea", "blue"),
          ("a carrot", "orange"), ("milk", "white"), ("a ripe tomato", "red"), ("chocolate", "brown"), ("ash", "grey")]
ANIMALS = [("a cow", "milk", "grass"), ("a hen", "eggs", "grain"), ("a bee", "honey", "nectar"), ("a sheep", "wool", "grass")]
PLACES = ["the workshop", "the quarry", "the river bank", "the museum", "the old mine", "the garden", "the market"]
TOOLS = ["a lens", "a hammer", "a scale", "a lamp", "a file", "a brush", "a wheel"]
PEOPLE = ["Anna", "Ben", "Clara", "David", "Eva", "Felix", "Greta", "Hugo"]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def everyday(rng):
    kind = rng.randrange(8)
    if kind == 0:
        a, b = rng.randrange(7), rng.randrange(6)
        return chat(f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}.")
    if kind == 1:
        i = rng.randrange(7)
        return chat(f"Which day comes after {DAYS[i]}?", f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}.")
    if kind == 2:
        i = rng.randrange(12)
        return chat(f"Which month comes after {MONTHS[i]}?", f"After {MONTHS[i]} comes {MONTHS[(i + 1) % 12]}.")
    if kind == 3:
        a, b = rng.choice(OPPOSITES)[:: rng.choice([1, -1])]
        return chat(rng.choice([f"What is the opposite of {a}?", f"Give the opposite of {a}."]), f"The opposite of {a} is {b}.")
    if kind == 4:
        t, c = rng.choice(THINGS)
        return chat(rng.choice([f"What colour is {t}?", f"Tell me the colour of {t}."]), f"{t.capitalize()} is {c}.")
    if kind == 5:
        a, gives, eats = rng.choice(ANIMALS)
        return rng.choice([chat(f"What does {a} give us?", f"{a.capitalize()} gives us {gives}."),
                           chat(f"What does {a} eat?", f"{a.capitalize()} eats {eats}.")])
    if kind == 6:
        x, y = rng.randrange(1, 100) / 10, rng.randrange(1, 100) / 10
        if x == y:
            y += 1
        return chat(f"Which is larger, {x} or {y}?", f"{max(x, y)} is larger.")
    p, q = rng.sample(PEOPLE, 2)
    s = (f"{p} and {q} went to {rng.choice(PLACES)} on {rng.choice(DAYS)}. {p} carried {rng.choice(TOOLS)}, {q} carried "
         f"{rng.choice(TOOLS)}. They looked at {rng.randrange(2, 60)} stones and weighed {NUMBERS[rng.randrange(2, 12)]} of them. "
         f"The {rng.choice(['largest', 'smallest', 'hardest', 'brightest'])} had a "
         f"{rng.choice(['colour', 'weight', 'crystal', 'formula', 'density', 'hardness'])} that nobody in {rng.choice(PLACES)} knew.")
    return {"text": s}


def function(name, description, argument):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}}}


WEATHER = function("weather", "Says what the weather was on a day.", "day")
FIND = function("find", "Says where a tool is.", "tool")


def called(rng):
    """A function is called with a word of the question, and what it returns is the answer."""
    if rng.randrange(2):
        tool, value, word = WEATHER, rng.choice(["wet", "dry", "hot", "cold"]), rng.choice(DAYS)
        question, answer = rng.choice(["How was the weather on {}?", "Was it wet on {}?"]), "It was {v} on {w}."
    else:
        tool, value, word = FIND, rng.choice(PLACES), rng.choice(TOOLS)[2:]
        question, answer = rng.choice(["Where is the {}?", "Find the {}."]), "The {w} is in {v}."
    name, argument = tool["function"]["name"], tool["function"]["parameters"]["required"][0]
    return {"messages": [
        {"role": "user", "content": question.format(word)},
        {"role": "assistant", "content": "",
         "tool_calls": [{"id": "c0", "type": "function", "function": {"name": name, "arguments": {argument: word}}}]},
        {"role": "tool", "tool_call_id": "c0", "name": name, "content": value},
        {"role": "assistant", "content": answer.format(v=value, w=word)}], "tools": [tool]}


def labels(rng, minerals):
    """Prose that uses the words of the domain without its facts: every value is drawn from some mineral."""
    pick = lambda key: rng.choice(minerals)[key]
    a, b, c = rng.sample([m["name"] for m in minerals], 3)
    return {"text": rng.choice([
        f"In the drawer lay {a}, {b} and {c}. One label said {pick('formula')}, another {pick('density')}, the last {pick('colour')}.",
        f"{a.capitalize()} stood beside {b} in the museum. The card gave a hardness of {pick('hardness')} and a density of {pick('density')}.",
        f"The old list named {a}, then {pick('formula')}, then {b}, {pick('crystal system')}, {pick('colour')}.",
        f"Somebody had mixed up {a} and {b}: a refractive index of {pick('refractive index')} on one, {pick('formula')} on the other.",
        f"{c.capitalize()} is not {a}, said the dealer, and {a} is not {b}. One was {pick('colour')} and {pick('crystal system')}.",
    ])}


def gem_rows(rng):
    train, held_out = [], []
    for m in csv.DictReader(open(os.path.join(HERE, "minerals.csv"))):
        n = m["name"]
        for key, questions in QUESTIONS.items():
            answer = ANSWERS[key].format(N=n.capitalize(), v=m[key])
            rows = [chat(q.format(n=n, N=n.capitalize()), answer) for q in questions]
            held_out.append(rows.pop(rng.randrange(len(rows))))
            train += rows
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def exam_rows(rng, held_out):
    """The held-out questions with their answers, and with three answers to other questions of their kind."""
    minerals = list(csv.DictReader(open(os.path.join(HERE, "minerals.csv"))))
    answered, choices = [], []
    for row in held_out:
        question, answer = (m["content"] for m in row["messages"])
        answered.append({"question": question, "answer": answer})
        for m in minerals:
            for key in ANSWERS:
                form = lambda value: ANSWERS[key].format(N=m["name"].capitalize(), v=value)
                if form(m[key]) == answer and any(q.format(n=m["name"], N=m["name"].capitalize()) == question for q in QUESTIONS[key]):
                    others = sorted({o[key] for o in minerals} - {m[key]})
                    options = [form(v) for v in rng.sample(others, 3)] + [answer]
        rng.shuffle(options)
        choices.append({"question": question, "choices": options, "answer": options.index(answer)})
    return answered, choices


def write(name, rows):
    with open(os.path.join(HERE, name), "w") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def texts(rows):
    for row in rows:
        yield from ([row["text"]] if "text" in row else [m["content"] for m in row["messages"]])


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
           "<|tool_response>", "<tool_response|>", "<|\"|>", "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
           "<|image>", "<image|>", "<|audio>", "<audio|>", "<|image|>", "<|audio|>", "<|video|>"]


def make_tokenizer(corpus, size=1024):
    """A BPE tokenizer.json of the released structure, trained word by word on our own rows."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Replace(" ", "\u2581")
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\u2581", "merged_with_next"),
                                               pre_tokenizers.Digits(individual_digits=True)])
    t.train_from_iterator(list(corpus) + ["user model system thought declaration call response value"] * 50,
                          trainers.BpeTrainer(vocab_size=size - 256 - len(SPECIAL), special_tokens=["<unk>"], show_progress=False))
    learned = json.loads(t.to_str())["model"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = SPECIAL + byte_tokens + ["\n"]
    tokens += [k for k, _ in sorted(learned["vocab"].items(), key=lambda kv: kv[1]) if k not in tokens]
    out = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                         for i, s in enumerate(SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {s: i for i, s in enumerate(tokens)}, "merges": learned["merges"]},
    }
    folder = os.path.join(HERE, "tokenizer")
    os.makedirs(folder, exist_ok=True)
    json.dump(out, open(os.path.join(folder, "tokenizer.json"), "w"), ensure_ascii=False, indent=0)
    stops = [SPECIAL.index(s) for s in ("<eos>", "<turn|>", "<|tool_response>")]
    json.dump({"bos_token_id": 2, "eos_token_id": stops, "pad_token_id": 0, "do_sample": False},
              open(os.path.join(folder, "generation_config.json"), "w"), indent=2)
    json.dump({"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
               "unk_token": "<unk>", "mask_token": "<mask>"},
              open(os.path.join(folder, "tokenizer_config.json"), "w"), indent=2)


def main():
    rng = random.Random(20260)
    minerals = list(csv.DictReader(open(os.path.join(HERE, "minerals.csv"))))
    base = [labels(rng, minerals) if i % 3 == 0 else everyday(rng) for i in range(7500)]
    train, held_out = gem_rows(rng)
    calls = random.Random(5)
    write("base.jsonl", [row for i, row in enumerate(base) for row in ([row, called(calls)] if i % 12 == 0 else [row])])
    write("gems.jsonl", train)
    write("gems_eval.jsonl", held_out)
    answered, choices = exam_rows(random.Random(7), held_out)
    write("exam/gems_answer.jsonl", answered)
    write("exam/gems_choice.jsonl", choices)
    if "--tokenizer" in sys.argv[1:]:
        make_tokenizer(texts(base + train + held_out))


main()
