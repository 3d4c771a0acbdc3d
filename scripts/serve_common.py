"""A server in the background, and a client of it on asyncio alone, for scripts/serve-*.py."""

import asyncio
import contextlib
import json
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = ROOT / "target/release/depthwise"


@contextlib.contextmanager
def server(*arguments):
    """Serves models/kjv at a free port, and gives the address. Ends the server as Ctrl-C does."""
    command = [str(BINARY), "serve", "models/kjv", "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"at http://([\d.]+):(\d+)", line):
                yield found[1], int(found[2])
                break
            print(line, end="")
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(timeout=60)


async def complete(address, body, read_slowly=0.0):
    """Text and number of tokens of a completion, streamed or whole; the times from the request to each chunk."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(*address)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    begun = loop.time()
    writer.write(head.encode() + data)
    await writer.drain()
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    if status != 200:
        raise RuntimeError(f"status {status}: {(await reader.read()).decode()}")
    text, tokens, times, rest = "", 0, [], b""
    if not body.get("stream"):
        choice = json.loads(await reader.read())["choices"][0]
        writer.close()
        return choice["text"], len(choice["depthwise"]["depths"]), [loop.time() - begun]
    while True:
        if read_slowly:
            await asyncio.sleep(read_slowly)
        read = await reader.read(1 << 16)
        if not read:
            break
        times.append(loop.time() - begun)
        # Chunks of HTTP do not matter here: events lie between blank lines.
        *events, rest = (rest + read).split(b"\n\n")
        for event in events:
            start = event.find(b"data: ")
            if start < 0 or event[start:].startswith(b"data: [DONE]"):
                continue
            choice = json.loads(event[start + 6 :])["choices"][0]
            text, tokens = text + choice["text"], tokens + len(choice["depthwise"]["depths"])
    writer.close()
    return text, tokens, times
