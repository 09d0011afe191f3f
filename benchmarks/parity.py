"""Runs ``moelora parity`` in bfloat16 on models of real widths, a few layers, and random weights.

    python -m benchmarks.parity --torch-device cuda --parallel 3 --json FILE

For each family it writes a checkpoint and adapters of four layouts to a temporary folder, compares
a mixed batch with PyTorch in float32, and deletes them. Router choices of random models are nearly
ties, which rounding decides; what PyTorch's own bfloat16 does stands beside.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.random_files import (
    MODELS,
    Numbers,
    model_config,
    write_adapter,
    write_checkpoint,
    write_shared_outer,
)
from benchmarks.results_file import how_made, write
from moelora_jax.models import family_of

#: Layers to run. gpt-oss has two kinds of attention, DeepSeek a dense first layer.
LAYERS = {
    "qwen3-30b-a3b": 4,
    "gpt-oss-20b": 2,
    "mixtral-8x7b": 2,
    "olmoe-1b-7b": 4,
    "deepseek-v2-lite": 3,
    "deepseek-v3": 3,
}
#: A smaller vocabulary changes little but the time that PyTorch's logits take.
VOCABULARY = 32768


def write_files(folder: Path, name: str, *, tiny: bool) -> list[str]:
    """A checkpoint and its adapters; returns the adapters' names."""
    raw = model_config(name, layers=LAYERS[name], vocabulary=VOCABULARY, tiny=tiny)
    write_checkpoint(folder / "model", raw)
    family = family_of(raw)
    config = family.read_config(raw)
    numbers = Numbers(1)
    for adapter, rank, layout in (
        ("everything-r16", 16, "per_expert"),
        ("everything-fused-r8", 8, "peft_fused"),
    ):
        write_adapter(folder / adapter, family, config, numbers, rank=rank, layout=layout)
    write_adapter(
        folder / "attention-r64",
        family,
        config,
        numbers,
        rank=64,
        layout="peft_fused",
        changes=lambda site: not site.optional and site.name.endswith(("q_proj", "o_proj")),
    )
    write_shared_outer(folder / "shared-outer-r32", config, numbers, rank=32)
    return ["everything-r16", "everything-fused-r8", "attention-r64", "shared-outer-r32"]


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What ``moelora parity`` reports of one family, and how long it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=options.folder) as temporary:
        folder = Path(temporary)
        adapters = write_files(folder, name, tiny=options.tiny)
        written = time.perf_counter()
        report = folder / "report.json"
        command = [sys.executable, "-c", "from moelora_jax.cli import app; app()", "parity"]
        command += ["--model", str(folder / "model"), "--dtype", options.dtype]
        for adapter in adapters:
            command += ["--adapter", f"{adapter}={folder / adapter}"]
        command += ["--random", str(options.rows), "--length", str(options.length)]
        command += ["--generate", str(options.generate), "--json", str(report)]
        command += ["--torch-device", options.torch_device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
        print(f"== {name}\n{done.stdout}", flush=True)
        if not report.exists():
            raise RuntimeError(done.stderr[-4000:])
        found: dict[str, Any] = json.loads(report.read_text())
    del found["folders"]
    return found | {
        "model": name,
        "layers_run": LAYERS[name],
        "write_s": round(written - start, 1),
        "parity_s": round(time.perf_counter() - written, 1),
    }


def print_summary(reports: dict[str, dict[str, Any]]) -> None:
    """A table of Markdown."""
    print("| model | log p | PyTorch's | same experts | PyTorch's | next tokens | generated |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, report in reports.items():
        if "total" not in report:
            print(f"| {name} | failed |")
            continue
        ours, own = report, report["torch_in_dtype"] or report
        cells = [f"{side['total']['log_probabilities']:.1e}" for side in (ours, own)]
        cells += [
            f"{min(layer['equal_choices'] for layer in side['layers']):.1%}" for side in (ours, own)
        ]
        cells += [
            f"{kind['decided'] - kind['different']} of {kind['decided']}"
            for kind in (report["next_tokens"], report["generated"])
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(LAYERS))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--torch-device", default="cpu")
    parser.add_argument("--rows", type=int, default=4, help="of the base and of each adapter")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=1, help="families at once")
    parser.add_argument("--timeout", type=float, help="seconds that one family may take")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--tiny", action="store_true", help="tiny widths, for a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reports: dict[str, dict[str, Any]] = {}

    def run_one(name: str) -> None:
        try:
            reports[name] = run(name, options)
        except Exception:
            traceback.print_exc()
            reports[name] = {"model": name, "error": traceback.format_exc()[-2000:]}
        versions = {name: version(name) for name in ("jax", "torch", "transformers", "peft")}
        models = list(reports.values())
        write({**how_made(), "versions": versions, "models": models}, options.json)

    names = options.models.split(",")
    unknown = set(names) - set(MODELS)
    if unknown:
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(run_one, names))
    print_summary({name: reports[name] for name in names})


if __name__ == "__main__":
    main()
