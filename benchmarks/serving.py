"""Serves a model under load while adapters come and go, and checks what must not happen.

    python -m benchmarks.serving FOLDER --seconds 600 --rate 4 --adapters-on-device 8 --json FILE

``FOLDER`` is of ``benchmarks.random_files``. A server (``moelora serve``) starts with all adapters,
of which the device holds a few; an open-loop load (``moelora bench-serve``) asks for them by a Zipf
distribution. Meanwhile adapters are reloaded in place, and others are loaded, asked and unloaded.
In the end the server's own counters must show no compilation, no buffer that moved and no unplanned
read, and no request may have failed. The server then starts once more, with its programs cached.

A start reads the model, compiles two programs for each power of two up to ``--max-running`` and for
some more sizes, and reads all adapters; ``--starts 1`` and a small ``--max-running`` make it cheap.
What is known is printed and written as it comes, so a run that is cut short still tells it.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.results_file import how_made, write

ADMIN_KEY = "sk-admin-of-the-benchmark"
MOELORA = [sys.executable, "-c", "from moelora_jax.cli import app; app()"]
#: Metrics that must be 0 in the end.
ZEROS = ("compilations_total", "address_changes_total", "unplanned_reads_total")
#: Names that churn loads beside those that the load asks for.
EXTRA = 4


_START = time.perf_counter()


def say(what: str) -> None:
    """Print where the program is, and after how many seconds."""
    print(f"{time.perf_counter() - _START:6.1f} s: {what}", flush=True)


@dataclass
class Server:
    """A running server: where it is, and how long its start took."""

    url: str
    start_seconds: float
    programs: str

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of an answer."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_KEY}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics(self) -> dict[str, float]:
        """The server's samples, without the prefix of their names."""
        status, text = self.request("/metrics")
        assert status == 200, text
        lines = [line.rpartition(" ") for line in text.decode().splitlines() if line[:1] != "#"]
        return {name.removeprefix("moelora_"): float(value) for name, _, value in lines}


@contextmanager
def serving(options: argparse.Namespace, cache: Path, log: Path) -> Iterator[Server]:
    """A server, until the block ends; then it must drain and end well."""
    command = [*MOELORA, "serve", "--model", str(options.folder / "model"), "--port", "0"]
    for adapter in sorted((options.folder / "adapters").iterdir()):
        command += ["--adapter", f"{adapter.name}={adapter}"]
    command += ["--adapter-root", str(options.folder / "adapters")]
    command += ["--max-adapters", str(options.adapters_on_device)]
    command += ["--max-running", str(options.max_running), "--max-length", "1024"]
    command += ["--max-batch-tokens", str(options.max_batch_tokens)]
    command += ["--memory-fraction", str(options.memory_fraction)]
    environment = os.environ | {
        "MOELORA_ADMIN_KEY": ADMIN_KEY,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        text, shown = "", 0
        while "Serving " not in text:
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{text[-3000:]}")
            time.sleep(0.05)
            text = log.read_text(encoding="utf-8")
            *lines, _ = text.split("\n")
            for line in filter(str.strip, lines[shown:]):
                say(f"server: {line}")
            shown = len(lines)
        seconds = time.perf_counter() - start
        (url,) = re.findall(r"Serving .* on (http://\S+)", text)
        (programs,) = re.findall(r"Ready: (.*)", text)
        say(f"the server has started in {seconds:.1f} s")
        yield Server(url, round(seconds, 1), programs)
    finally:
        say("the server ends")
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        say(f"the server has ended with {status}")
    if status != 0:
        raise RuntimeError(f"the server ended with {status}: {log.read_text()[-3000:]}")


class Churn(threading.Thread):
    """Loads, reloads, asks and unloads adapters until it is stopped.

    Attributes:
        done: how often what was done.
        failed: answers other than 200.
    """

    def __init__(self, server: Server, adapters: Path, pause: float) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._adapters = sorted(adapters.iterdir())
        self._pause = pause
        self._random = random.Random(0)
        self._extra: list[str] = []
        self._stop_event = threading.Event()
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []

    def stop(self) -> None:
        """Ends what it does, and waits for it."""
        self._stop_event.set()
        self.join()

    def run(self) -> None:
        """Of the thread."""
        while not self._stop_event.wait(self._random.expovariate(1 / self._pause)):
            self._random.choice([self._reload, self._load, self._ask, self._unload])()
        while self._extra:
            self._unload()

    def _call(self, what: str, path: str, body: dict[str, Any]) -> None:
        try:
            status, answer = self._server.request(path, body)
        except OSError as error:
            status, answer = 0, str(error).encode()
        self.done[what] += 1
        if status != 200:
            self.failed.append(f"{what}: {status} {answer[:300].decode(errors='replace')}")

    def _reload(self) -> None:
        folder = self._random.choice(self._adapters)
        body = {"lora_name": folder.name, "lora_path": str(folder), "load_inplace": True}
        self._call("reload", "/v1/load_lora_adapter", body)

    def _load(self) -> None:
        names = [f"extra{n}" for n in range(EXTRA) if f"extra{n}" not in self._extra]
        if names:
            body = {"lora_name": names[0], "lora_path": str(self._random.choice(self._adapters))}
            self._call("load", "/v1/load_lora_adapter", body)
            self._extra.append(names[0])

    def _ask(self) -> None:
        if self._extra:
            body = {"model": self._random.choice(self._extra), "prompt": [1, 2, 3]}
            self._call("ask", "/v1/completions", body | {"max_tokens": 4, "ignore_eos": True})

    def _unload(self) -> None:
        if self._extra:
            name = self._extra.pop(self._random.randrange(len(self._extra)))
            self._call("unload", "/v1/unload_lora_adapter", {"lora_name": name})


def measure(server: Server, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The load with churn, and the server's counters behind it; each result as it is known."""
    churn = Churn(server, options.folder / "adapters", options.churn_pause)
    report = folder / "load.json"
    command = [*MOELORA, "bench-serve", server.url, "--json", str(report)]
    command += ["--rate", str(options.rate), "--requests", str(int(options.rate * options.seconds))]
    command += ["--input-lengths", options.input_lengths, "--zipf", str(options.zipf)]
    command += ["--output-lengths", options.output_lengths]
    load_test = subprocess.Popen(command)
    while load_test.poll() is None and not server.metrics()["requests_submitted_total"]:
        time.sleep(0.05)  # The load knows the adapters only now, and must not ask for others.
    churn.start()
    status = load_test.wait()
    if status != 0:
        raise RuntimeError(f"bench-serve ended with {status}")
    load = json.loads(report.read_text())
    yield {"load": load}
    say("the load has ended; what was loaded beside it is unloaded")
    churn.stop()
    metrics = server.metrics()
    problems = [f"{name} is {metrics[name]:g}" for name in ZEROS if metrics[name]]
    problems += [f"failed requests: {load['errors']}"] if load["errors"] else []
    problems += churn.failed
    ended = sum(n for name, n in metrics.items() if name.startswith("requests_finished_total"))
    if metrics["requests_submitted_total"] != ended:
        problems.append(f"{metrics['requests_submitted_total']} submitted, {ended} ended")
    plain = {name: value for name, value in metrics.items() if "{" not in name}
    kinds = {name: n for name, n in metrics.items() if name.startswith("steps_total")}
    yield {
        "problems": problems,
        "churn": dict(churn.done),
        "metrics": {name: n for name, n in plain.items() if not name.startswith("python_")} | kinds,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--input-lengths", default="lognormal:128,0.7,512")
    parser.add_argument("--output-lengths", default="lognormal:64,0.7,256")
    parser.add_argument("--adapters-on-device", type=int, default=16)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=1024)
    parser.add_argument("--memory-fraction", type=float, default=0.9)
    parser.add_argument("--churn-pause", type=float, default=0.5, help="mean seconds between")
    parser.add_argument("--starts", type=int, default=2, help="of the server; the first is loaded")
    parser.add_argument("--programs", type=Path, help="compilation cache; a new one unless given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        **how_made(),
        "versions": {name: _version(name) for name in ("jax", "jax-triton", "triton")},
        "adapters": len(list((options.folder / "adapters").iterdir())),
    }
    report["starts"] = []
    with tempfile.TemporaryDirectory(prefix="moelora-serving-") as temporary:
        folder = Path(temporary)
        cache = options.programs or folder / "programs"
        for start in range(options.starts):
            with serving(options, cache, folder / f"{start}.log") as server:
                report["starts"].append(
                    {"seconds": server.start_seconds, "programs": server.programs}
                )
                write(report, options.json)
                for known in measure(server, options, folder) if start == 0 else ():
                    report |= known
                    write(report, options.json)
    shown = ("starts", "churn", "metrics", "problems")
    print(json.dumps({name: report[name] for name in shown}, indent=1))
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
