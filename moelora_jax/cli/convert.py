"""``moelora convert``."""

from pathlib import Path
from typing import Annotated

import typer

from moelora_jax.adapters.layouts import ExpertLayout, Layout
from moelora_jax.cli.options import ModelOption, layout_errors_name


def convert(
    source: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="The adapter to read.")],
    destination: Annotated[
        Path, typer.Argument(metavar="NEW_DIR", help="Must not exist, or be empty.")
    ],
    model: ModelOption,
    layout: Annotated[Layout, typer.Option(help="Of the experts in the new folder.")],
    source_layout: Annotated[
        ExpertLayout | None,
        typer.Option(help="Of the experts that are read, where reading asks for it."),
    ] = None,
) -> None:
    """Write an adapter of any layout again, with its experts in another layout.

    peft_fused is for PEFT 0.19 and later with transformers 5, per_expert for most other tools. The
    adapter is read strictly, changes the model by the same, and keeps the bits of its factors and
    its scaling. But a factor that experts share is written for each of them; and in peft_fused
    factors are stacked, or filled up with zeros, where an adapter has several ranks, or another A
    for gate than for up. Of the model only config.json is read.
    """
    from moelora_jax.adapters.adapter_config import read_adapter_config
    from moelora_jax.adapters.reader import read_adapter
    from moelora_jax.adapters.writer import save_adapter
    from moelora_jax.models import read_model_config

    family, config = read_model_config(model)
    sites = config.lora_sites()
    with layout_errors_name("--source-layout"):
        adapter = read_adapter(
            source, sites, module_names=family.module_names, layout=source_layout
        )
    save_adapter(
        destination,
        adapter,
        sites,
        layout=layout,
        module_names=family.module_names,
        base_model=read_adapter_config(source).base_model,
    )
    typer.echo(f"Converted {source} of layout {adapter.layout} to {layout}: {destination}")
