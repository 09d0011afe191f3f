# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Static shapes, donation and capture
#
# A decode step of a small batch takes a GPU well under a millisecond per layer. At that speed
# anything that the host does in between shows: compiling for a new shape, allocating a buffer,
# launching kernels one by one. This notebook measures on a tiny model that none of it happens
# after warm-up, and shows with a program compiled for an H200 why that pays.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import moelora_jax
from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.buckets import CompilationCounter, choose_bucket
from moelora_jax.cli.demo_files import ADAPTERS, MODEL_CONFIG, write_demo
from moelora_jax.engine.memory import plan_memory
from moelora_jax.models import family_of

folder = tempfile.TemporaryDirectory(prefix="moelora-")  # Goes with the kernel.
demo = Path(folder.name)
write_demo(demo, rows=1, seed=0)
runtime = RuntimeConfig(
    lora=LoraConfig(max_adapters=3, max_rank=32),
    buckets=BucketConfig(decode=(8,), prefill=(16, 64)),
    cache=CacheConfig(max_length=64),
)

# %% [markdown]
# ## The memory plan, before anything is allocated
#
# All sizes follow from the model's `config.json` and a `RuntimeConfig`. So the plan can be made
# first, on any machine (`moelora plan` prints it), and what is left of the card goes to the cache.

# %%
family = family_of(MODEL_CONFIG)
config = family.read_config(MODEL_CONFIG)
plan = plan_memory(family, config, runtime, jnp.float32)

arrays_before = {id(array) for array in jax.live_arrays()}
llm = LLM.load(demo / "model", runtime=runtime, dtype=jnp.float32)
for name in ADAPTERS:
    llm.load_adapter(name, demo / "adapters" / name)
report = llm.warm_up()
print(f"{report.programs} programs: with adapters and base only, for buckets of")
print(f"  {runtime.buckets.decode} tokens that decode, and {runtime.buckets.prefill} of prompts")

# %% [markdown]
# There are four adapters and three slots: one of them waits in host memory, and they take turns.
#
# What was allocated is, to the byte, what was planned. JAX itself is the judge: the sum over all
# arrays that live on the device. Only the temporaries are an estimate, made for the GPU; what
# XLA's CPU compiler takes for the reference kernels is another number.

# %%
mine = [array for array in jax.live_arrays() if id(array) not in arrays_before]
live = sum(array.nbytes for array in mine)
planned = plan.total - plan.temporaries
print(f"planned without temporaries {planned:,} bytes, living arrays {live:,} bytes")
assert live == planned
allocated = dict(llm.memory_plan())
parts = {part: size for part, size in plan if size or allocated[part]}

figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
places = np.arange(len(parts))
panel.barh(places - 0.2, [size / 1e6 for size in parts.values()], 0.38, label="planned")
panel.barh(places + 0.2, [allocated[part] / 1e6 for part in parts], 0.38, label="allocated")
panel.set_yticks(places, [part.replace("_", " ") for part in parts])
panel.set(xlabel="megabytes", title="device memory of the tiny model")
panel.invert_yaxis()
panel.legend(frameon=False)
plt.show()

for part, size in plan:
    assert part == "temporaries" or size == allocated[part], part

# %% [markdown]
# ## Buckets: a batch of any size runs a program that exists
#
# `jax.jit` compiles anew for each new shape. In research that is a pause; in serving, where each
# step has another number of tokens, it never ends. So a batch is padded to the smallest *bucket*
# that holds it, and there is one program for each bucket, compiled in advance. Padding tokens are
# dropped before the experts, so they cost little.
#
# Below, 40 batches of random size go through a plain jitted function, and through the engine, which
# also samples, evicts and reloads adapters meanwhile.


# %%
@jax.jit
def unpadded(tokens: jax.Array) -> jax.Array:
    return jnp.cumsum(jnp.tanh(tokens.astype(jnp.float32)))


rng = np.random.default_rng(0)
names = [None, *ADAPTERS]
of_jit, of_engine, all_addresses = [0], [0], [llm.runner.addresses()]
with CompilationCounter() as counter:
    for _ in range(40):
        before = counter.count
        unpadded(rng.integers(9, size=rng.integers(1, 65), dtype=np.int32))
        of_jit.append(of_jit[-1] + counter.count - before)

        before = counter.count
        batch = [
            Prompt(rng.integers(256, size=rng.integers(1, 12)), names[rng.integers(len(names))])
            for _ in range(rng.integers(1, 9))
        ]
        llm.generate(batch, max_new_tokens=int(rng.integers(1, 5)))
        of_engine.append(of_engine[-1] + counter.count - before)
        all_addresses.append(llm.runner.addresses())

sizes = np.arange(1, 65)
buckets = [choose_bucket(runtime.buckets.prefill_buckets(), int(n), 1).tokens for n in sizes]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
left.step(range(41), of_jit, where="post", label="plain jax.jit", color="tab:red")
left.step(range(41), of_engine, where="post", label="the engine", color="tab:blue")
left.set(xlabel="batch", ylabel="compilations since warm-up", title="programs compiled")
left.legend(frameon=False)
right.step(sizes, buckets, where="mid", label="bucket", color="tab:blue")
right.plot(sizes, sizes, color="gray", linestyle=":", label="tokens")
right.set(xlabel="tokens of a prefill batch", ylabel="tokens that the program sees")
right.set(title="padding", xticks=range(0, 65, 16), yticks=range(0, 65, 16))
right.legend(frameon=False)
plt.show()
print(f"compilations: plain jit {of_jit[-1]}, engine {of_engine[-1]}")
assert of_engine[-1] == 0 and of_jit[-1] > 20

# %% [markdown]
# ## Donation: nothing moves
#
# A function of JAX returns new arrays, so state that is updated in each step would be allocated
# and copied each time. A *donated* argument gives its memory to the result instead. Here all
# scratch, the KV cache and the adapter pages are donated, and come back at the same address:
# what an in-place update is elsewhere. For a comparison, the same update of a small array once
# without donation, once with it.

# %%
copied = jax.jit(lambda state: state + 1)
donated = jax.jit(lambda state: state + 1, donate_argnums=0)


def trail(step, steps: int = 40) -> np.ndarray:
    """The address of a state of 1 MiB after each step, in bytes from the first one."""
    state, seen, kept = step(jnp.zeros(2**18)), [], []
    for index in range(steps):
        seen.append(state.unsafe_buffer_pointer())
        new = step(state)
        if index % 3 == 0 and not state.is_deleted():
            kept.append(state)  # Someone else holds on to memory, as in any real program.
        state = new
    return np.array(seen) - seen[0]


arrays = {kind: len(addresses) for kind, addresses in all_addresses[0].items()}
offsets = {
    kind: np.array([seen[kind] for seen in all_addresses]) - np.array(all_addresses[0][kind])
    for kind in arrays
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
left.plot(trail(copied) / 2**20, ".", color="tab:red", label="not donated")
left.plot(trail(donated) / 2**20, "-", color="tab:blue", label="donated")
left.set(xlabel="step", ylabel="address, MiB from the first", title="one array, a toy program")
left.legend(frameon=False)
for index, (kind, offset) in enumerate(offsets.items()):
    label = f"{kind.replace('_', ' ')}: {arrays[kind]} arrays"
    right.plot(np.abs(offset).max(axis=1) / 2**20, label=label, linewidth=6 - 2 * index)
right.set(xlabel="batch", ylabel="largest move, MiB", ylim=(-0.5, 5), title="the engine's arrays")
right.legend(frameon=False)
plt.show()
print(
    "arrays that have moved:", {kind: int(offset.any(0).sum()) for kind, offset in offsets.items()}
)
assert not any(offset.any() for offset in offsets.values())

# %% [markdown]
# ## Capture: what an H200 would run
#
# XLA records launches into *command buffers* (CUDA graphs): the GPU then gets a whole chain of
# kernels at once, instead of one after the other at some 2 to 5 µs each. A graph holds addresses,
# so it must be recorded anew when a buffer moves. That is the second reason for donation.
#
# No GPU is needed to see this. JAX's CUDA plugin compiles for a card that is only described, and
# XLA dumps the sequence of *thunks* (its units of execution). The script runs in a process of its
# own, as the flags must be set before JAX starts. Its model has the architecture of Qwen3-MoE with
# three layers in bfloat16, and a decode step of 8 sequences with LoRA is compiled.

# %%
root = Path(moelora_jax.__file__).parent.parent
plugin = Path(sys.prefix) / "h200"
program = None
if plugin.is_dir():
    paths = map(str, (plugin, root, root / "kernels"))
    done = subprocess.run(
        [sys.executable, root / "tests" / "h200_programs.py", "decode lora"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    program = json.loads(done.stdout.splitlines()[-1])["decode lora"]
    print("top of the program: ", " > ".join(program["top"]))
    print("body of the loop:   ", " > ".join(program["body"]))
    print("our Triton kernels: ", program["in_body"].count("CustomCall"), "in a layer")
else:
    print(f"This part is skipped: JAX's CUDA plugin is not in {plugin.name}/ of the environment,")
    print("where `make setup` installs it. It compiles for a GPU that is not there.")

# %% [markdown]
# The layers are one loop inside the program, and the body of the loop is one command buffer. So
# the host starts a layer with one launch, however many kernels there are, and the program is as
# long for 48 layers as for three: dozens of buckets compile in seconds.
#
# Parameters are stacked over layers. Our kernels take the whole stack and a layer index, so no
# weight of an expert is ever copied. XLA's own products cannot do that: the copies at the beginning
# cut one layer's attention weights, norms and router out of their stacks, on streams of their own.

# %%
KINDS = {
    "CustomCall": ("our Triton kernels", "tab:blue"),
    "CustomKernel": ("XLA's fusions and products", "tab:orange"),
    "Copy": ("copies of a layer's weights", "tab:red"),
}


def draw_box(panel, x: float, y: float, width: float, text: str, color: str) -> None:
    panel.add_patch(Rectangle((x, y), width, 0.8, facecolor=color, edgecolor="black", alpha=0.7))
    panel.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=9)


if program is not None:
    # Async marks only order streams, and a slice fusion is the copy that follows it.
    markers = ("AsyncStart", "AsyncDone", "DynamicSliceFusion")
    launches = [kind for kind in program["in_body"] if kind not in markers]
    figure, panel = plt.subplots(figsize=(10, 2.6), layout="constrained")
    slots = len(launches)
    for index, kind in enumerate(program["top"]):
        x = index * slots / len(program["top"])
        draw_box(panel, x, 2.4, slots / len(program["top"]) - 0.5, kind, "#dddddd")
    draw_box(panel, 0, 1.3, slots - 0.5, " > ".join(program["body"]), "#dddddd")
    seen = set()
    for index, kind in enumerate(launches):
        text, color = KINDS.get(kind, (kind, "gray"))
        panel.add_patch(
            Rectangle((index, 0.2), 0.8, 0.8, color=color, label=None if kind in seen else text)
        )
        seen.add(kind)
    panel.set_yticks([2.8, 1.7, 0.6], ["program", "body of the loop\nover layers", "inside it"])
    panel.set(xlim=(-0.5, slots), ylim=(0, 3.4), xlabel="launch within a layer")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=4, frameon=False)
    plt.show()

    assert program["top"] == ["CommandBuffer", "While", "CommandBuffer"]
    assert program["body"] == ["CommandBuffer"]

# %% [markdown]
# The compiler also says which bytes it updates in place. All that is donated is aliased, so no step
# allocates state; what is new is the sampled tokens and their log-probabilities.

# %%
if program is not None:
    for name in ("donated_bytes", "aliased_bytes", "new_output_bytes", "temporary_bytes"):
        print(f"{name.replace('_', ' '):17} {program[name]:>9,}")
    assert program["donated_bytes"] == program["aliased_bytes"]
