"""The same prompts in PyTorch and here, compared layer by layer. Needs the extra ``torch``."""

from moelora_jax.parity.comparison import (
    AdapterErrors,
    Agreement,
    Comparison,
    GreedyTokens,
    LayerErrors,
    compare,
    count_agreement,
    logit_noise,
)
from moelora_jax.parity.torch_reference import (
    adapted,
    greedy_torch,
    load_torch_model,
    require_torch,
    run_torch_rows,
    trace_torch,
    trace_torch_rows,
)

__all__ = [
    "AdapterErrors",
    "Agreement",
    "Comparison",
    "GreedyTokens",
    "LayerErrors",
    "adapted",
    "compare",
    "count_agreement",
    "greedy_torch",
    "load_torch_model",
    "logit_noise",
    "require_torch",
    "run_torch_rows",
    "trace_torch",
    "trace_torch_rows",
]
