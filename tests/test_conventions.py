"""The rules of the house, so that they need no reviewer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parent.parent

#: From the ground to the roof. A module imports from its own floor and from those before it.
FLOORS = (
    "moelora_kernels",
    "errors",
    "config",
    "files",
    "safetensors_file",
    "adapters",
    "moe",
    "workspace",
    "buckets",
    "models",
    "engine",
    "server",
    "parity",
    "load_test",
    "cli",
)
#: Not installed with the core package, so imported only inside the functions that need them.
OPTIONAL = {"aiohttp", "jax_triton", "matplotlib", "peft", "torch", "transformers"}
#: The same, but the floor that is nothing without them imports them as others do.
OPTIONAL_BUT_ON_ONE_FLOOR = {
    "fastapi": "server",
    "jinja2": "server",
    "prometheus_client": "server",
    "pydantic": "server",
    "starlette": "server",
    "uvicorn": "server",
}

#: Module name, and its source.
MODULES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root, package in ((ROOT / "kernels", "moelora_kernels"), (ROOT, "moelora_jax"))
    for path in sorted((root / package).rglob("*.py"))
}


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that is imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level:
                base = base[: len(base) - node.level + is_package]
                base += node.module.split(".") if node.module else []
            else:
                base = node.module.split(".")
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def _floor(module: str) -> int | None:
    """Index of the floor; one past the roof for the public face; None for other packages."""
    package, _, rest = module.partition(".")
    if package == "moelora_kernels":
        return 0
    if package != "moelora_jax":
        return None
    name = rest.partition(".")[0]
    return FLOORS.index(name) if name in FLOORS else len(FLOORS)


def _forbidden_imports(module: str, source: str, is_package: bool) -> list[str]:
    own = _floor(module)
    return [
        f"{module}, line {line}: imports {name}"
        for line, name in _imports(ast.parse(source), module, is_package)
        if (floor := _floor(name)) is not None and floor > own
    ]


def _eager_imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top package of the imports that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name.partition(".")[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.lineno, child.module.partition(".")[0]
        else:
            yield from _eager_imports(child)


def _is_optional(package: str, module: str) -> bool:
    floor = OPTIONAL_BUT_ON_ONE_FLOOR.get(package)
    return package in OPTIONAL or (
        floor is not None and not module.startswith(f"moelora_jax.{floor}.")
    )


def test_modules_import_only_from_floors_below() -> None:
    found = [
        line
        for module, path in MODULES.items()
        for line in _forbidden_imports(
            module, path.read_text(encoding="utf-8"), path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


def test_every_module_has_a_floor() -> None:
    public_face = {"moelora_jax", "moelora_jax.public"}
    found = [name for name in MODULES if _floor(name) == len(FLOORS) and name not in public_face]
    assert not found, f"add these to FLOORS and to CONTRIBUTING.md: {found}"


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("moelora_kernels.sort.api", "from moelora_kernels.sort import reference", True),
        ("moelora_kernels.sort.api", "from moelora_jax import config", False),
        ("moelora_kernels.sort.api", "def f():\n    import moelora_jax.config", False),
        ("moelora_jax.config", "from moelora_jax.errors import CapacityError", True),
        ("moelora_jax.errors", "from . import config", False),
        ("moelora_jax.adapters.pool", "from .registry import Registry", True),
        ("moelora_jax.adapters.pool", "from ..moe import layer", False),
        ("moelora_jax.adapters.pool", "from moelora_jax import Engine", False),
        ("moelora_jax.cli", "from moelora_jax.server import http", True),
    ],
)
def test_the_import_rule_itself(module: str, source: str, allowed: bool) -> None:
    assert (not _forbidden_imports(module, source, is_package=False)) == allowed


def test_optional_packages_are_imported_lazily() -> None:
    found = [
        f"{module}, line {line}: imports {name} at module level"
        for module, path in MODULES.items()
        for line, name in _eager_imports(ast.parse(path.read_text(encoding="utf-8")))
        if _is_optional(name, module)
    ]
    assert not found, "\n".join(found)


def test_dtype_promotion_is_strict() -> None:
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


def test_annotations_of_both_packages_are_checked() -> None:
    pytest.importorskip("beartype")
    from moelora_jax.config import MoeConfig

    with pytest.raises(TypeCheckError, match="num_experts"):
        MoeConfig(num_experts=8.0, top_k=2, hidden_size=16, intermediate_size=16)


def test_a_wrong_shape_raises() -> None:
    pytest.importorskip("beartype")
    from moelora_kernels import route

    route(jnp.ones((2, 4)), top_k=2)
    with pytest.raises(TypeCheckError, match="logits"):
        route(jnp.ones((2, 4, 1)), top_k=2)
