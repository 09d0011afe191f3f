"""Choosing an implementation, and the only door to jax-triton.

``jax_triton`` raises ImportError where JAX has no GPU plugin, so it is imported here alone, and
only when a Triton kernel is about to be launched.
"""

import functools
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.types import Buffer

Implementation = Literal["reference", "triton"]

_log = logging.getLogger(__name__)

#: Oldest NVIDIA GPUs whose tensor cores know bfloat16.
MIN_COMPUTE_CAPABILITY = 8.0


class Launch(NamedTuple):
    """How a Triton kernel is launched, besides its arguments.

    Attributes:
        grid: programs along each axis.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        max_registers: of a thread, where more programs at once are worth more than registers.
    """

    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None


class Tiled(NamedTuple):
    """A matrix that a kernel loads in blocks, by the tensor memory accelerator: from Hopper on.

    Its rows are whole 16 bytes. What a block has beyond the matrix is zeros.

    Attributes:
        matrix: ``[rows, columns]``.
        block: rows and columns of a block.
    """

    matrix: Array
    block: tuple[int, int]


def choose(implementation: Implementation | None) -> Implementation:
    """``implementation``, or what suits the default device where it is None."""
    if implementation is None:
        return default_implementation()
    if implementation not in get_args(Implementation):
        names = " or ".join(get_args(Implementation))
        raise ValueError(f"implementation must be {names}, or None, not {implementation!r}")
    return implementation


@functools.cache
def default_implementation() -> Implementation:
    """``triton`` on an NVIDIA GPU that the kernels support, else ``reference``.

    The first call logs one line that says what was found. A GPU that cannot be used is a warning.
    """
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus:
        _log.info("kernels: reference (JAX sees no GPU), jax %s", jax.__version__)
        return "reference"
    problem = _problem(gpus[0])
    if problem is not None:
        warnings.warn(f"the plain JAX kernels run instead of Triton's: {problem}", stacklevel=2)
        return "reference"
    _log.info("kernels: triton, %s", describe())
    return "triton"


def describe() -> str:
    """The GPU, the versions that matter, and whether XLA records command buffers, in one line."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "jax-triton", "triton")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    capability = getattr(device, "compute_capability", "none")
    capture = "off" if "--xla_gpu_enable_command_buffer= " in _xla_flags() else "on"
    return f"{device.device_kind}, compute capability {capability}, {versions}, capture {capture}"


def launch(
    kernel: Any,
    inputs: Sequence[Buffer | Tiled | None],
    outputs: Sequence[jax.ShapeDtypeStruct],
    refs: Sequence[Buffer] | None,
    how: Launch,
    **constants: Any,
) -> tuple[Buffer, ...]:
    """Launch a Triton kernel, whose parameters are the inputs, then the outputs, then constants.

    Args:
        kernel: a ``triton.jit`` function.
        inputs: arrays, references, matrices in blocks where nothing is written in place, or None
            for a pointer that is not read.
        outputs: shapes and dtypes of new, uninitialised outputs.
        refs: references to write instead of the first outputs, or of all; None for none.
        how: grid, warps and stages.
        constants: the kernel's compile-time parameters.

    Returns:
        The references, then the new arrays.
    """
    module = jax_triton()
    refs = tuple(refs or ())
    operands = [
        module.TensorDescriptor.from_array(*value) if isinstance(value, Tiled) else value
        for value in inputs
    ]
    call = functools.partial(
        module.triton_call,
        kernel=kernel,
        out_type=tuple(outputs[len(refs) :]),
        grid=how.grid,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        backend_options={} if how.max_registers is None else {"maxnreg": how.max_registers},
        name=kernel.fn.__name__,
        **constants,
    )
    results = call_in_place(call, *operands, *refs)
    return (*refs, *results)


def call_in_place(call: Callable[..., Any], *operands: Buffer | None) -> Any:
    """``call(*operands)``, a launch that writes over those of its operands that are references.

    XLA may fuse a launch with the slice that it reads, or that its result is put into, and then
    forgets that it writes over operands. No fusion crosses a barrier.
    """
    written: list[Any] = [value for value in operands if isinstance(value, jax.Ref)]
    if not written:
        return call(*operands)
    barred = iter(lax.optimization_barrier([v for v in operands if isinstance(v, Array)]))
    results = call(*(next(barred) if isinstance(v, Array) else v for v in operands))
    values = [ref[...] for ref in written]
    results, values = lax.optimization_barrier((results, values))
    for ref, value in zip(written, values, strict=True):
        ref[...] = value
    return results


@functools.cache
def jax_triton() -> Any:
    """The module ``jax_triton``."""
    import triton.backends.nvidia.driver as nvidia_driver

    # jax-triton 0.4.1 asks for this constant of Triton 3.7; only tensor descriptors of tf32 use it.
    if not hasattr(nvidia_driver, "TMA_TF32"):
        nvidia_driver.TMA_TF32 = 11
    import jax_triton as module
    from jax_triton.triton_lib import TensorDescMeta

    # It also asks of descriptors whether they are for convolutions, which Triton 3.6 does not say.
    TensorDescMeta.__required_keys__ -= {"is_im2col"}
    # JAX 0.12 gives this rule one more argument than jax-triton 0.4.1 takes. It says that a launch
    # needs all of its operands.
    if jax.__version_info__ >= (0, 12):
        from jax._src.interpreters import partial_eval
        from jax_triton.triton_lib import triton_kernel_call_p

        partial_eval.dce_rules[triton_kernel_call_p] = lambda _, __, equation: (
            [True] * len(equation.invars),
            equation,
        )
    return module


def scalar(value: Array | int) -> Array:
    """A number in device memory, as the one-element int32 array that kernels read it from."""
    return jnp.reshape(jnp.asarray(value, jnp.int32), (1,))


def precision(dtype: jnp.dtype) -> str:
    """float32 products must not be rounded to tf32."""
    return "ieee" if dtype == jnp.float32 else "tf32"


def _problem(device: jax.Device) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    capability = getattr(device, "compute_capability", None)
    try:
        number = float(capability)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return f"{device.device_kind} is not an NVIDIA GPU"
    if number < MIN_COMPUTE_CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}, 8.0 is needed"
    try:
        jax_triton()
    except ImportError as error:
        return f"jax-triton cannot be imported ({error})"
    return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _xla_flags() -> str:
    return os.environ.get("XLA_FLAGS", "") + " "
