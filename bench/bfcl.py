"""Calls of the function-calling leaderboard, right and wrong, judged by its authors' checker and by lapidary eval.

    python bench/bfcl.py DATA     (DATA holds BFCL_v4_*.json and possible_answer/; needs bfcl-eval)
"""

import copy
import glob
import importlib.util
import json
import os
import random
import subprocess
import sys
import types

from program import PROGRAM


def checker():
    """bfcl_eval's checker of syntax trees, without the packages of its model handlers."""
    config = types.ModuleType("bfcl_eval.constants.model_config")
    config.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules["bfcl_eval.constants.model_config"] = config
    for name in ("java", "js"):
        module = types.ModuleType(f"bfcl_eval.eval_checker.ast_eval.type_convertor.{name}_type_converter")
        setattr(module, f"{name}_type_converter", None)
        sys.modules[module.__name__] = module
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    return lambda functions, calls, truth, category: ast_checker(
        functions, calls, truth, Language.PYTHON, category, "m"
    )["valid"]


def written(value):
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
    return repr(value)


def plain(value, pick):
    """An accepted value as a call has it: dictionaries hold lists of alternatives."""
    if isinstance(value, dict):
        return {k: plain(pick(v), pick) for k, v in value.items() if v != [""]}
    if isinstance(value, list):
        return [plain(v, pick) if isinstance(v, dict) else v for v in value]
    return value


def change(rng, value):
    kinds = [
        lambda v: str(v) if not isinstance(v, (dict, list)) else v,
        lambda v: v.upper() if isinstance(v, str) else v,
        lambda v: v + "." if isinstance(v, str) else v,
        lambda v: v + "x" if isinstance(v, str) else v,
        lambda v: float(v) if isinstance(v, int) and not isinstance(v, bool) else v,
        lambda v: int(v) if isinstance(v, float) else v,
        lambda v: v + 1 if isinstance(v, (int, float)) and not isinstance(v, bool) else v,
        lambda v: not v if isinstance(v, bool) else v,
        lambda v: v[:-1] if isinstance(v, list) else v,
        lambda v: v[::-1] if isinstance(v, list) else v,
        lambda v: [v],
        lambda v: {k: change(rng, w) for k, w in v.items()} if isinstance(v, dict) else v,
    ]
    return rng.choice(kinds)(copy.deepcopy(value))


def variants(rng, truth):
    pick = lambda options: next((o for o in options if o != ""), "")
    some = lambda options: rng.choice(options)
    for chooser in (pick, some, some):
        calls = []
        for one in truth:
            ((name, parameters),) = one.items()
            arguments = {}
            for key, options in parameters.items():
                value = chooser(options)
                if value == "" and "" in options:
                    continue
                arguments[key] = plain(value, chooser)
            calls.append({name: arguments})
        yield calls
        rng.shuffle(calls)
        yield calls
        for _ in range(4):
            other = copy.deepcopy(calls)
            call = rng.choice(other)
            ((name, arguments),) = call.items()
            how = rng.randrange(8)
            if how == 0 and arguments:
                arguments.pop(rng.choice(list(arguments)))
            elif how == 1:
                arguments["extra"] = 1
            elif how == 2:
                other.append(copy.deepcopy(call))
            elif how == 3:
                call[name + "2"] = call.pop(name)
            elif arguments:
                key = rng.choice(list(arguments))
                arguments[key] = change(rng, arguments[key])
            yield other


def main():
    data = sys.argv[1]
    judge, rng = checker(), random.Random(5)
    rows, expected, broken = [], [], 0
    for path in sorted(glob.glob(f"{data}/BFCL_v4_*.json")):
        name = os.path.basename(path)
        beside = f"{data}/possible_answer/{name}"
        if "multi_turn" in name or not os.path.exists(beside):
            continue
        category = name[8:-5]
        answers = [json.loads(line)["ground_truth"] for line in open(beside)]
        for entry, truth in zip(map(json.loads, open(path)), answers):
            for calls in variants(rng, truth):
                try:
                    valid = judge(entry["function"], calls, truth, category)
                except Exception:  # the checker itself gives up on some shapes
                    broken += 1
                    continue
                text = "".join(
                    f"<|tool_call>call:{n}{written(a)}<tool_call|>" for c in calls for n, a in c.items()
                )
                doc = {"function": entry["function"], "ground_truth": truth}
                rows.append({"task": "bfcl", "filter": "calls", "doc": doc, "response": text})
                expected.append(float(valid))
    out = subprocess.run(
        [PROGRAM, "eval", "--rescore", "-"],
        input="".join(json.dumps(r) + "\n" for r in rows),
        text=True, capture_output=True, check=True,
    ).stdout
    differ = 0
    for row, want, line in zip(rows, expected, out.splitlines()):
        got = json.loads(line)
        if got.get("score") != want:
            differ += 1
            if differ <= 5:
                print("differs:", row["response"][:300], json.dumps(row["doc"]["ground_truth"])[:300],
                      want, got.get("score"), got.get("error"))
    print(
        f"{len(rows)} answers, {int(sum(expected))} of them accepted by the authors' checker: "
        f"{differ} judged differently here ({broken} it could not judge)"
    )
    return differ > 0


if __name__ == "__main__":
    sys.exit(main())
