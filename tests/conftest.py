"""What all tests share: strict dtypes, checked shapes, Hypothesis profiles, GPU tests skipped."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Several pytest workers share one GPU, so none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Most of the time goes into compiling programs that run for milliseconds. Those of a GPU must be
# the ones of production.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Mixing dtypes without saying so is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Workers and later runs share what was compiled.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "test-programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# One compilation may take seconds, so there is no deadline. CI draws the same examples every time.
hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _checked_modules() -> list[str]:
    """All modules of both packages but those with Triton kernels, whose source Triton reads."""
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for root, package in ((ROOT, "moelora_jax"), (ROOT / "kernels", "moelora_kernels"))
        for path in sorted((root / package).rglob("*.py"))
        if path.name != "__init__.py" and "triton.jit" not in path.read_text(encoding="utf-8")
    ]


# Shapes and dtypes in annotations are checked at every call. This must come before the first import
# of the packages. A GPU machine may lack beartype; CI does not.
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the tests' own checks of types, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none"))


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
