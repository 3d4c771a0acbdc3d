"""A server in the background, and a client of it on asyncio alone, for scripts/serve-*.py."""

import asyncio
import contextlib
import json
import pathlib
import re
import socket
import subprocess
import typing

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = ROOT / "target/release/depthwise"


class Server(typing.NamedTuple):
    """A server that runs."""

    host: str
    port: int
    process: int


@contextlib.contextmanager
def server(*arguments, model="models/kjv", binary=BINARY):
    """Serves a model at a free port, and gives it. Ends the server as Ctrl-C does."""
    command = [binary, "serve", model, "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"at http://([\d.]+):(\d+)", line):
                yield Server(found[1], int(found[2]), process.pid)
                break
            print(line, end="")
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(timeout=60)


# More than an answer has.
ALL = 1 << 20


async def fetch(address, body):
    """The bytes of an answer, read at its end: the client costs next to nothing while tokens come."""
    stream = socket.socket()
    # The system wakes no reader before this many bytes, or the end.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, ALL)
    stream.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stream, address[:2])
    reader, writer = await asyncio.open_connection(sock=stream)
    data = json.dumps(body).encode()
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    return answer


def seconds_of_http(process):
    """Processor time so far of the threads of a server that read and write."""
    threads = pathlib.Path(f"/proc/{process}/task").iterdir()
    of_http = [thread for thread in threads if (thread / "comm").read_text().startswith("tokio")]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in of_http) / 1e9


def tokens_of(answer):
    """Number of tokens of an answer, streamed or whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer.decode())
    return sum(len(ids.split(b",")) for ids in re.findall(rb'"token_ids":\[([\d,]+)\]', body))


async def complete(address, body, read_slowly=0.0):
    """Text and number of tokens of a completion, streamed or whole; the times from the request to each chunk."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(*address[:2])
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
