"""The command: what it prints and writes, and that bad input is one clear line."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.main import get_command
from typer.testing import CliRunner, Result

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.writer import save_adapter
from moelora_jax.cli import app, demo_run
from moelora_jax.cli.demo_files import (
    ADAPTERS,
    MODEL_CONFIG,
    AdapterKind,
    random_adapter,
    write_demo,
)
from moelora_jax.cli.limits import changed_optional_sites, derive_lora
from moelora_jax.cli.rows import read_rows
from moelora_jax.cli.sizes import host_memory
from moelora_jax.models import family_of
from moelora_jax.models.tokenizer import read_tokenizer
from tests.tiny_llm import random_adapter as tiny_llm_adapter

CONFIG = family_of(MODEL_CONFIG).read_config(MODEL_CONFIG)
NAMES = family_of(MODEL_CONFIG).module_names
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROWS = 5


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error(*arguments: object) -> str:
    """What a command that must fail says, in one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("error: "), result.output
    return last


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile cheaply, and what two commands have in common only once."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the demo, in a folder of that name, and a tokenizer of words w0, w1, ..."""
    folder = tmp_path_factory.mktemp("cli") / "demo"
    write_demo(folder, rows=ROWS, seed=0)
    vocabulary = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def documented_command(page: str, name: str) -> list[str]:
    """The arguments of the ``moelora NAME`` of a page of the documentation."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(f"moelora {name}")]
    return shlex.split(line)[1:]


# What works.


def test_demo_proves_what_it_claims() -> None:
    # The sizes are those of the quick start's commands.
    result = run("demo", "--rows", ROWS, "--max-new-tokens", 8, "--batches", 10)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for expected in (*ADAPTERS, "tokens/s", "KV cache", "0 compilations", "4 of 4 rows differ"):
        assert expected in words
    assert "NO" not in words


def test_demo_fails_if_a_proof_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "run_demo", lambda *_: False)
    assert run("demo").exit_code == 1


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_head(*_: object) -> bool:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(demo_run, "run_demo", write_to_head)
    result = run("demo")
    assert (result.exit_code, result.stderr) == (1, "")


def test_quick_start_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring and generating the same rows: the first new token is the best of the logits."""
    monkeypatch.chdir(folder.parent)
    generated = run(*documented_command("index.md", "generate"))
    assert generated.exit_code == 0, generated.output
    completions = [json.loads(line) for line in generated.stdout.splitlines()]
    assert [row["adapter"] for row in completions] == [None, *ADAPTERS]
    assert all(len(row["tokens"]) == 8 for row in completions)
    for row in completions:
        assert row["finish_reason"] == "length"
        assert row["text"].split() == [f"w{token}" for token in row["tokens"]]

    scored = run(*documented_command("index.md", "score"))
    assert scored.exit_code == 0, scored.output
    assert scored.stdout == ""
    logits = load_file("logits.safetensors")
    inputs = [json.loads(line) for line in Path("demo/rows.jsonl").read_text().splitlines()]
    assert logits.keys() == {f"logits.{i}" for i in range(ROWS)}
    for i, (row, completion) in enumerate(zip(inputs, completions, strict=True)):
        assert logits[f"logits.{i}"].shape == (len(row["tokens"]), CONFIG.vocab_size)
        assert logits[f"logits.{i}"].dtype == np.float32
        assert logits[f"logits.{i}"][-1].argmax() == completion["tokens"][0]
    assert sorted(path.name for path in Path().iterdir()) == ["demo", "logits.safetensors"]


def test_the_guide_names_every_flag() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    flags, bench_flags = guide.split("## Measuring")
    sizes = {"--layout", "--dtype", "--max-waiting", "--max-running", "--max-batch-tokens",
             "--kv-blocks", "--memory-fraction", "--max-adapters", "--max-rank",
             "--pool-rank"}  # fmt: skip
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, text, known in (("serve", flags, set()), ("bench-serve", bench_flags, sizes)):
        options = {o for p in commands[name].params for o in p.opts if o.startswith("--")}
        assert options - known <= set(re.findall(r"--[a-z-]+", text)), name


@pytest.mark.parametrize("key", ["", "a key", " key"])
@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_keys_have_no_spaces(folder: Path, flag: str, key: str) -> None:
    message = error("serve", "--model", folder / "model", flag, key)
    assert message.endswith("a key must not be empty, nor contain spaces")


def test_a_root_needs_a_key(folder: Path) -> None:
    message = error("serve", "--model", folder / "model", "--adapter-root", folder / "adapters")
    assert message.endswith("nobody may load without --admin-key")


def test_bench_serve_measures_an_engine(folder: Path, tmp_path: Path) -> None:
    """What it measures of a server is in test_load_test.py."""
    output = tmp_path / "out.json"
    result = run(
        "bench-serve", "--model", folder / "model",
        "--adapter", f"a={folder / 'adapters' / 'experts-r8'}", "--rate", 100, "--requests", 8,
        "--input-lengths", 8, "--output-lengths", 4, "--max-running", 1, "--max-batch-tokens", 16,
        "--base-share", 0.5, "--json", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(output.read_text())
    assert summary["finished"] == 8
    assert summary["output_tokens_per_second"] > 0
    assert set(summary["requests_by_adapter"]) == {"", "a"}


def test_text_is_tokenized(folder: Path, rows: Path) -> None:
    rows.write_text('{"text": "w7 w8"}\n\n{"tokens": [7, 8]}\n')
    first, second = read_rows(rows, CONFIG, [], read_tokenizer(folder / "model"))
    assert first == second


def test_score_without_adapters(folder: Path, tmp_path: Path, rows: Path) -> None:
    rows.write_text('{"tokens": [7, 8]}')
    output = tmp_path / "out.safetensors"
    options = ("--model", folder / "model", "--input", rows, "--output", output)
    result = run("score", *options, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert load_file(output)["logits.0"].shape == (2, CONFIG.vocab_size)


def test_adapters_on_optional_sites(folder: Path, tmp_path: Path, rows: Path) -> None:
    """Limits follow from what the adapters change; a plan has a line for the widest pages."""
    adapter = tiny_llm_adapter(CONFIG, 0, sites=("router", "embed_tokens", "lm_head"))
    save_adapter(
        tmp_path / "wide", adapter, CONFIG.lora_sites(), layout="per_expert", module_names=NAMES
    )
    model, output = folder / "model", tmp_path / "out.safetensors"
    rows.write_text('{"tokens": [7, 8], "adapter": "wide"}\n{"tokens": [7, 8]}')
    options = ("--model", model, "--input", rows, "--output", output)
    result = run("score", *options, "--adapter", f"wide={tmp_path / 'wide'}")
    assert result.exit_code == 0, result.output
    logits = load_file(output)
    assert np.abs(logits["logits.0"] - logits["logits.1"]).max() > 0.1
    result = run("inspect", tmp_path / "wide", "--model", model)
    assert result.exit_code == 0 and "fits: " in result.stdout

    plan = ("plan", "--model", model, "--gpu-memory", "1GB", "--json")
    wide = json.loads(run(*plan, "--optional-site", "lm_head").stdout)["vocabulary_pages"]
    assert wide == 8 * 16 * CONFIG.vocab_size * 2  # slots, ranks of a page, bfloat16
    assert json.loads(run(*plan).stdout)["vocabulary_pages"] == 0
    # A server has room for what the adapters that it starts with change.
    sites = CONFIG.lora_sites()
    other = read_adapter(folder / "adapters/attention-r3", sites, module_names=NAMES)
    changed = ["router", "embed_tokens", "lm_head"]
    assert changed_optional_sites(CONFIG, [other, adapter]) == changed
    assert changed_optional_sites(CONFIG, [other]) == []
    message = error(*plan, "--optional-site", "norm")
    assert "--optional-site norm: choose from router, embed_tokens, lm_head" in message


def test_inspect_without_a_model(folder: Path) -> None:
    result = run("inspect", folder / "adapters/attention-r3")
    assert result.exit_code == 0
    assert "3 × 64" in result.stdout
    assert "fits" not in result.stdout


def test_inspect_of_the_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    result = run(*documented_command("index.md", "inspect"))
    assert result.exit_code == 0
    assert "linear+peft_fused" in result.stdout
    assert "\nfits: every tensor has a place" in result.stdout


@pytest.mark.parametrize("name", ADAPTERS)
def test_inspect_counts_what_the_pool_packs(folder: Path, name: str) -> None:
    sites = CONFIG.lora_sites()
    adapter = read_adapter(folder / "adapters" / name, sites, module_names=NAMES)
    options = ("--model", folder / "model", "--json", "--dtype", "float32")
    report = json.loads(run("inspect", folder / "adapters" / name, *options).stdout)
    assert report["fits"] is True
    assert report["layout"] == adapter.layout
    assert report["parameters"] == adapter.num_parameters
    pool = PagePool(sites, derive_lora(sites, [adapter]), np.float32)
    packed = pool.pack(adapter)
    pages = {page["width"]: page for page in report["pages"]}
    for width, count in packed.pages_by_width.items():
        assert pages[width]["needed"] == count
    assert sum(page["bytes"] for page in report["pages"]) == packed.page_bytes
    assert pool.shortage([packed]) == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-rank", 8], "rank 24 is above max_rank 8"),
        (["--max-adapters", 1, "--max-rank", 24, "--pool-rank", 8], None),
        (["--max-adapters", 1], None),
    ],
)
def test_inspect_with_limits(folder: Path, options: list[object], reason: str | None) -> None:
    adapter = folder / "adapters/experts-r24"
    result = run("inspect", adapter, "--model", folder / "model", *options)
    assert result.exit_code == (0 if reason is None else 1)
    if reason is not None:
        assert f"does not fit: {reason}" in result.stdout


def test_inspect_says_why_an_adapter_is_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = MODEL_CONFIG | {"num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(other))
    result = run("inspect", folder / "adapters/experts-r8", "--model", tmp_path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["fits"] is False
    assert "is for expert 4 of 4" in report["reasons"][0]


def test_convert_of_the_readme(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    result = run(*documented_command("index.md", "convert"))
    assert result.exit_code == 0, result.output
    sites = CONFIG.lora_sites()
    old = read_adapter("demo/adapters/both-r16", sites, module_names=NAMES)
    new = read_adapter("both-r16-per-expert", sites, module_names=NAMES)
    assert (old.layout, new.layout) == ("linear+peft_fused", "linear+per_expert")
    assert old.updates.keys() == new.updates.keys()
    for target, update in old.updates.items():
        assert update.a.tobytes() == new.updates[target].a.tobytes()
        assert update.b.tobytes() == new.updates[target].b.tobytes()
        assert update.scaling == new.updates[target].scaling
    assert "already exists" in error(*documented_command("index.md", "convert"))


def test_derived_pools_hold_any_choice_of_adapters(folder: Path) -> None:
    sites = CONFIG.lora_sites()
    adapters = [read_adapter(folder / "adapters" / n, sites, module_names=NAMES) for n in ADAPTERS]
    for slots in range(1, len(adapters) + 1):
        pool = PagePool(sites, derive_lora(sites, adapters, slots), np.float32)
        largest = sorted(map(pool.pack, adapters), key=lambda packed: packed.page_bytes)[-slots:]
        assert pool.shortage(largest) == ""
    assert derive_lora(sites, []).sites == ()


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("moelora ")
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) == 9
    for name, command in commands.items():
        result = run(name, "--help")
        assert result.exit_code == 0
        # Line by line as they are written, so that they can be copied into a shell.
        shown = [line.strip() for line in result.stdout.splitlines()]
        fence = command.epilog.split("```")[1]
        assert fence.lstrip().startswith(f"moelora {name}")
        assert set(map(str.strip, fence.splitlines())) <= set(shown)


def test_what_needs_no_jax_imports_none() -> None:
    # It takes seconds. A client of a server needs none either.
    program = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels")]!r}
from typer.main import get_command
from typer.testing import CliRunner
from moelora_jax.cli import app

def run(code, *arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output

run(0, "--help")
run(0, "--version")
for name in get_command(app).commands:
    run(0, name, "--help")
    run(2, name, "--no-such-option")
run(1, "bench-serve", "http://127.0.0.1:1", "--requests", "1")
print(*{{"flax", "jax", "torch"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, ""), ended.stderr


# Bad input. All of it is found before anything runs.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[1, 2]", "must be a JSON object"),
        ('{"tokens": [1], "adaptor": "a"}', "unknown key 'adaptor'"),
        ("{}", 'give either "tokens" or "text"'),
        ('{"tokens": [1], "text": "a"}', 'give either "tokens" or "text"'),
        ('{"tokens": []}', "has no tokens"),
        ('{"tokens": [1.5]}', "tokens must be a list of integers"),
        ('{"tokens": [true]}', "tokens must be a list of integers"),
        ('{"tokens": [272]}', "token id 272 is outside the vocabulary of 272 tokens"),
        ('{"tokens": [-1]}', "token id -1 is outside the vocabulary of 272 tokens"),
        (json.dumps({"tokens": [1] * 1020}), "1020 tokens and 8 new ones are more than the 1024"),
        ('{"tokens": [1], "adapter": "b"}', "adapter 'b' is not given by --adapter; given: a"),
        ('{"tokens": [1], "adapter": 3}', "adapter must be a name or null, not 3"),
        ('{"text": 3}', "text must be a string, not 3"),
    ],
)
def test_a_bad_row_is_named_by_its_line(folder: Path, rows: Path, line: str, reason: str) -> None:
    rows.write_text(f'{{"tokens": [1], "adapter": "a"}}\n\n{line}\n{{"tokens": [2]}}\n')
    message = error(
        *("generate", "--model", folder / "model", "--input", rows, "--max-new-tokens", 8),
        *("--adapter", f"a={folder}/adapters/attention-r3"),
    )
    assert message.startswith(f"error: {rows}, line 3: {reason}")


@pytest.fixture
def doubtful(tmp_path: Path) -> tuple[Path, Path]:
    """A model and an adapter whose only parameter is square, of no version of PEFT."""
    raw = MODEL_CONFIG | {"moe_intermediate_size": 32}
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(raw))
    config = family_of(raw).read_config(raw)
    kind = AdapterKind(4, "peft_fused", attention=False, experts=True)
    both = random_adapter(config, kind, np.random.default_rng(0))
    updates = {t: u for t, u in both.updates.items() if t.site != "down_proj"}
    save_adapter(
        adapter,
        Adapter("memory", updates),
        config.lora_sites(),
        layout="peft_fused",
        module_names=NAMES,
    )
    options = json.loads((adapter / "adapter_config.json").read_text())
    del options["peft_version"]
    (adapter / "adapter_config.json").write_text(json.dumps(options))
    return model, adapter


def test_a_layout_in_doubt_names_the_flag(doubtful: tuple[Path, Path], rows: Path) -> None:
    model, adapter = doubtful
    rows.write_text('{"tokens": [1], "adapter": "fr"}')
    inputs = ("--input", rows, "--model", model, "--adapter", f"fr={adapter}")
    message = error("generate", *inputs)
    assert "or ask for layout 'peft_fused' or 'peft_fused_0_18'" in message
    assert message.endswith("; the option is --layout fr=LAYOUT")
    message = error("generate", *inputs, "--layout", "fr=stacked")
    assert "cannot be of the layout stacked, which was asked for" in message
    assert message.endswith("; the option is --layout fr=LAYOUT")
    # With the flag the adapter is read, and the next thing that is missing is the model itself.
    message = error("generate", *inputs, "--layout", "fr=peft_fused_0_18")
    assert message.endswith("neither model.safetensors nor model.safetensors.index.json is there")


def test_inspect_and_convert_with_a_layout(doubtful: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = doubtful
    result = run("inspect", adapter, "--model", model, "--max-rank", 16)
    assert result.exit_code == 1
    assert "; the option is --layout LAYOUT" in result.stdout
    for layout in ("peft_fused", "peft_fused_0_18"):
        result = run("inspect", adapter, "--model", model, "--layout", layout)
        assert result.exit_code == 0, result.output
        assert f"In the model ({layout})" in result.stdout

    command = ("convert", adapter, tmp_path / "new", "--model", model, "--layout", "per_expert")
    assert error(*command).endswith("; the option is --source-layout")
    assert not (tmp_path / "new").exists()
    result = run(*command, "--source-layout", "peft_fused_0_18")
    assert result.exit_code == 0, result.output
    assert "of layout peft_fused_0_18 to per_expert" in result.stdout


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("a", "write NAME=LAYOUT"),
        ("b=stacked", "no --adapter has that name; given: a"),
        ("a=fused", "unknown; known are per_expert, peft_fused, peft_fused_0_18, stacked, shared"),
    ],
)
def test_bad_layouts(folder: Path, rows: Path, layout: str, reason: str) -> None:
    rows.write_text('{"tokens": [1]}')
    adapter = ("--adapter", f"a={folder}/adapters/attention-r3")
    inputs = ("--model", folder / "model", "--input", rows, *adapter)
    message = error("score", *inputs, "--output", rows.parent / "o", "--layout", layout)
    assert message.startswith(f"error: --layout {layout}: {reason}")


def test_text_needs_a_tokenizer(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    rows.write_text('{"text": "hello"}')
    message = error("generate", "--model", tmp_path, "--input", rows)
    assert message.startswith(f"error: {rows}, line 1: has text, but the model's folder has no")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_rows(folder: Path, rows: Path, content: str) -> None:
    rows.write_text(content)
    message = error("generate", "--model", folder / "model", "--input", rows)
    assert f"{rows}: has no rows" in message


def test_missing_files(folder: Path, tmp_path: Path, rows: Path) -> None:
    missing = tmp_path / "missing"
    rows.write_text('{"tokens": [1]}')
    model = folder / "model"
    assert f"{missing}: no such folder" in error("generate", "--model", missing, "--input", rows)
    assert f"{missing}: no such file" in error("generate", "--model", model, "--input", missing)
    adapter = ("--adapter", f"a={missing}")
    message = error("generate", "--model", model, "--input", rows, *adapter)
    assert f"{missing}/adapter_config.json: no such file" in message
    output = ("--output", missing / "out.safetensors")
    message = error("score", "--model", model, "--input", rows, *output)
    assert f"there is no folder {missing}" in message
    assert f"{missing}/adapter_config.json" in error("inspect", missing)
    adapters = folder / "adapters"
    message = error("generate", "--model", adapters, "--input", rows)
    assert message == f"error: {adapters}/config.json: no such file; is this a checkpoint folder?"
    assert not missing.exists()


@pytest.mark.parametrize("command", ["score", "generate"])
def test_the_input_is_not_written_over(folder: Path, rows: Path, command: str) -> None:
    rows.write_text(line := '{"tokens": [1]}')
    options = ("--model", folder / "model", "--input", rows)
    message = error(command, *options, "--output", rows.parent / "." / rows.name)
    assert message == f"error: {rows}: is the input; name another file to write"
    assert rows.read_text() == line


def test_serve_refuses_a_rank_before_it_loads_the_model(folder: Path) -> None:
    adapter = ("--adapter", f"a={folder}/adapters/experts-r24")
    result = run("serve", "--model", folder / "model", *adapter, "--max-rank", 16, "--port", 0)
    assert result.exit_code == 1
    assert result.stderr.endswith("error: --adapter a: rank 24 is above --max-rank 16\n")
    assert "Loading model" not in result.stderr


def test_serve_limits_the_host_memory_of_adapters(folder: Path) -> None:
    adapter = ("--adapter", f"a={folder}/adapters/experts-r24", "--max-running", 1, "--port", 0)
    serve = ("serve", "--model", folder / "model", *adapter, "--adapter-host-memory")
    result = run(*serve, "9kB")
    assert result.exit_code == 1
    assert "more than the 9,000 that adapters may take" in " ".join(result.stderr.split())
    assert "Serving" not in result.stderr
    message = error(*serve, "lots")
    assert message.endswith("--adapter-host-memory lots: write a size such as 141GB or 80GiB")
    assert 2**20 < host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        (["a"], "--adapter a: write NAME=DIR"),
        (["a="], "--adapter a=: write NAME=DIR"),
        (["a=x", "a=y"], "--adapter a=y: the name 'a' is taken twice"),
    ],
)
def test_bad_adapter_options(folder: Path, rows: Path, adapters: list[str], reason: str) -> None:
    rows.write_text('{"tokens": [1]}')
    options = [option for adapter in adapters for option in ("--adapter", adapter)]
    message = error("generate", "--model", folder / "model", "--input", rows, *options)
    assert message == f"error: {reason}"


def test_an_adapter_of_another_model(folder: Path, tmp_path: Path, rows: Path) -> None:
    rows.write_text('{"tokens": [1], "adapter": "a"}')
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG | {"hidden_size": 32}))
    message = error(
        *("generate", "--model", tmp_path, "--input", rows),
        *("--adapter", f"a={folder}/adapters/experts-r8"),
    )
    assert "this looks like an adapter for another model" in message


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--temperature", -1, "temperature must be"),
        ("--top-p", 0, "top_p must be"),
        ("--min-p", 2, "min_p must be"),
        ("--frequency-penalty", 3, "frequency_penalty must be"),
        ("--presence-penalty", -3, "presence_penalty must be"),
        ("--repetition-penalty", 0, "repetition_penalty must be"),
        ("--min-tokens", -1, "min_tokens must be"),
    ],
)
def test_bad_sampling(folder: Path, rows: Path, option: str, value: float, reason: str) -> None:
    assert reason in error("generate", "--model", folder, "--input", rows, option, value)


def test_demo_leaves_other_files_alone(folder: Path) -> None:
    assert "already exists" in error("demo", "--folder", folder)


def test_rows_may_hold_any_line_separator_of_unicode(rows: Path) -> None:
    """Only a newline ends a row."""
    rows.write_text('{"tokens": [1], "adapter": "a\u2028b"}\r\n{"tokens": [2]}', encoding="utf-8")
    first, second = read_rows(rows, CONFIG, ["a\u2028b"], None)
    assert first.adapter == "a\u2028b"
    assert second.tokens == [2]
