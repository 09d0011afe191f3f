"""The same prompts in PyTorch and here, compared layer by layer. Needs the extra ``torch``."""

from moelora_jax.parity.comparison import AdapterErrors, Comparison, LayerErrors, compare
from moelora_jax.parity.torch_reference import (
    adapted,
    load_torch_model,
    require_torch,
    trace_torch,
    trace_torch_rows,
)

__all__ = [
    "AdapterErrors",
    "Comparison",
    "LayerErrors",
    "adapted",
    "compare",
    "load_torch_model",
    "require_torch",
    "trace_torch",
    "trace_torch_rows",
]
