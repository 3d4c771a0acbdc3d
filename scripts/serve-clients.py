#!/usr/bin/env python3
"""OpenAI's Python client, and a thousand connections at once, against `depthwise serve models/kjv`.

    cargo build --release
    python3 scripts/serve-clients.py [--connections 1000] [--slow 50]

OpenAI's client comes from PyPI into a virtual environment under target/. Of the connections at once, none may be lost and
none may get another text than it gets alone; some of them read slowly. The script prints times, and fails at a difference.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
import venv

from serve_common import BINARY, ROOT, complete, server

CLIENT = "openai==3.57.0"
PROMPTS = ["In the beginning", "And God said", "The LORD is", "Blessed are", "And it came to pass"]

OPENAI = r'''
import sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
assert [model.id for model in client.models.list()] == ["kjv"]
ask = dict(model="kjv", prompt="In the beginning", max_tokens=30, temperature=0)
whole = client.completions.create(**ask)
text = whole.choices[0].text
assert whole.usage.completion_tokens == 30 and whole.choices[0].finish_reason == "length", whole
chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
assert chunks[-1].usage.completion_tokens == 30 and not chunks[-1].choices
assert len(whole.choices[0].depthwise["depths"]) == 30
stop = text[10:13]
assert client.completions.create(**ask, stop=[stop]).choices[0].text == text[: text.index(stop)]
sampled = [client.completions.create(**{**ask, "temperature": 1}, seed=seed, n=2).choices for seed in (1, 1, 2)]
texts = [[choice.text for choice in choices] for choices in sampled]
assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
logprobs = client.completions.create(**ask, logprobs=3).choices[0].logprobs
assert len(logprobs.tokens) == 30 and all(len(top) == 3 for top in logprobs.top_logprobs)
shallow = client.completions.create(**ask, extra_body={"depthwise": {"exit": "static:0"}})
assert set(shallow.choices[0].depthwise["depths"]) == {0}
chat = [{"role": "user", "content": "In the beginning"}]
answer = client.chat.completions.create(model="kjv", messages=chat, max_completion_tokens=8, temperature=0)
assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens == 8
deltas = client.chat.completions.create(model="kjv", messages=chat, max_tokens=8, temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == answer.choices[0].message.content
for wrong, error in [({"max_tokens": 5000}, openai.BadRequestError), ({"model": "gpt"}, openai.NotFoundError)]:
    try:
        client.completions.create(**{**ask, **wrong})
        raise SystemExit(f"{wrong} was served")
    except error as refused:
        assert "expected" in str(refused), refused
print(f"openai {openai.__version__}: completions and chats, whole and streamed, are as they should be")
'''


def check_openai(address):
    """Runs OpenAI's client in an environment of its own."""
    folder = ROOT / "target/openai-client"
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", CLIENT], check=True)
    subprocess.run([python, "-c", OPENAI, f"http://{address[0]}:{address[1]}/v1"], check=True)


async def check_connections(address, connections, slow):
    """Many streams at once, some of them with slow readers, against the texts of the same requests alone."""
    bodies = [
        {"prompt": prompt, "max_tokens": 10 + 3 * place, "temperature": 0, "stream": True}
        for place, prompt in enumerate(PROMPTS)
    ]
    alone = [await complete(address, body) for body in bodies]

    async def one(number):
        body, expected = bodies[number % len(bodies)], alone[number % len(bodies)]
        text, tokens, times = await complete(address, body, read_slowly=1.0 if number < slow else 0.0)
        assert (text, tokens) == expected[:2], f"connection {number}: {text!r}, expected {expected[0]!r}"
        return number, tokens, times

    begun = time.perf_counter()
    found = await asyncio.gather(*(one(number) for number in range(connections)))
    seconds = time.perf_counter() - begun
    ends = [times[-1] for number, _, times in found if number >= slow]
    firsts = [times[0] for number, _, times in found if number >= slow]
    tokens = sum(tokens for _, tokens, _ in found)
    print(f"{connections} connections at once, {slow} of them slow: none lost, none wrong, {tokens} tokens in {seconds:.1f} s")
    for name, times in [("first token", firsts), ("last token", ends)]:
        print(f"  {name} of the others: median {statistics.median(times):.2f} s, latest {max(times):.2f} s")


def main():
    """Runs both against one server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=50)
    args = parser.parse_args()
    if not BINARY.exists():
        sys.exit(f"no {BINARY}: cargo build --release")
    template = ROOT / "target/chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    with server("--exit", "margin:0.05", "--chat-template", str(template)) as address:
        check_openai(address)
        asyncio.run(check_connections(address, args.connections, args.slow))


if __name__ == "__main__":
    main()
