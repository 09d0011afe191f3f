"""Every code block of the README and of the site runs, in the order of its page."""

import inspect
import json
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import jax
import markdown
import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import moelora_jax
import moelora_kernels
from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.cli import app
from moelora_jax.cli.demo_files import ADAPTERS
from tests.served_model import served, tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A block, after the reason why it is not run, if it is not.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$",
    flags=re.MULTILINE,
)
#: What is shown but is no code: files, diagrams, and what commands print.
SHOWN = ("", "text", "json")
ANCHORS = ROOT / "benchmarks" / "anchors.jsonl"
DEMO = ["moelora", "demo", "--folder", "demo"]
EXAMPLE = ROOT / "examples" / "serving_loop.py"


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert len(re.findall("^```", text, flags=re.MULTILINE)) == 2 * len(found), page
    for match in found:
        if match["language"] not in SHOWN:
            line = text.count("\n", 0, match.start("language")) + 1
            yield Block(page, line, match["language"], match["code"], match["reason"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@dataclass
class Session:
    """A reader of one page: the folder, the Python names, and how far they have come."""

    folder: Path
    names: dict[str, object] = field(default_factory=lambda: {"__name__": "__main__"})
    done: set[Block] = field(default_factory=set)

    def run(self, block: Block) -> None:
        self.done.add(block)
        if block.language == "python":
            source = "\n" * block.line + block.code  # so that a traceback has the page's lines
            exec(compile(source, str(block.page), "exec"), self.names)
        elif block.language == "sh":
            for words in commands_of(block):
                run_command(words)
        else:
            pytest.fail(f"{block}: {block.language} is neither run nor one of {SHOWN}")


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words: list[str]) -> None:
    if words == DEMO:  # The fixture has run the demo for all pages.
        return
    if words[0] != "moelora":
        pytest.fail(f"only moelora is run: give a reason before the block for {shlex.join(words)}")
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


@pytest.fixture(scope="module", autouse=True)
def fast_compilation() -> Iterator[None]:
    """The programs are tiny and run a few times: compile them cheaply."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo has written, with fewer random batches than it runs for people."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, [*DEMO[1:], "--batches", "2"])
    assert result.exit_code == 0, result.output
    return folder / "demo"


@pytest.fixture(scope="module")
def sessions(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Session]:
    """A folder for each page, in which the demo's files are."""
    made = {page: Session(tmp_path_factory.mktemp(page.stem)) for page in PAGES}
    for session in made.values():
        os.symlink(demo, session.folder / "demo")
    return made


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs(
    block: Block, sessions: dict[Path, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.reason:
        pytest.skip(block.reason)
    session = sessions[block.page]
    monkeypatch.chdir(session.folder)
    for earlier in BLOCKS[: BLOCKS.index(block) + 1]:
        if earlier.page == block.page and not earlier.reason and earlier not in session.done:
            session.run(earlier)


NOT_RUN = [
    words
    for block in BLOCKS
    if block.reason and block.language == "sh"
    for words in commands_of(block)
    if words[0] == "moelora"
]


@pytest.mark.parametrize("words", NOT_RUN, ids=shlex.join)
def test_a_command_that_is_not_run_is_valid(words: list[str]) -> None:
    """Its options exist and have valid values."""
    command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:]).close()


def test_the_guides_client(tmp_path: Path) -> None:
    """The client of the serving guide talks to a server of the names that the guide gives."""
    (client,) = [b for b in BLOCKS if b.page.name == "serving.md" and b.language == "python"]
    address = "http://127.0.0.1:8000"
    assert client.code.count(address) == 1
    llm = tiny_model(tmp_path)
    llm.load_adapter("large", tmp_path / "adapters" / "experts-r24")
    with served(llm, tmp_path, model_name="model") as server:
        names: dict[str, object] = {}
        exec(client.code.replace(address, server.url), names)
        names["client"].close()  # type: ignore[attr-defined]
        finished = 'moelora_adapter_requests_total{adapter="%s"}'
        metrics = server.metrics()
        assert (metrics[finished % "large"], metrics[finished % "model"]) == (1, 1)


def test_a_page_cannot_hide_a_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: why -->\n```sh\na\n```\n\n```python\nb = 1\n```\n```text\nc\n```\n"
    )
    assert [(b.language, b.code, b.reason, b.line) for b in blocks_of(page)] == [
        ("sh", "a\n", "why", 2),
        ("python", "b = 1\n", None, 6),
    ]
    page.write_text("```python\nb = 1\n")
    with pytest.raises(AssertionError):
        list(blocks_of(page))


@pytest.mark.parametrize("package", [moelora_jax, moelora_kernels], ids=lambda p: p.__name__)
def test_every_public_name_is_in_the_reference(package: ModuleType) -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    documented = set(re.findall(r"^::: ([\w.]+)", text, flags=re.MULTILINE))
    things = {name: getattr(package, name) for name in package.__all__}
    public = {n: t for n, t in things.items() if inspect.isclass(t) or inspect.isfunction(t)}
    assert len(public) > 10
    for name, thing in public.items():
        assert thing.__doc__, name  # The site leaves out what has no docstring.
        places = {f"{package.__name__}.{name}", thing.__module__}
        assert places & documented, name


def test_the_readme_compares_what_was_measured() -> None:
    """Multiples of the roofline: ours from the document of results, theirs from the anchors."""
    anchors = [json.loads(line) for line in ANCHORS.read_text(encoding="utf-8").splitlines()]
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    last = r"^\| all \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| (\d+) of (\d+) \|$"
    ((ours, ratio, won, count),) = re.findall(last, performance, flags=re.MULTILINE)
    cells = [f"{ours}, {count} points"]
    for engine in ("sglang_new", "vllm"):
        points = [a["us"][engine] / a["roofline_us"] for a in anchors if engine in a["us"]]
        cells.append(f"{np.exp(np.mean(np.log(points))):.2f}, {len(points)} points")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if "in multiples of its roofline" in line]
    assert line.replace("*", "").split(" | ")[1:4] == cells
    assert (
        f"takes {ratio} times as long as in the fastest other engine, in the geometric mean of "
        f"{count} points, and is ahead at {won} of them" in " ".join(readme.split())
    )


def test_the_site_shows_the_serving_loop() -> None:
    """The page names the file as the site's extension wants it, whatever formats its blocks."""
    text = (ROOT / "docs" / "serving_loop.md").read_text(encoding="utf-8")
    snippets = {"pymdownx.snippets": {"base_path": [str(ROOT)], "check_paths": True}}
    html = markdown.markdown(text, extensions=[*snippets], extension_configs=snippets)
    assert "def compile_programs(" in html


def test_serving_loop_by_hand(demo: Path) -> None:
    """Nothing is compiled or moved, and the tokens are those of the engine."""
    example = runpy.run_path(str(EXAMPLE))
    requests, counts = example["serve"](demo)
    assert counts["compilations after warm-up"] == 0
    assert counts["arrays moved"] == 0
    # Four adapters in two slots: somebody had to leave, and one was found where it was.
    assert counts["adapters written between steps"] == len(ADAPTERS)

    runtime = RuntimeConfig(
        LoraConfig(max_rank=32), BucketConfig((8,), (64,)), CacheConfig(max_length=32)
    )
    llm = LLM.load(demo / "model", runtime=runtime)
    for name in ADAPTERS:
        llm.load_adapter(name, demo / "adapters" / name)
    prompts = [Prompt(tokens, name) for tokens, name in example["REQUESTS"]]
    expected = llm.generate(prompts, max_new_tokens=example["NEW_TOKENS"], stop_tokens=())
    for request, completion, prompt in zip(requests, expected, prompts, strict=True):
        assert tuple(request.tokens) == (*prompt.tokens, *completion.tokens)
