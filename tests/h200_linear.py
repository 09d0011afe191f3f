"""Run in a process of its own: compiles linear maps with LoRA for an H200, without and with LoRA.

Prints one JSON list: for each kernel the case, its name, the shared memory of one program, and the
types of the products whose sums start from zero.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
DUMP = tempfile.TemporaryDirectory()
os.environ["JAX_TRITON_DUMP_DIR"] = DUMP.name

from tests.h200_compiler import compile_for_h200  # noqa: E402, I001

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

from moelora_kernels import SIGNALS, LinearMap, SitePages, TokenSort, linear_lora  # noqa: E402

#: Tokens, width, outputs of the maps, adapters, pages of each, dtype.
CASES = (
    (1, 2048, (4096, 512, 512), 16, 1, "bfloat16"),
    (8, 4096, (2048,), 16, 1, "bfloat16"),
    (32, 2048, (4096, 512, 512), 16, 4, "bfloat16"),
    (8, 2048, (4096, 512, 512), 16, 1, "bfloat16"),
    (128, 2048, (4096, 512, 512), 16, 1, "bfloat16"),
    (128, 4096, (2048,), 64, 4, "bfloat16"),
    (128, 320, (192, 192, 9), 64, 4, "bfloat16"),
    # Few columns, of which one step has all.
    (33, 20, (48, 48, 9), 10, 2, "float32"),
    (33, 20, (48, 48, 9), 10, 2, "bfloat16"),
    (512, 2048, (4096, 512, 512), 16, 1, "bfloat16"),
    (4096, 4096, (2048,), 16, 4, "bfloat16"),
    (1100, 136, (272, 272, 9), 64, 8, "bfloat16"),
)


def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def starting_from_zero(file: Path) -> list[str]:
    """Types of a Triton program's products whose sums start from zero, after its own passes."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(str(file), context)
    module.context = context
    backend.make_ttir(module, {}, backend.parse_options({}), 90)
    text = str(module)
    products = re.findall(r"tt\.dot \S+ \S+ (%[\w#]+).*-> tensor<(\w+)>", text)
    zero = r" = arith\.constant dense<0\.0"
    return [shape for start, shape in products if re.search(re.escape(start) + zero, text)]


def main() -> None:
    report = []
    for tokens, width, outputs, adapters, pages, dtype in CASES:
        maps = [
            LinearMap(
                shape(2, out, width, dtype=dtype),
                shape(2, out, dtype=dtype),
                SitePages(
                    shape(800, 16, width, dtype=dtype),
                    shape(800, 16, out, dtype=dtype),
                    shape(2, 2, adapters, pages, 1),
                    shape(2, adapters, 1, dtype="float32"),
                ),
            )
            for out in outputs
        ]
        row = shape(tokens)
        sort = TokenSort(row, row, shape(tokens, 3), None, row)
        for lora in (False, True):

            def program(signals, x, maps, layer, sort, lora=lora):
                counters = jax.new_ref(signals)
                y = linear_lora(
                    x,
                    maps,
                    layer,
                    sort=sort if lora else None,
                    signals=counters,
                    implementation="triton",
                )
                return jax.freeze(counters), y

            before = set(Path(DUMP.name).iterdir())
            x = shape(tokens, width, dtype=dtype)
            arguments = (shape(*SIGNALS), x, maps, jnp.int32(0), sort)
            compile_for_h200(program, *arguments, donate_argnums=0)
            for folder in set(Path(DUMP.name).iterdir()) - before:
                (file,) = folder.glob("*.compile_info")
                (shared,) = re.findall(r"shared_mem_bytes: (\d+)", file.read_text())
                case = [tokens, width, list(outputs), lora]
                kernel = {"case": case, "kernel": file.stem, "shared": int(shared)}
                kernel["from_zero"] = starting_from_zero(file.with_suffix(".ttir"))
                report.append(kernel | {"dtype": dtype})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
