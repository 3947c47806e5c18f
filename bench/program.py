"""program.py - running Lapidary from a benchmark."""
import json
import os
import subprocess
import tempfile

import numpy as np

ROOT = os.path.join(os.path.dirname(__file__), "..")
PROGRAM = os.path.join(ROOT, "lapidary")


def ours(model, rows, dtype, adapter):
    with tempfile.TemporaryDirectory() as d:
        out = os.path.join(d, "logits")
        command = [PROGRAM, "score", "--model", model, "--dtype", dtype, "--data", rows, "--logits", out]
        if adapter:
            command += ["--adapter", adapter]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return np.fromfile(out, dtype=np.float32)


def ids_of(model, texts):
    command = [PROGRAM, "tokenize", "--model", model, "--data", "-"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    out = subprocess.run(command, input=lines, text=True, check=True, capture_output=True).stdout
    return [json.loads(line)["ids"] for line in out.splitlines()]
