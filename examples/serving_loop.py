"""A serving loop written by hand, on the public functions alone: no engine, no server.

Six requests with four adapters share three seats and two adapter slots. A request takes the first
seat that is free, and its adapter is written, in place, into a slot that no running request uses.
Each step is padded to a bucket and runs the bucket's program; all are compiled before the first.

    moelora demo --folder demo
    python examples/serving_loop.py demo
"""

import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moelora_jax import BucketConfig, CacheConfig, LoraConfig, RuntimeConfig, buckets, workspace
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.buckets import BatchLayout, ProgramKey
from moelora_jax.models import load_model

# Everything that decides a shape.
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=2, max_rank=32, pool_rank=32),
    buckets=BucketConfig(decode=(1, 3), prefill=(32,)),
    cache=CacheConfig(max_length=32, block_size=8),
)
NEW_TOKENS = 8
REQUESTS = (
    ([1, 2, 3, 4, 5], "experts-r8"),
    ([6, 7], None),
    ([8, 9, 10], "both-r16"),
    ([11, 12, 13, 14, 15, 16, 17], "experts-r24"),
    ([18, 19], "attention-r3"),
    ([1, 2, 3, 4, 5], "experts-r24"),
)


@dataclass
class Request:
    """A prompt and what was generated; ``in_cache`` tokens have their keys and values stored."""

    tokens: list[int]
    adapter: str | None
    end: int
    in_cache: int = 0
    seat: int = -1
    slot: int = -1


def layout_of(key: ProgramKey) -> BatchLayout:
    """How a step is packed into one int32 vector."""
    return BatchLayout(key.bucket, RUNTIME.cache.blocks_per_sequence)


def pack(key: ProgramKey, rows: list[Request]) -> np.ndarray:
    """A step: of each row the tokens that are not in the cache yet."""
    layout = layout_of(key)
    packed, blocks, start = layout.padding(), np.arange(layout.blocks_per_sequence), 0
    batch = layout.unpack(packed)  # Views, to be filled in.
    for row, request in enumerate(rows):
        new = request.tokens[request.in_cache :]
        here = slice(start, start + len(new))
        batch.tokens[here] = new
        batch.positions[here] = np.arange(request.in_cache, len(request.tokens))
        batch.adapter_of_token[here] = request.slot
        batch.sequence_of_token[here] = row
        batch.query_counts[row] = len(new)
        batch.last_token[row] = here.stop - 1
        # Each seat owns the cache blocks of one sequence. Block 0 is for padding.
        batch.block_table[row] = 1 + request.seat * len(blocks) + blocks
        start = here.stop
    batch.num_tokens[...] = start
    return packed


def compile_programs(graph: Any, params: Any, pool: PagePool, state: Any) -> buckets.Programs:
    """A program for each bucket, with LoRA and without, its first argument donated."""

    def build(key: ProgramKey) -> Any:
        def step(state: Any, params: Any, pages: Any, packed: jax.Array) -> Any:
            refs, batch = workspace.open_state(state), layout_of(key).unpack(packed)
            model: Any = nnx.merge(graph, params)
            by_site = pool.by_site(pages) if key.lora else None
            hidden = model(batch, refs.cache, refs.workspace, by_site)
            logits = model.logits(hidden, batch, refs.workspace, by_site, last_only=True)
            return workspace.close_state(refs), jnp.argmax(logits, axis=-1)

        return step

    def arguments(key: ProgramKey) -> Any:
        pages = pool.device_pages() if key.lora else None
        packed = jax.ShapeDtypeStruct((layout_of(key).size,), jnp.int32)
        return (*jax.tree.map(jax.typeof, (state, params, pages)), packed)

    programs = buckets.Programs(build, arguments)
    programs.compile(buckets.program_keys(RUNTIME.buckets, ("prefill", "decode")))
    pool.warm_up()
    return programs


def serve(folder: Path) -> tuple[list[Request], dict[str, int]]:
    """Runs the requests on a demo's files; returns them complete, and what was counted."""
    model, config, family = load_model(folder / "model", jnp.float32)
    graph, params = nnx.split(model)
    pool, adapters = PagePool(config.lora_sites(), RUNTIME.lora, jnp.float32), {}
    for name in {name for _, name in REQUESTS if name}:
        path, sites = folder / "adapters" / name, config.lora_sites()
        adapters[name] = pool.pack(read_adapter(path, sites, module_names=family.module_names))
    # Workspaces and KV cache: allocated here, donated to every step, returned by it.
    state = workspace.allocate(workspace.device_state_shapes(config, RUNTIME, jnp.float32))
    programs = compile_programs(graph, params, pool, state)
    before = workspace.addresses((state, pool.device_pages()))

    requests = [Request([*tokens], name, len(tokens) + NEW_TOKENS) for tokens, name in REQUESTS]
    waiting, running = deque(requests), list[Request]()
    in_slot: dict[int, str | None] = dict.fromkeys(range(RUNTIME.lora.max_adapters))
    steps = writes = 0
    with buckets.CompilationCounter() as compilations:
        while waiting or running:
            new: list[Request] = []
            seats = set(range(RUNTIME.buckets.max_sequences)) - {r.seat for r in running}
            while waiting and seats:
                request = waiting[0]
                if request.adapter is not None:
                    resident = [s for s, name in in_slot.items() if name == request.adapter]
                    unused = sorted(in_slot.keys() - {r.slot for r in running})
                    if not (resident or unused):
                        break  # Until a request that holds a slot is done.
                    request.slot = (resident or unused)[0]
                    if not resident:
                        pool.write(request.slot, adapters[request.adapter])
                        in_slot[request.slot] = request.adapter
                        writes += 1
                request.seat = seats.pop()
                new.append(waiting.popleft())
                running.append(request)

            # A step is the prompts of those that are new, or else one token of all.
            rows, sizes = new or running, RUNTIME.buckets
            num_tokens = sum(len(r.tokens) - r.in_cache for r in rows)
            fitting = sizes.prefill_buckets() if new else sizes.decode_buckets()
            bucket = buckets.choose_bucket(fitting, num_tokens, len(rows))
            lora = any(r.adapter for r in rows)
            key = ProgramKey("prefill" if new else "decode", bucket, lora)
            # The pages anew in each step: writing them donates the arrays of before.
            pages = pool.device_pages() if lora else None
            packed = jax.device_put(pack(key, rows))
            state, chosen = programs[key](state, params, pages, packed)
            for request, token in zip(rows, np.asarray(chosen).tolist(), strict=False):
                request.in_cache = len(request.tokens)
                request.tokens.append(token)
            running = [r for r in running if len(r.tokens) < r.end]
            steps += 1

    after = workspace.addresses((state, pool.device_pages()))
    return requests, {
        "steps": steps,
        "programs": len(programs),
        "adapters written between steps": writes,
        "compilations after warm-up": compilations.count,
        "arrays moved": sum(map(int.__ne__, before, after)),
    }


def main(folder: Path) -> None:
    """Serves, and prints the generated tokens and what was counted."""
    requests, counts = serve(folder)
    for request in requests:
        print(f"{request.adapter or 'base':12}", request.tokens[-NEW_TOKENS:])
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
