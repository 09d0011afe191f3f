"""Whole programs compiled for an H200 without one: what is captured, aliased and temporary."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelora_kernels.tuning.tiles import SHARED_MEMORY

#: JAX's GPU plugin alone, where `make setup` puts it.
PLUGIN = Path(sys.prefix) / "h200"
ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not PLUGIN.is_dir(), reason="needs JAX's GPU plugin in .venv/h200, which `make setup` installs"
)


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, Any]]:
    return compiled("h200_programs.py")


@pytest.fixture(scope="module")
def mosaic_programs() -> dict[str, dict[str, Any]]:
    return compiled("h200_mosaic.py")


def compiled(script: str) -> Any:
    path = os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script],
        # Not the flags of the other tests: this is code for a GPU.
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


PROGRAMS = [
    "decode lora",
    "decode base",
    "prefill lora",
    "long prefill lora",
    "tiny lora",
    "decode everywhere",
    "prefill everywhere",
    "decode deepseek",
    "prefill deepseek",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_donated_byte_is_updated_in_place(programs: dict[str, Any], name: str) -> None:
    program = programs[name]
    assert program["aliased_bytes"] == program["donated_bytes"]
    # For each row a token, its log-probability, 20 best tokens with theirs; and the table of the
    # tuple that holds all results.
    assert program["new_output_bytes"] <= program["rows"] * 4 * (2 + 2 * 20) + 512


def test_the_layers_of_a_decode_step_are_one_command_buffer(programs: dict[str, Any]) -> None:
    """No launch of a decode step is outside of a command buffer but the loop's own condition."""
    for name in ("decode lora", "decode base", "decode everywhere", "decode deepseek"):
        program = programs[name]
        assert program["top"] == ["CommandBuffer", "While", "CommandBuffer"]
        assert program["body"] == ["CommandBuffer"]


@pytest.mark.parametrize(
    "name", ["decode lora", "decode base", "prefill lora", "long prefill lora"]
)
def test_a_layer_copies_no_weights_and_has_few_launches(
    programs: dict[str, Any], name: str
) -> None:
    """Two norms, q/k/v, heads, attention and its join, o, router, its choice, and the experts."""
    launches = programs[name]["in_body"]
    assert "Copy" not in launches
    assert "DynamicSliceFusion" not in launches
    # The last one counts the layers; a prompt's experts are four launches, and its shrinks two. A
    # long one's sort is three, and its rows are copied.
    most = {"decode": 11, "prefill": 16, "long": 20}
    assert len(launches) <= most[name.split()[0]]


PREFILLS = ["prefill lora", "long prefill lora", "prefill everywhere", "prefill deepseek"]


@pytest.mark.parametrize("name", PREFILLS)
def test_the_layers_of_a_prefill_step_are_one_command_buffer(
    programs: dict[str, Any], name: str
) -> None:
    program = programs[name]
    assert program["top"].count("While") == 1
    assert program["body"] == ["CommandBuffer"]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_adapters_outside_of_the_experts_cost_no_copies(
    programs: dict[str, Any], kind: str
) -> None:
    """What they change is added in place: to the router's logits, embeddings, and the head's."""
    with_them, without = programs[f"{kind} everywhere"], programs[f"{kind} lora"]
    assert with_them["copies"] <= without["copies"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_sorted_by_xla(programs: dict[str, Any], name: str) -> None:
    """On a GPU it may give a sort to a library, which no command buffer can hold.

    Then the conditional around it is decided on the host, which waits for the step. Without a GPU
    XLA does not know that library, so the programs compiled here cannot show it.
    """
    assert programs[name]["sorts"] == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_temporaries_are_small(programs: dict[str, Any], name: str) -> None:
    """The workspaces hold what is large; logits and partial attention results are what is left."""
    assert programs[name]["temporary_bytes"] < 4 * 2**20


def test_launches_in_place_are_not_fused_with_slices() -> None:
    """Such a fusion of XLA forgets that a launch writes over its operands."""
    for program in compiled("h200_slices.py").values():
        assert program["launches"] > 0
        assert program["fused"] == 0


def test_mosaic_kernels_are_captured_and_in_place(mosaic_programs: dict[str, Any]) -> None:
    for program in mosaic_programs.values():
        assert program["body"] == ["CommandBuffer"]
        assert program["aliased_bytes"] == program["donated_bytes"]
        # The lists of LoRA steps.
        assert program["temporary_bytes"] < 2**20


def test_mosaic_kernels_keep_their_sums_in_registers(mosaic_programs: dict[str, Any]) -> None:
    """The assembler gives up overlapping products when it runs out of registers, and says so."""
    for program in mosaic_programs.values():
        assert len(program["assembler"]) == 2
        for message in program["assembler"]:
            assert "sm_90a" in message
            assert "serialized" not in message
            assert "0 bytes spill stores, 0 bytes spill loads" in message


def test_linear_maps_fit_into_shared_memory() -> None:
    """Where they do not, the launch fails on the GPU, and nowhere before."""
    kernels = compiled("h200_linear.py")
    names = {"linear_tiles", "shrink_tiles", "multiply_tiles"}
    assert {kernel["kernel"] for kernel in kernels} == names
    # Two for each case; those of many rows have two launches with LoRA.
    assert len(kernels) == 27
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY["9.0"], kernel
    # Where one step has all columns, Triton has the sum start from the bias, if that is added next.
    # It must do so with LoRA as it does without, or rows of the base model are rounded otherwise.
    for dtype in ("float32", "bfloat16"):
        from_zero = {
            kernel["case"][-1]: kernel["from_zero"]
            for kernel in kernels
            if kernel["case"][1] == 20 and kernel["dtype"] == dtype
        }
        # A shrink multiplies pages of 16 rows with 16 rows.
        assert from_zero == {False: [], True: ["16x16xf32"]}
