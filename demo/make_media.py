#!/usr/bin/env python3
"""make_media.py - draws the demo's charts, speaks its digits, and writes rows that use them.

  python3 demo/make_media.py

Into demo/media: chart pictures (three bars, drawn here pixel by pixel), spoken digits (two voices, from pulses, noise and
formants), and rows in which a function answers with a chart, two functions with one each, or a recording is asked about. Only
Python's own library is used; the same files come out every time.
"""
import json
import math
import os
import random
import struct
import wave
import zlib

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "media")
CHARTS, HELD = 96, 16
WIDTH, HEIGHT = 480, 336  # 70 soft tokens as they are
STONES = {"ruby": (208, 32, 48), "emerald": (16, 150, 70), "sapphire": (36, 70, 200)}
RATE = 16000


# ---- charts ----

def png(path, rows):
    raw = b"".join(b"\0" + bytes(row) for row in rows)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def chart(path, heights):
    """Bars of the three stones from left to right, heights of 0 to 1, on lines a tenth apart."""
    base, top, bar = HEIGHT - 24, 24, 112
    rows = [bytearray(b"\xf6\xf4\xee" * WIDTH) for _ in range(HEIGHT)]
    for tenth in range(11):
        y = base - (base - top) * tenth // 10
        rows[y][:] = b"\xd4\xd0\xc8" * WIDTH
    for i, (colour, height) in enumerate(zip(STONES.values(), heights)):
        left = 36 + i * 148
        for y in range(int(base - (base - top) * height), base):
            rows[y][3 * left:3 * (left + bar)] = bytes(colour) * bar
    png(path, rows)


# ---- digits ----

# Formants of sounds in hertz; what is between two of a glide is passed through.
VOWELS = {"iy": (270, 2290, 3010), "ih": (390, 1990, 2550), "eh": (530, 1840, 2480), "ah": (640, 1190, 2390),
          "aa": (730, 1090, 2440), "ao": (570, 840, 2410), "uw": (300, 870, 2240), "ow": (450, 880, 2300), "er": (490, 1350, 1690),
          "w": (300, 610, 2200), "n": (250, 1500, 2600)}
# (sound or sounds that glide, seconds, loudness) and (noise, seconds, centre in hertz, loudness, voiced or not)
SAID = {
    "zero": [("noise", .06, 5500, .25, True), (("ih", "er"), .10, .8), (("er", "ow"), .16, .9)],
    "one": [(("w", "ah"), .12, .9), (("ah",), .08, 1.0), (("n",), .10, .5)],
    "two": [("noise", .03, 4500, .6, False), (("uw",), .20, .9)],
    "three": [("noise", .07, 6500, .12, False), (("er", "iy"), .08, .8), (("iy",), .16, .9)],
    "four": [("noise", .07, 3500, .12, False), (("ao",), .14, 1.0), (("ao", "er"), .10, .8)],
    "five": [("noise", .07, 3500, .12, False), (("aa", "iy"), .20, 1.0), ("noise", .05, 3000, .10, True)],
    "six": [("noise", .10, 6000, .45, False), (("ih",), .08, .9), ("noise", .02, 2200, .6, False), ("noise", .10, 6000, .45, False)],
    "seven": [("noise", .09, 6000, .45, False), (("eh",), .09, 1.0), ("noise", .04, 3000, .10, True), (("ah", "n"), .12, .7)],
    "eight": [(("eh", "iy"), .18, 1.0), ("noise", .03, 4500, .6, False)],
    "nine": [(("n",), .08, .5), (("aa", "iy"), .18, 1.0), (("n",), .08, .5)],
}


def resonate(x, hertz, width):
    """A two-pole resonance; `hertz` a function of the sample."""
    y, one, two = [], 0.0, 0.0
    r = math.exp(-math.pi * width / RATE)
    for n, v in enumerate(x):
        v = (1 - r) * v + 2 * r * math.cos(2 * math.pi * hertz(n) / RATE) * one - r * r * two
        y.append(v)
        one, two = v, one
    return y


def speak(word, pitch, shift, rng):
    out, phase = [0.0] * 400, 0.0
    for part in SAID[word]:
        n = int(part[1] * RATE)
        if part[0] == "noise":
            _, _, centre, loud, voiced = part
            x = resonate([rng.uniform(-1, 1) for _ in range(n)], lambda _: centre, 900)
            if voiced:
                x = [v + .08 * math.sin(2 * math.pi * pitch * i / RATE) for i, v in enumerate(x)]
            gain = loud * 2
        else:
            sounds, _, gain = part
            pulses = []
            for i in range(n):
                phase += pitch * (1.1 - .2 * i / n) / RATE
                pulses.append(1.0 if phase >= 1 else 0.0)
                phase -= phase >= 1
            first, last = VOWELS[sounds[0]], VOWELS[sounds[-1]]
            x = [0.0] * n
            for f, (a, b) in enumerate(zip(first, last)):
                path = lambda i, a=a, b=b: shift * (a + (b - a) * i / n)
                x = [v + w / (1 + f) for v, w in zip(x, resonate(pulses, path, 70 + 40 * f))]
            gain *= 9
        edge = min(160, n // 3)
        out += [gain * v * min(1, (i + 1) / edge, (n - i) / edge) for i, v in enumerate(x)]
    peak = max(abs(v) for v in out)
    return [v / peak * .8 for v in out] + [0.0] * 400


def wav(path, samples):
    with wave.open(path, "wb") as f:
        f.setnchannels(1), f.setsampwidth(1), f.setframerate(RATE)
        f.writeframes(bytes(int(128 + 120 * v) for v in samples))


# ---- rows ----

SHOW = {"type": "function", "function": {"name": "show_chart", "description": "Draws a chart of the stones sold on a day.", "parameters": {
    "type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}}}


def day(number):
    return ("today", "yesterday")[number % 2]


def call(i, number):
    return {"id": f"c{i}", "type": "function", "function": {"name": "show_chart", "arguments": {"day": day(number)}}}


def shown(i, number):
    return {"role": "tool", "tool_call_id": f"c{i}", "name": "show_chart",
            "content": [{"type": "text", "text": f"Sold {day(number)}."}, {"type": "image", "path": f"chart{number}.png"}]}


def answer(question, numbers, said):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": "", "tool_calls": [call(i, n) for i, n in enumerate(numbers)]},
                         *(shown(i, n) for i, n in enumerate(numbers)), {"role": "assistant", "content": said}], "tools": [SHOW]}


def highest(heights):
    return list(STONES)[max(range(3), key=lambda i: heights[i])]


def main():
    rng = random.Random(11)
    os.makedirs(OUT, exist_ok=True)
    charts, train, held = [], [], []
    for number in range(CHARTS + HELD):
        heights = [rng.randint(2, 6) / 10 for _ in range(3)]
        heights[rng.randrange(3)] = rng.randint(8, 10) / 10
        chart(os.path.join(OUT, f"chart{number}.png"), heights)
        charts.append(heights)
        rows = train if number < CHARTS else held
        rows.append(answer(f"Which stone sold best {day(number)}?", [number], f"The {highest(heights)}."))
    for number in range(0, CHARTS, 8):
        one, other = number + number // 8 % 2, number + 3 - number // 8 % 2
        train.append(answer(f"Which stone sold best {day(one)}, and which {day(other)}?", [one, other],
                            f"The {highest(charts[one])} and the {highest(charts[other])}."))
    digits, exam = [], []
    for voice, (pitch, shift) in enumerate([(110, 1.0), (185, 1.15)]):
        for word in SAID:
            wav(os.path.join(OUT, f"{word}{voice}.wav"), speak(word, pitch, shift, rng))
            digits.append({"messages": [{"role": "user", "content": [{"type": "audio", "path": f"{word}{voice}.wav"},
                                                                     {"type": "text", "text": "Which digit is that?"}]},
                                        {"role": "assistant", "content": f"That is {word}."}]})
            exam.append({"audio": f"{word}{voice}.wav", "text": f"That is {word}."})
    asked = [{"messages": row["messages"][:-1], "tools": row["tools"], "answer": row["messages"][-1]["content"]} for row in held]
    for name, rows in (("charts", train), ("charts_held", held), ("charts_exam", asked), ("digits", digits), ("digits_exam", exam)):
        with open(os.path.join(OUT, name + ".jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
