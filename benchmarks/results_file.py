"""What every file of results begins with, and how it is written."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def how_made() -> dict[str, str]:
    """The date, and the command that this process runs."""
    module = sys.modules["__main__"].__spec__
    program = sys.argv[0] if module is None else f"-m {module.name}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", program, *sys.argv[1:]]),
    }


def write(report: Mapping[str, Any], file: Path | None) -> None:
    """Write a report, if there is a file for it."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
