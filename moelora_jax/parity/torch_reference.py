"""The PyTorch side: transformers and PEFT compute one prompt at a time, and hooks keep a trace.

The reference is the plainest there is: float32, eager attention, one expert after the other. In
bfloat16 the same shows what that dtype alone costs.
"""

import gc
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moelora_jax.engine.llm import Prompt
from moelora_jax.engine.trace import Trace
from moelora_jax.errors import AdapterError, CheckpointError, MissingPackageError, MoeLoraError
from moelora_jax.models.orbax_checkpoint import is_orbax
from moelora_jax.parity.comparison import GreedyTokens


def require_torch() -> None:
    """Check that PyTorch, transformers and PEFT are installed.

    Raises:
        MissingPackageError: naming those that are not, and how to install them.
    """
    wanted = {"torch": "PyTorch", "transformers": "transformers", "peft": "PEFT"}
    missing = [name for module, name in wanted.items() if not importlib.util.find_spec(module)]
    if missing:
        raise MissingPackageError(f"{' and '.join(missing)} must be installed", "torch")


def trace_torch_rows(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Trace]:
    """Trace every prompt alone; see :func:`run_torch_rows`."""
    return run_torch_rows(model, adapters, prompts, trace_torch, device=device, dtype=dtype)


def run_torch_rows[Result](
    model: str | Path,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    function: Callable[[Any, Sequence[int] | np.ndarray, str | None], Result],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Result]:
    """Call a function for every prompt, with a model that is loaded for it and freed afterwards.

    Args:
        model: checkpoint folder.
        adapters: folders that PEFT can load, by the names that prompts use.
        prompts: valid rows.
        function: takes the model with the row's adapter, its tokens, and the adapter's name.
        device: of PyTorch, such as ``cpu`` or ``cuda``. It holds the model.
        dtype: of the model.

    Raises:
        CheckpointError: transformers cannot read the folder.
        AdapterError: PEFT does not hold what is in an adapter's file.
        MoeLoraError: PyTorch cannot use the device.
    """
    import torch

    base = load_torch_model(model, device=device, dtype=dtype)
    results: dict[int, Result] = {}

    def run(adapted_model: Any, adapter: str | None) -> None:
        for row, prompt in enumerate(prompts):
            if prompt.adapter == adapter:
                results[row] = function(adapted_model, prompt.tokens, adapter)

    run(base, None)
    for name in dict.fromkeys(prompt.adapter for prompt in prompts):
        if name is not None:
            with adapted(base, adapters[name]) as adapted_model:
                run(adapted_model, name)
    del base
    gc.collect()  # Modules are in reference cycles.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [results[row] for row in range(len(prompts))]


def load_torch_model(folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """A model of transformers; nothing is downloaded, and no pickle is read.

    Raises:
        CheckpointError: transformers cannot read the folder.
        MoeLoraError: PyTorch cannot use the device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_orbax(folder):
        raise CheckpointError(
            f"{folder}: a converted copy, which PyTorch cannot read; name the checkpoint that it "
            "was converted from"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise MoeLoraError(f"PyTorch cannot use the device {device!r}: {cause}") from cause
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            **_dequantize(config),
        )
    except (OSError, ValueError, ImportError) as cause:
        raise CheckpointError(f"{folder}: transformers cannot read it: {cause}") from cause
    return model.eval()


def _dequantize(config: Any) -> dict[str, Any]:
    """Options to read the weights of gpt-oss, which may be in MXFP4, as plain numbers."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


@contextmanager
def adapted(model: Any, folder: str | Path) -> Iterator[Any]:
    """A model of transformers with an adapter of PEFT, which leaves it at the end.

    Raises:
        AdapterError: PEFT does not hold exactly what is in the file.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT warns of tensors that it did not find; what it holds is checked instead.
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
    try:
        _check_loaded(peft_model, Path(folder))
        yield peft_model
    finally:
        peft_model.unload()


def _check_loaded(peft_model: Any, folder: Path) -> None:
    """Tools pass over tensors that they cannot place; a comparison must not."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    held = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # Beside an adapter of an embedding, PEFT saves the embedding itself.
    weights = peft_model.state_dict()
    held |= {name: weights[name] for name in saved.keys() & weights.keys()}
    for name in sorted(saved.keys() | held.keys()):
        if name not in held:
            reason = "PEFT has no place for it"
        elif name not in saved:
            reason = "PEFT expects it, and it is not there"
        elif not held[name].cpu().equal(saved[name].to(held[name].dtype)):
            reason = "PEFT holds other values"
        else:
            continue
        raise AdapterError(
            f"{path}: tensor {name!r}: {reason}; convert the adapter first: "
            "moelora convert --layout peft_fused"
        )


def trace_torch(
    model: Any, tokens: Sequence[int] | np.ndarray, adapter: str | None = None
) -> Trace:
    """Run one prompt and keep what :meth:`~moelora_jax.engine.llm.LLM.trace` keeps.

    Args:
        model: a causal language model of transformers, adapted by PEFT or not.
        tokens: the prompt.
        adapter: what the trace calls the adapter that the model has.
    """
    import torch

    causal_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal_model.model
    taps: dict[str, dict[int, np.ndarray]] = {name: {} for name in _TAPS}
    hidden: list[np.ndarray] = []
    hooks = [decoder.norm.register_forward_hook(lambda *call: hidden.append(_rows(call[2])))]
    for layer, block in enumerate(decoder.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        router = block.mlp.gate if hasattr(block.mlp, "gate") else block.mlp.router
        hooks.append(router.register_forward_hook(_router_hook(taps, layer)))
        hooks.append(block.mlp.experts.register_forward_hook(_experts_hook(taps, layer)))
    try:
        with torch.no_grad():
            inputs = torch.tensor([list(map(int, tokens))], device=causal_model.device)
            logits = model(input_ids=inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    moe_layers = tuple(sorted(taps["moe_input"]))
    return Trace(
        tokens=tuple(map(int, tokens)),
        adapter=adapter,
        moe_layers=moe_layers,
        **{name: np.stack([of[layer] for layer in moe_layers]) for name, of in taps.items()},
        hidden=hidden[0],
        logits=_rows(logits),
    )


def greedy_torch(model: Any, tokens: Sequence[int] | np.ndarray, count: int) -> GreedyTokens:
    """Continue one prompt with the most probable tokens.

    Args:
        model: as in :func:`trace_torch`.
        tokens: the prompt.
        count: tokens to generate.
    """
    import torch

    device, cache, rows = model.device, None, []
    inputs = torch.tensor([list(map(int, tokens))], device=device)
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(_rows(out.logits[:, -1]))
            inputs = out.logits[:, -1:].argmax(-1)
    return GreedyTokens.of(np.concatenate(rows))


_TAPS = ("moe_input", "router_logits", "experts", "weights", "moe_output")
_Taps = dict[str, dict[int, np.ndarray]]


def _router_hook(taps: _Taps, layer: int) -> Callable[..., None]:
    """The routers of all models return logits, weights and experts."""

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        logits, weights, experts = output
        taps["router_logits"][layer] = _rows(logits)
        taps["weights"][layer] = _rows(weights)
        taps["experts"][layer] = _rows(experts).astype(np.int32)

    return keep


def _experts_hook(taps: _Taps, layer: int) -> Callable[..., None]:
    """The routed experts of all models take hidden states first, and return their weighted sum."""

    def keep(_module: Any, inputs: Any, output: Any) -> None:
        taps["moe_input"][layer] = _rows(inputs[0])
        taps["moe_output"][layer] = _rows(output)

    return keep


def _rows(tensor: Any) -> np.ndarray:
    """``[tokens, width]`` in float32, on the host."""
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array.reshape(-1, array.shape[-1])
