"""Compiling for an H200 on a machine that has no GPU.

Needs ``jax-cuda13-plugin`` and ``jax-cuda13-pjrt`` (of JAX's own version) and ``jax-triton`` beside
JAX for the CPU. Triton kernels are compiled for the card, XLA's passes run, and the buffers are
assigned; only choices that need measurements on the card (autotuned GEMMs) differ from what runs
there.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX's first use of the backend: there is nothing here to tune on.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
# cuDNN is not needed, and it is large.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

TARGET = Path(__file__).parent / "data" / "h200_target_config.txtpb"


def compile_for_h200(function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> Any:
    """Lower and compile ``function`` for one H200.

    Args:
        function: to be jitted.
        *arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``.
        **jit_options: ``donate_argnums`` and the like.

    Returns:
        The compiled program: ``as_text()``, ``memory_analysis()``.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(encoding="utf-8"), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, **jit_options).lower(*jax.tree.map(spec, arguments))
        return lowered.compile()
