"""Starts the stock TensorBoard on a folder, as a process of its own, and asks it over HTTP."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    def series(self):
        """Return head, steps and values, unpacked by hand."""
        (length,) = struct.unpack("<I", self.body[:4])
        head = json.loads(self.body[4 : 4 + length])
        count = head["shape"][0]
        start = 4 + length
        steps = np.frombuffer(self.body, "<f8", count, start)
        values = np.frombuffer(self.body, "<f4", -1, start + 8 * count)
        return head, steps, values.reshape(head["shape"])


@dataclass(frozen=True)
class Server:
    url: str

    def get(self, path: str, **query: str) -> Answer:
        return self.read(f"data/plugin/bnguard/{path}", **query)

    def read(self, path: str, **query: str) -> Answer:
        url = self.url + path
        if query:
            url += "?" + urllib.parse.urlencode(query)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def wait_for_runs(self, count: int, seconds: float = 30.0) -> list[dict[str, str]]:
        """Return the runs as soon as there are so many: TensorBoard reads in the background."""
        deadline = time.monotonic() + seconds
        while len(runs := self.get("runs").json()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"TensorBoard shows {runs}")
            time.sleep(0.1)
        return runs


@contextmanager
def tensorboard(folder: Path, *arguments: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "1", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"http://[\w.:]+/\S*", line):
                    yield Server(found.group().rstrip("/") + "/")
                    break
            else:
                raise RuntimeError("TensorBoard did not start: " + "".join(said))
        finally:
            process.terminate()
