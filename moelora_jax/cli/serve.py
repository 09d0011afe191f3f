"""``moelora serve``."""

from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moelora_jax.cli.options import (
    AdaptersOption,
    DtypeOption,
    LayoutsOption,
    ModelOption,
    parse_adapters,
)
from moelora_jax.cli.sizes import (
    AdapterHostMemoryOption,
    KvBlocksOption,
    MaxAdaptersOption,
    MaxBatchTokensOption,
    MaxLengthOption,
    MaxRankOption,
    MaxRunningOption,
    MemoryFractionOption,
    OptionalSitesOption,
    PoolRankOption,
    host_memory,
    parse_bytes,
)
from moelora_jax.errors import MissingPackageError, MoeLoraError

if TYPE_CHECKING:
    from moelora_jax.server.keys import Keys

_ADDRESS = "Address and names"
_ACCESS = "Access"
_REQUESTS = "Limits of requests"


def serve(
    model: ModelOption,
    adapter: AdaptersOption = None,
    layout: LayoutsOption = None,
    dtype: DtypeOption = None,
    host: Annotated[
        str,
        typer.Option(
            rich_help_panel=_ADDRESS, help="Address to listen on; 0.0.0.0 is all of this machine's."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, rich_help_panel=_ADDRESS, help="0 takes a free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_ADDRESS,
            help="What requests call the base model; the name of its folder unless given.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_ADDRESS, help="Instead of the model's own template."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MOELORA_API_KEY",
            show_envvar=True,
            rich_help_panel=_ACCESS,
            help="A key that requests must send; repeat for more. Others see the command line, so "
            "rather use the environment, where spaces separate keys.",
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            rich_help_panel=_ACCESS,
            help="Keys, each with the adapters that it may use.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="MOELORA_ADMIN_KEY",
            show_envvar=True,
            rich_help_panel=_ACCESS,
            help="The key for loading and unloading adapters; without it nobody may.",
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_ACCESS,
            help="The only folder that requests may load adapters from.",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, rich_help_panel=_REQUESTS, help="Of the body of a request.")
    ] = 4 * 2**20,
    max_length: MaxLengthOption = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=_REQUESTS, help="Completions that may wait; others are refused."
        ),
    ] = 1024,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.001, rich_help_panel=_REQUESTS, help="Seconds until a request is given up."
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            rich_help_panel=_REQUESTS,
            help="Seconds that running requests have to finish after SIGTERM.",
        ),
    ] = 30.0,
    max_running: MaxRunningOption = 32,
    max_batch_tokens: MaxBatchTokensOption = 1024,
    kv_blocks: KvBlocksOption = None,
    memory_fraction: MemoryFractionOption = 0.9,
    max_adapters: MaxAdaptersOption = None,
    max_rank: MaxRankOption = 64,
    pool_rank: PoolRankOption = 16,
    adapter_host_memory: AdapterHostMemoryOption = None,
    optional_site: OptionalSitesOption = None,
) -> None:
    """Serve a model and its adapters with the OpenAI API, until a signal.

    The field "model" of a request names the base model or an adapter. / shows what the server is
    doing, /metrics tells Prometheus. SIGTERM and Ctrl-C let running requests finish.
    """
    try:
        from moelora_jax.server import app, serve
        from moelora_jax.server.adapter_root import AdapterRoot
        from moelora_jax.server.generation import Limits
        from moelora_jax.server.text import TextModel
    except ModuleNotFoundError as cause:
        raise MissingPackageError(f"{cause}; the server needs more packages", "serve") from cause
    from moelora_jax.cli.loading import load_for_serving
    from moelora_jax.engine.async_engine import AsyncEngine
    from moelora_jax.models import read_model_config

    # The cheapest checks come first.
    folders = parse_adapters(adapter or [], layout or [])
    name = served_model_name or model.absolute().name
    if name in folders:
        raise MoeLoraError(f"--adapter {name}: is what the base model is called; rename one")
    keys = _keys(api_key or [], api_keys_file, admin_key)
    if adapter_root is not None and admin_key is None:
        raise MoeLoraError(f"--adapter-root {adapter_root}: nobody may load without --admin-key")
    root = None if adapter_root is None else AdapterRoot(adapter_root)
    if adapter_host_memory is None:
        max_host_bytes = host_memory() // 2
    else:
        max_host_bytes = parse_bytes("--adapter-host-memory", adapter_host_memory)
    with serve.bind(host, port) as socket:
        _, config = read_model_config(model)
        text_model = TextModel.load(model, config.eos_tokens, chat_template=chat_template)
        llm = load_for_serving(
            model,
            folders,
            with_lora=bool(folders) or root is not None,
            dtype=dtype,
            memory_fraction=memory_fraction,
            max_length=max_length,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            kv_blocks=kv_blocks,
            max_adapters=max_adapters,
            max_rank=max_rank,
            pool_rank=pool_rank,
            optional_sites=optional_site or (),
            max_host_bytes=max_host_bytes,
        )
        engine = AsyncEngine(llm, max_waiting=max_waiting)
        service = app.Service(
            engine,
            text_model,
            app.ServerConfig(
                model_name=name,
                limits=Limits(llm.runtime.cache.max_length, request_timeout),
                vocab_size=config.vocab_size,
                keys=keys,
                adapter_root=root,
                max_body_bytes=max_body_bytes,
            ),
        )
        if not api_key and api_keys_file is None and not _is_loopback(host):
            typer.echo(
                f"WARNING: everyone who reaches {host} may use this server: set --api-key", err=True
            )
        engine.start()
        shown = f"[{host}]" if ":" in host else host
        server = serve.Server(
            service,
            drain_seconds=drain_timeout,
            announcement=f"Serving {name} on http://{shown}:{socket.getsockname()[1]}",
        )
        server.run([socket])


def _keys(api_keys: list[str], file: Path | None, admin_key: str | None) -> "Keys":
    from moelora_jax.server.keys import Key, Keys, digest, read_keys

    for key in (*api_keys, *([] if admin_key is None else [admin_key])):
        # A space would separate two keys in the environment variable.
        if not key or key.split() != [key]:
            raise MoeLoraError("a key must not be empty, nor contain spaces")
    given = [Key(digest(key)) for key in api_keys]
    return Keys([*given, *([] if file is None else read_keys(file))], admin_key)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
