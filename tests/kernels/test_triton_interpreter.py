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
def test_triton_kernels_under_the_interpreter() -> None:
    here = Path(__file__).parent
    roots = (here.parent.parent, here.parent.parent / "kernels", here)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
    }
    result = subprocess.run(
        [sys.executable, str(here / "triton_interpreter.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
