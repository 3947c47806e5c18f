"""Questions as h5py writes them, for eval/table: python3 tests/oracle/table_fixture.py"""
import h5py
import numpy as np

rows = [
    ("Which is harder, ruby or opal?", ["ruby", "opal"], 0, 9.0, True, ["gem", "hardness"]),
    ("What colour is a sapphïre, most often?", ["red", "blue"], 1, 9.0, False, []),
    ("A 2 \u00d7 3 tray has how many cells?", ["5", "6"], 1, 0.5, True, ["count"]),
]
text = h5py.string_dtype("utf-8")
with h5py.File("tests/fixtures/questions.h5", "w", libver="earliest") as f:
    f.create_dataset("question", data=[r[0] for r in rows], dtype=text)
    f.create_dataset("choices", data=[r[1] for r in rows], dtype=text)
    f.create_dataset("answer", data=np.array([r[2] for r in rows], "u1"))
    f.create_dataset("mohs", data=np.array([r[3] for r in rows], ">f4"))
    f.create_dataset("checked", data=np.array([r[4] for r in rows]))
    f.create_dataset("source", data=np.array([b"own", b"book", b"own"]))
    tags = f.create_dataset("tags", (len(rows),), dtype=h5py.vlen_dtype(text))
    for i, r in enumerate(rows):
        tags[i] = np.array(r[5], dtype=object)
