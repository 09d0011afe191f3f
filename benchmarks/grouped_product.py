"""Times the products of experts alone: no sort, gather, shrink or combine.

    python -m benchmarks.grouped_product --model mixtral-8x7b --tokens 4096 --json FILE

For products in Mosaic GPU, whose rows are sorted before. A program holds many products, of other
weights and routing each. Beside it stands XLA's dense product of all rows with the matrix of one
expert: as many operations, and what the card reaches at its clock of that moment.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import Device
from benchmarks.moe_layer import layers_of, time_program
from benchmarks.results_file import how_made, write
from benchmarks.workload import MODELS, Point, Workload, activate
from moelora_kernels import backend, sort_tokens
from moelora_kernels.expert_lora.mosaic import grouped_product
from moelora_kernels.tuning.tiles import MosaicTiles

PRODUCTS = ("gate_up", "down")


def measure(point: Point, product: str, budget_s: float, device: Device) -> dict[str, Any] | None:
    """One product: times, operations per second, and the error of a row; None in Triton."""
    config, pairs = point.config, point.tokens * point.config.top_k
    tiles = point.tiles
    how = tiles.gate_up if product == "gate_up" else tiles.down
    if not isinstance(how, MosaicTiles):
        return None
    work = Workload(point, layers_of(point))
    up = product == "gate_up"
    weight = work.params.gate_up if up else work.params.down[:, :, None]
    _, _, parts, width, depth = weight.shape
    rows = jax.random.normal(jax.random.key(0), (pairs, depth), jnp.bfloat16)
    sorts = [
        sort_tokens(
            batch.experts,
            None,
            jnp.int32(point.tokens),
            num_experts=config.num_experts,
            num_adapters=0,
            tile_rows=tiles.tile_rows,
        )
        for batch in work.batches
    ]

    def products(out: Any, rows: Any, weight: Any, sorts: Any) -> Any:
        ref = jax.new_ref(out)
        for step, sort in enumerate(sorts):
            grouped_product(
                rows,
                weight,
                None,
                sort,
                jnp.int32(step % work.layers),
                pairs=pairs,
                tile_rows=tiles.tile_rows,
                activation=config.activation if up else None,
                sites=(),
                rank_activations=None,
                steps=None,
                tiles=how,
                out=ref,
            )
        return jax.freeze(ref)

    def dense(_: Any, rows: Any, weight: Any, sorts: Any) -> Any:
        # All are results, and no two the same: XLA leaves out the others.
        where = [(step % work.layers, step // work.layers) for step in range(len(sorts))]
        return [rows @ weight[place].reshape(-1, depth).T for place in where]

    row: dict[str, Any] = {"model": point.model, "tokens": point.tokens, "product": product}
    flops = 2 * pairs * depth * parts * width
    args = (rows, weight, sorts)
    programs: dict[str, tuple[Any, Any]] = {
        "grouped": (products, jnp.zeros((pairs, width), rows.dtype)),
        "dense": (dense, [jnp.zeros((pairs, parts * width), rows.dtype) for _ in sorts]),
    }
    for name, (program, out) in programs.items():
        compiled = jax.jit(program, donate_argnums=0).lower(out, *args).compile()
        with device.alone():
            row[name], out = time_program(compiled, out, args, work.chained, budget_s)
        row[name]["tflops"] = flops / row[name]["us"] / 1e6
        if name == "grouped":
            row["error"] = error_of_last_row(work, up, weight, rows, out)
    return row


def error_of_last_row(
    work: Workload, up: bool, weight: jax.Array, rows: jax.Array, out: jax.Array
) -> float:
    """Relative error of the last sorted row, against float64."""
    step = work.chained - 1
    expert = int(work.experts[step].max())
    matrices = np.asarray(weight[step % work.layers, expert]).astype(np.float64)
    sums = matrices @ np.asarray(rows[-1]).astype(np.float64)
    expected = activate(*sums, work.point.config.activation) if up else sums[0]
    actual = np.asarray(out[-1]).astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mixtral-8x7b", help=",".join(MODELS))
    parser.add_argument("--tokens", default="4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per timing")
    parser.add_argument("--lock", default="/dev/null", help="file that processes measure under")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.model.split(","):
        for tokens in map(int, arguments.tokens.split(",")):
            for product in PRODUCTS:
                row = measure(
                    Point(model, tokens), product, arguments.budget, Device(arguments.lock)
                )
                if row is None:
                    print(f"{model} {tokens} {product}: in Triton", flush=True)
                    continue
                rows.append(row)
                print(
                    f"{model:14} {tokens:5} {product:8} {row['grouped']['us']:8.1f} us "
                    f"{row['grouped']['tflops']:5.0f} TFLOP/s, dense {row['dense']['tflops']:5.0f}"
                    f"  error {row['error']:.1e}",
                    flush=True,
                )
    report = {
        "device": jax.devices()[0].device_kind,
        "setup": backend.describe(),
        **how_made(),
        "rows": rows,
    }
    write(report, arguments.json)


if __name__ == "__main__":
    main()
