"""media_learning.py - training that means something, on a random small model.

  oracle/bin/python bench/media_learning.py captions OUT DATA [--steps 300]
  oracle/bin/python bench/media_learning.py tools OUT DATA [--steps 240]

captions: eight pictures and six recordings of DATA get a name each; an adapter with the projections learns them. Then the same
with media shuffled against names: every medium is shown with every name of its kind, as often. Prints how many are named right.

tools: rows whose tools answer with charts (their numbers come from the charts' specifications), one chart or two in parallel
calls, beside conversations of tau-bench, which have text alone; every fifth is held out. Prints the held-out loss as it falls.
"""
import argparse
import csv
import json
import os
import random
import subprocess

from program import PROGRAM, ROOT, init_small, run

PICTURES = ["images/astronaut.png", "images/chelsea.png", "images/rocket.jpg", "images/retina.jpg", "images/page.png",
            "charts/bar.png", "charts/arc_pie.png", "charts/point_2d.png"]
SOUNDS = ["audio/jfk.wav", "audio/LJ050-0131.wav", "audio/spk1_snt1.wav", "audio/spk1_snt2.wav", "audio/spk2_snt1.wav",
          "audio/tour_en.wav"]
NAMES = {"image": ["an astronaut in orange", "a ginger cat", "a rocket on its pad", "the back of an eye", "a printed page",
                   "nine bars", "a pie of six slices", "a cloud of points"],
         "audio": ["a speech of 1961", "a reader of reports", "the first speaker, once", "the first speaker, again",
                   "the second speaker", "a guide on tour"]}


def part(kind, path):
    return {"type": kind, "path": path}


def say(role, *content):
    return {"role": role, "content": list(content) if len(content) > 1 or not isinstance(content[0], str) else content[0]}


def text(value):
    return {"type": "text", "text": value}


def write_rows(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def train(out, name, model, rows, steps, **data):
    more = "".join(f", {k}: {v}" for k, v in data.items())
    with open(f"{out}/{name}.yaml", "w") as f:
        f.write(f"model: {model}\noutput: {out}/{name}\ndtype: f32\nmethod: lora\n"
                "lora: {rank: 16, alpha: 32, train_also: [embedding_projection]}\n"
                f"data: {{train: {rows}, max_length: 2048, chat_format: small, image_tokens: 70{more}}}\n"
                "optimizer: {lr: 4.0e-3, eps: 1.0e-3}\nbatch: {sequences: 1, accumulate: 1}\n"
                f"schedule: {{name: cosine, warmup: 10}}\nsteps: {steps}\neval_every: {max(1, steps // 8)}\n"
                f"save: {{every: {steps}, best: false}}\n")
    subprocess.run([PROGRAM, "train", f"{out}/{name}.yaml", "--device", "cpu"], check=True, capture_output=True)
    return f"{out}/{name}/adapter"


def captions(out, data, steps):
    model = os.path.join(out, "model")
    if not os.path.exists(model):
        init_small("tiny", model, os.path.join(ROOT, "demo", "tokenizer"))
    asked = {"image": "What is shown?", "audio": "What is heard?"}
    media = [("image", p, n) for p, n in zip(PICTURES, NAMES["image"])] + [("audio", p, n) for p, n in zip(SOUNDS, NAMES["audio"])]
    row = lambda kind, path, name: {"messages": [say("user", part(kind, os.path.join(data, path)), text(asked[kind])),
                                                 say("assistant", name)]}

    def right(*adapter):
        return sum(run("generate", "--model", model, *adapter, "--dtype", "f32", "--device", "cpu", "--chat-format", "small",
                       "--" + kind, os.path.join(data, path), "--image-tokens", "70", "--temperature", "0", "--max-tokens", "24",
                       asked[kind]).strip() == name for kind, path, name in media)

    write_rows(out + "/paired.jsonl", [row(*m) for m in media])
    write_rows(out + "/shuffled.jsonl", [row(k, p, n) for k, p, _ in media for n in NAMES[k]])
    results = {"before": right(), "paired": right("--adapter", train(out, "paired", model, out + "/paired.jsonl", steps)),
               "shuffled": right("--adapter", train(out, "shuffled", model, out + "/shuffled.jsonl", steps))}
    print(", ".join(f"{k} {v} of {len(media)}" for k, v in results.items()))
    return results["before"] == 0 and results["paired"] >= 0.95 * len(media) and results["shuffled"] <= 0.25 * len(media)


CHART = {"type": "function", "function": {"name": "show_chart", "description": "Draws one of the charts.", "parameters": {
    "type": "object", "properties": {"name": {"type": "string", "description": "Which chart"}}, "required": ["name"]}}}


def call(i, name):
    return {"id": f"c{i}", "type": "function", "function": {"name": "show_chart", "arguments": {"name": name}}}


def shown(data, i, name):
    return {"role": "tool", "tool_call_id": f"c{i}", "name": "show_chart",
            "content": [text(f"The chart {name}."), part("image", os.path.join(data, "charts", name + ".png"))]}


def chart_row(data, question, charts, answer):
    return {"messages": [say("user", question), {"role": "assistant", "content": "",
                                                 "tool_calls": [call(i, c) for i, c in enumerate(charts)]},
                         *(shown(data, i, c) for i, c in enumerate(charts)), say("assistant", answer)], "tools": [CHART]}


def chart_rows(data):
    values = {n: json.load(open(f"{data}/charts/{n}.vl.json"))["data"]["values"] for n in ("bar", "arc_pie", "bar_grouped")}
    rows = [chart_row(data, f"How high is the bar of {v['a']}?", ["bar"], f"It is {v['b']}.") for v in values["bar"]]
    rows += [chart_row(data, f"How large is slice {v['category']} of the pie?", ["arc_pie"], f"It is {v['value']}.")
             for v in values["arc_pie"]]
    rows += [chart_row(data, f"What does group {v['group']} of {v['category']} have?", ["bar_grouped"], f"It has {v['value']}.")
             for v in values["bar_grouped"]]
    captions = [json.loads(line) for line in open(f"{data}/charts/captions.jsonl")]
    for c in captions:
        name = c["file"].removesuffix(".png")
        rows.append(chart_row(data, f"Describe the chart {name}.", [name], c["caption"]))
        rows += [chart_row(data, f"In {name}: {q}", [name], a + ".") for q, a in c.get("qa", [])]
    for bar in values["bar"][:6]:
        for pie in values["arc_pie"][:2]:
            rows.append(chart_row(data, f"Add the bar of {bar['a']} and slice {pie['category']} of the pie.", ["bar", "arc_pie"],
                                  f"{bar['b']} and {pie['value']} make {bar['b'] + pie['value']}."))
    return rows


def airline_rows(data, most):
    """The first call of a conversation and what follows it; the policy before it is left out."""
    rows = []
    for line in open(f"{data}/taubench/gpt-4o-airline-reward1-first60.jsonl"):
        messages = [{k: v for k, v in m.items() if v is not None} for m in json.loads(line)["traj"]][1:]
        end = next((i for i, m in enumerate(messages) if m["role"] == "tool"), None)
        if end is None or end + 1 >= len(messages) or len(json.dumps(messages[:end + 2])) > 2600:
            continue
        for m in messages:
            m.setdefault("content", "")
        rows.append({"messages": messages[:end + 2]})
    return rows[:most]


def tools(out, data, steps):
    model = os.path.join(out, "model")
    if not os.path.exists(model):
        init_small("tiny", model, os.path.join(ROOT, "demo", "tokenizer"))
    rows = chart_rows(data) + airline_rows(data, 20)
    random.Random(5).shuffle(rows)
    write_rows(out + "/train.jsonl", [r for i, r in enumerate(rows) if i % 5])
    write_rows(out + "/held.jsonl", rows[::5])
    with_media = sum('"image"' in json.dumps(r) for r in rows)
    train(out, "tools", model, out + "/train.jsonl", steps, eval=out + "/held.jsonl")
    losses = [float(r["eval_loss"]) for r in csv.DictReader(open(out + "/tools/metrics.csv")) if r["eval_loss"]]
    print(f"{len(rows)} rows, {with_media} with charts out of tools; held-out loss " + ", ".join(f"{x:.3f}" for x in losses))
    return len(rows) >= 50 and losses[-1] < 0.95 * losses[0]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["captions", "tools"])
    p.add_argument("out")
    p.add_argument("data")
    p.add_argument("--steps", type=int, default=300)
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    good = {"captions": captions, "tools": tools}[a.what](os.path.abspath(a.out), os.path.abspath(a.data), a.steps)
    raise SystemExit(int(not good))


if __name__ == "__main__":
    main()
