"""The Triton kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and importlib.util.find_spec("torch")),
    reason="Triton's interpreter needs triton and torch",
)
@pytest.mark.parametrize(
    "script", ["triton_interpreter", "mosaic_interpreter", "attention_interpreter"]
)
def test_triton_kernels_under_the_interpreter(script: str) -> None:
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }
    result = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{script}"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
