"""The same tiny model, the same questions: lm-evaluation-harness (HF backend, CPU) and lapidary eval.

    python bench/harness.py MODEL SHARED [--subjects a,b] [--limit N]

MODEL is a checkpoint folder both can read, SHARED the folder with mmlu/ and gsm8k/. Compares every
log-likelihood, every answer and every aggregate, and the wall time of each side's MMLU.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time

from program import PROGRAM


def mmlu_rows(path, subject):
    with open(path, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            yield {
                "question": row["question"],
                "subject": subject,
                "choices": [row[f"choice{i}"] for i in range(4)],
                "answer": int(row["answer"]),
            }


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def harness_tasks(folder, shared, subjects):
    """Task definitions over local files, otherwise as released."""
    tasks = []
    for subject in subjects:
        for split in ("test", "dev"):
            write_rows(
                f"{folder}/{subject}_{split}.jsonl",
                mmlu_rows(f"{shared}/mmlu/{split}/{subject}_{split}.csv", subject),
            )
        tasks.append(
            {
                "task": f"mmlu_{subject}",
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {
                        s: f"{folder}/{subject}_{s}.jsonl" for s in ("test", "dev")
                    }
                },
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "num_fewshot": 5,
                "description": "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
                "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            }
        )
    gsm = {
        "task": "gsm8k",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {s: f"{shared}/gsm8k/{s}.jsonl" for s in ("test", "train")}
        },
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 5,
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 32,
        },
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                    },
                    {"function": "take_first"},
                ],
            },
        ],
    }
    text = open(f"{shared}/text/tinyshakespeare.txt", encoding="utf-8").read()
    pieces = [{"text": text[i : i + 3000]} for i in range(0, 12000, 3000)]
    pieces.append({"text": text[20000:50000]})  # longer than the model's context
    os.makedirs(f"{folder}/perplexity", exist_ok=True)
    write_rows(f"{folder}/perplexity/text.jsonl", pieces)
    perplexity = {
        "task": "perplexity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/perplexity/text.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    }
    return tasks, gsm, perplexity


def run_ours(model, data, out, tasks, more):
    start = time.time()
    subprocess.run(
        [PROGRAM, "eval", "--model", model, "--tasks", tasks, "--data", data, "--out", out,
         "--dtype", "f32", *more],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.time() - start
    samples = {}
    for name in os.listdir(out):
        if name.startswith("samples_"):
            with open(f"{out}/{name}", encoding="utf-8") as f:
                samples[name[8:-6]] = [json.loads(line) for line in f]
    with open(f"{out}/results.json", encoding="utf-8") as f:
        return samples, json.load(f)["results"], seconds


def run_harness(lm, tasks, limit):
    import lm_eval

    start = time.time()
    got = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, limit=limit, bootstrap_iters=100, log_samples=True
    )
    return got["samples"], got["results"], time.time() - start


def values(sample):
    """Log-likelihoods of a sample; whichever side wrote it."""
    for one in sample["resps"]:
        one = one[0]
        yield float(one[0] if isinstance(one, (list, tuple)) else one)


def compare(ours, theirs, our_results, their_results):
    worst, answers, same = 0.0, 0, 0
    for task, samples in theirs.items():
        mine = {(s["doc_id"], s["filter"]): s for s in ours[task]}
        for s in samples:
            m = mine[(s["doc_id"], s["filter"])]
            assert m["prompt_hash"] == s["prompt_hash"] or task == "perplexity", (task, s["doc_id"])
            if isinstance(s["resps"][0][0], str):
                answers += 1
                same += m["resps"][0][0] == s["resps"][0][0]
            else:
                worst = max([worst] + [abs(a - b) for a, b in zip(values(m), values(s))])
        for key, value in their_results[task].items():
            if "," in key and isinstance(value, float) and "perplexity_stderr" not in key:
                mine_value = our_results[task][key]
                assert abs(mine_value - value) <= 1e-6 * max(1, abs(value)) or (
                    task == "perplexity" and abs(mine_value - value) < 1e-4 * abs(value)
                ), (task, key, mine_value, value)
    return worst, answers, same


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("shared")
    parser.add_argument("--subjects", default="anatomy,high_school_european_history")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--parts", default="mmlu,gsm8k,perplexity")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    subjects, parts = args.subjects.split(","), args.parts.split(",")
    limit = args.limit or None
    with tempfile.TemporaryDirectory() as folder:
        mmlu, gsm, perplexity = harness_tasks(folder, args.shared, subjects)
        os.makedirs(f"{folder}/data/mmlu")
        for split in ("test", "dev"):
            os.makedirs(f"{folder}/data/mmlu/{split}")
            for s in subjects:
                os.symlink(
                    os.path.abspath(f"{args.shared}/mmlu/{split}/{s}_{split}.csv"),
                    f"{folder}/data/mmlu/{split}/{s}_{split}.csv",
                )
        lm = HFLM(
            pretrained=args.model, dtype="float32", device="cpu", batch_size=1, add_bos_token=True
        )
        more = ["--limit", str(limit)] if limit else []
        if "mmlu" in parts:
            theirs, their_results, their_time = run_harness(lm, mmlu, limit)
            ours, our_results, our_time = run_ours(
                args.model, f"{folder}/data", f"{folder}/ours", "mmlu", more
            )
            worst, _, _ = compare(ours, theirs, our_results, their_results)
            n = sum(len(s) for s in theirs.values())
            print(
                f"mmlu, {len(subjects)} subjects, 5 shots, {n} questions: largest difference of a "
                f"log-likelihood {worst:.1e}; {their_time:.1f} s and {our_time:.1f} s, "
                f"{their_time / our_time:.1f} times as fast"
            )
        if "gsm8k" in parts:
            theirs, their_results, their_time = run_harness(lm, [gsm], 20)
            ours, our_results, our_time = run_ours(
                args.model, args.shared, f"{folder}/gsm", "gsm8k",
                ["--limit", "20", "--max-tokens", "32"],
            )
            _, answers, same = compare(ours, theirs, our_results, their_results)
            print(
                f"gsm8k, 20 questions: {same} of {answers} answers the same; {their_time:.1f} s and "
                f"{our_time:.1f} s"
            )
        if "perplexity" in parts:
            lm.add_bos_token = False  # windows have a <bos> of their own in front
            theirs, their_results, their_time = run_harness(lm, [perplexity], None)
            ours, our_results, our_time = run_ours(
                args.model, f"{folder}", f"{folder}/ppl", "perplexity", []
            )
            worst, _, _ = compare(ours, theirs, our_results, their_results)
            word = their_results["perplexity"]["word_perplexity,none"]
            print(
                f"perplexity: largest difference of a log-likelihood {worst:.1e}, word perplexity "
                f"{word:.2f} and {our_results['perplexity']['word_perplexity,none']:.2f}; "
                f"{their_time:.1f} s and {our_time:.1f} s"
            )


if __name__ == "__main__":
    sys.exit(main())
