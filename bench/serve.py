"""The official openai client against a running server: answers, streams, tools, log-probabilities, errors, and 200 at once.

    python bench/serve.py MODEL [--adapter NAME=DIR] [--chat-format small]
"""

import argparse
import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import time
from typing import Literal

import openai
import pydantic

from program import PROGRAM

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "hardness",
            "description": "Mohs hardness of a mineral.",
            "parameters": {
                "type": "object",
                "properties": {"mineral": {"type": "string"}},
                "required": ["mineral"],
            },
        },
    }
]


def start(args):
    command = [PROGRAM, "serve", "--model", args.model, "--port", "0", "--queue", "512"]
    command += ["--chat-format", args.chat_format, "--dtype", args.dtype]
    for a in args.adapter:
        command += ["--adapter", a]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = server.stderr.readline()
    port = int(re.search(r":(\d+)/", line).group(1))
    return server, port, line.split(" serves ")[1].strip().split(", ")


def resident(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1e6
    return 0


def check(name, condition):
    print(f"{'ok  ' if condition else 'FAIL'} {name}")
    check.failed += not condition


check.failed = 0


def refused(call, kind):
    try:
        call()
    except kind as e:
        return bool(e.body["message"])
    return False


def conversation(client, model):
    ask = [{"role": "user", "content": "How hard is topaz?"}]
    plain = client.chat.completions.create(
        model=model, messages=ask, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    text = plain.choices[0].message.content
    tokens = plain.choices[0].logprobs.content
    check("an answer with log-probabilities", len(tokens) == plain.usage.completion_tokens)
    check("the best token is the chosen one", all(t.top_logprobs[0].token == t.token for t in tokens))
    streamed, reason, usage = "", None, None
    for chunk in client.chat.completions.create(
        model=model, messages=ask, max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            streamed += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    check("a stream says the same", streamed == text and reason == plain.choices[0].finish_reason)
    check("and counts the same", usage.completion_tokens == plain.usage.completion_tokens)
    several = client.chat.completions.create(
        model=model, messages=ask, max_tokens=8, n=3, seed=7, temperature=1
    )
    again = client.chat.completions.create(
        model=model, messages=ask, max_tokens=8, n=3, seed=7, temperature=1
    )
    check(
        "three answers, the same for the same seed",
        [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
        and len(several.choices) == 3,
    )
    first = client.completions.create(model=model, prompt="Topaz is", max_tokens=6, temperature=0)
    words = first.choices[0].text
    stop = words[len(words) // 2 :][:4]
    cut = client.completions.create(
        model=model, prompt="Topaz is", max_tokens=6, temperature=0, stop=[stop]
    )
    check(
        "a stop text ends an answer before it",
        cut.choices[0].text == words[: words.index(stop)] and cut.choices[0].finish_reason == "stop",
    )
    tool_chat = ask + [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "hardness", "arguments": '{"mineral": "topaz"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "8"},
    ]
    told = client.chat.completions.create(
        model=model, messages=tool_chat, tools=TOOLS, max_tokens=8, temperature=0
    )
    check("a conversation with a tool's answer", told.choices[0].finish_reason in ("stop", "length", "tool_calls"))


class Gem(pydantic.BaseModel):
    name: Literal["ruby", "opal"]
    colours: list[Literal["red", "green", "blue"]] = pydantic.Field(max_length=3)
    cut: bool | None
    twins: list["Gem"] = pydantic.Field(max_length=1)


def forms(client, model):
    ask = [{"role": "user", "content": "How hard is topaz?"}]
    said = client.chat.completions.create(
        model=model, messages=ask, tools=TOOLS, tool_choice="required", max_tokens=300, seed=3
    ).choices[0]
    check("a call that is asked for comes", said.message.tool_calls or said.finish_reason == "length")
    for call in said.message.tool_calls or []:
        check("with arguments as declared", set(json.loads(call.function.arguments)) == {"mineral"})
    whole = 0
    for seed in range(8):
        reply = client.chat.completions.create(
            model=model, messages=ask, max_tokens=600, temperature=1, seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "gem", "strict": True, "schema": Gem.model_json_schema()},
            },
        ).choices[0]
        if reply.finish_reason == "stop":
            Gem.model_validate_json(reply.message.content)
            whole += 1
    check(f"answers fit a schema of pydantic's ({whole} of 8 ended)", whole > 0)
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "a+"}}}
    check(
        "a schema that cannot be held is 400",
        refused(
            lambda: client.chat.completions.create(model=model, messages=ask, response_format=wrong),
            openai.BadRequestError,
        ),
    )


def errors(client, model):
    ask = [{"role": "user", "content": "x"}]
    create = client.chat.completions.create
    check("an unknown model is 404", refused(lambda: create(model="zzz", messages=ask), openai.NotFoundError))
    check("no messages are 400", refused(lambda: create(model=model, messages=[]), openai.BadRequestError))
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    check("media are refused by name", refused(lambda: create(model=model, messages=picture), openai.BadRequestError))
    long = [{"role": "user", "content": "word " * 20000}]
    check("a prompt beyond the context is 400", refused(lambda: create(model=model, messages=long), openai.BadRequestError))


def crowd(client, model, server, port):
    before = resident(server.pid)

    def one(i):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Question {i}: say something."}],
            max_tokens=4,
            temperature=0,
            stream=i % 2 == 0,
        )
        if i % 2 == 0:
            return sum(1 for chunk in answer if chunk.choices and chunk.choices[0].finish_reason)
        return int(answer.choices[0].finish_reason is not None)

    start_time = time.time()
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        done = sum(pool.map(one, range(200)))
    after = resident(server.pid)
    check(
        f"200 at once: {done} answered in {time.time() - start_time:.1f} s, "
        f"{before:.2f} GB and {after:.2f} GB after",
        done == 200 and after - before < 1,
    )
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "go on"}], "stream": True,
         "max_tokens": 4000}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    socks = []
    for i in range(20):
        s = socket.create_connection(("127.0.0.1", port))
        s.sendall(head.encode() + body)
        socks.append(s)
    time.sleep(1)
    for s in socks:
        s.close()
    for _ in range(100):
        time.sleep(0.2)
        text = subprocess.run(
            ["curl", "-s", f"http://127.0.0.1:{port}/metrics"], capture_output=True, text=True
        ).stdout
        if "lapidary_sequences_running 0" in text and "lapidary_sequences_waiting 0" in text:
            break
    check("20 clients that left are given up", "lapidary_sequences_running 0" in text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--chat-format", default="auto")
    parser.add_argument("--dtype", default="bf16")
    args = parser.parse_args()
    server, port, models = start(args)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        check("the models are listed", [m.id for m in client.models.list()] == models)
        for model in models:
            conversation(client, model)
        forms(client, models[0])
        errors(client, models[0])
        crowd(client, models[0], server, port)
    finally:
        server.terminate()
        check("the server ends at once", server.wait(30) == 0)
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
