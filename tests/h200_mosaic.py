"""Run in a process of its own: compiles layers with Mosaic kernels for an H200.

Prints one JSON object: for each program the launches inside of its loop over layers, its bytes, and
what the assembler says of each Mosaic kernel.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
FOLDER = Path(tempfile.mkdtemp())
os.environ["MOSAIC_GPU_DUMP_TO"] = str(FOLDER)
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

from tests.h200_programs import DUMP, thunks  # noqa: E402, I001

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import triton  # noqa: E402
from jax.experimental.pallas import mosaic_gpu  # noqa: E402, F401

from moelora_jax.config import MoeConfig  # noqa: E402
from moelora_jax.moe import MoeParams, moe_experts, moe_workspace_shapes  # noqa: E402
from moelora_jax.workspace import num_bytes  # noqa: E402
from moelora_kernels import ExpertPages, SitePages  # noqa: E402
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles, ShrinkTiles  # noqa: E402
from tests.h200_compiler import compile_for_h200  # noqa: E402

#: Layer, whether it has biases, and rows of a tile: Qwen3-30B-A3B and gpt-oss-20b. More than 128
#: rows need registers that JAX gives before 0.12 only.
PROGRAMS = {
    "qwen": (MoeConfig(128, 8, 2048, 768), False, 128),
    "gpt-oss": (MoeConfig(32, 4, 2880, 2880, activation="clamped_swiglu"), True, 96),
}
NUM_LAYERS, TOKENS, ADAPTERS, RANK = 3, 512, 16, 32
SHRINK = ShrinkTiles(block_k=256, num_warps=2, num_stages=3, run_rows=16)


def use_tools_of_triton() -> None:
    """Mosaic looks for ptxas and libdevice where CUDA is installed. Triton brings both."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia"
    for name, file in (
        ("bin/ptxas", "bin/ptxas"),
        ("bin/nvdisasm", "bin/nvdisasm"),
        ("nvvm/libdevice/libdevice.10.bc", "lib/libdevice.10.bc"),
    ):
        link = FOLDER / "cuda" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tools / file)
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(FOLDER / "cuda")


def arguments(config: MoeConfig, bias: bool) -> tuple[Any, ...]:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def array(*shape: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def site(width: int, out: int) -> SitePages:
        return SitePages(
            array(99, 16, width),
            array(99, 16, out),
            array(NUM_LAYERS, 2, ADAPTERS, RANK // 16, experts, dtype="int32"),
            array(NUM_LAYERS, ADAPTERS, experts, dtype="float32"),
        )

    params = MoeParams(
        array(NUM_LAYERS, experts, hidden),
        array(NUM_LAYERS, experts, 2, inner, hidden),
        array(NUM_LAYERS, experts, hidden, inner),
        gate_up_bias=array(NUM_LAYERS, experts, 2, inner) if bias else None,
        down_bias=array(NUM_LAYERS, experts, hidden) if bias else None,
    )
    pages = ExpertPages(site(hidden, inner), site(hidden, inner), site(inner, hidden))
    workspace = moe_workspace_shapes(
        config, TOKENS, num_adapters=ADAPTERS, max_rank=RANK, dtype="bfloat16"
    )
    choices = (TOKENS, config.top_k)
    return (
        (workspace, array(TOKENS, hidden)),
        array(TOKENS, hidden),
        (array(*choices, dtype="int32"), array(*choices, dtype="float32")),
        params,
        pages,
        array(TOKENS, dtype="int32"),
    )


def main() -> None:
    use_tools_of_triton()
    report = {}
    for name, (config, bias, tile_rows) in PROGRAMS.items():
        tiles = MoeTiles(tile_rows, MosaicTiles(SHRINK), MosaicTiles(SHRINK))

        def step(
            state: Any,
            x: Any,
            routing: Any,
            params: Any,
            pages: Any,
            adapters: Any,
            config: MoeConfig = config,
            tiles: MoeTiles = tiles,
        ) -> Any:
            refs, out = jax.tree.map(jax.new_ref, state)

            def layer(number: Any, _: None) -> None:
                moe_experts(
                    x,
                    *routing,
                    params,
                    number,
                    config,
                    adapter_of_token=adapters,
                    pages=pages,
                    workspace=refs,
                    out=out,
                    implementation="triton",
                    tiles=tiles,
                )

            jax.lax.fori_loop(jnp.int32(0), NUM_LAYERS, layer, None)
            return jax.tree.map(jax.freeze, (refs, out))

        before = set(Path(DUMP.name).iterdir())
        messages = set(FOLDER.glob("*.ptxas"))
        args = arguments(config, bias)
        program = compile_for_h200(step, *args, donate_argnums=0)
        (sequence,) = (
            path
            for path in set(Path(DUMP.name).iterdir()) - before
            if path.name.endswith("jit_step.thunk_sequence_after_thunk_passes.txt")
        )
        memory = program.memory_analysis()
        report[name] = {
            "donated_bytes": num_bytes(args[0]),
            "aliased_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "assembler": [
                path.read_text() for path in sorted(set(FOLDER.glob("*.ptxas")) - messages)
            ],
            **thunks(sequence.read_text()),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
