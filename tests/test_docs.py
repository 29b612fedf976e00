"""What the pages and the docstrings show is what happens, and no link leads nowhere."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from pages import blocks, perform
from public import signatures

import deltackpt
from deltackpt.cli import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, cli
from deltackpt.errors import DeltackptError
from deltackpt.types import DTYPE_SIZES

ROOT = Path(__file__).parents[1]
COMMANDS_PAGE = (ROOT / "docs" / "cli.md").read_text()
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]
)
MODULES = ["deltackpt"] + [
    module.name
    for module in pkgutil.walk_packages(deltackpt.__path__, "deltackpt.")
    if module.name not in {"deltackpt._kernels", "deltackpt.__main__"}
]


#: Frameworks that not everybody has.
FRAMEWORKS = ("transformers",)


def skip_without(text: str) -> None:
    """Skip what imports a framework that is not installed."""
    for name in FRAMEWORKS:
        if re.search(rf"^(?:>>> )?(?:from|import) {name}\b", text, re.M):
            pytest.importorskip(name)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def readers_own() -> dict[str, object]:
    """What a page takes for granted: a training script with a model."""
    try:
        import torch
    except ImportError:
        pytest.skip("torch is not installed")
    model = torch.nn.Linear(1000, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1000)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": 1001, "loss": 0.5}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name: str):
    skip_without(Path(importlib.util.find_spec(name).origin).read_text())
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=page_id)
def test_what_a_page_shows_is_what_happens(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    skip_without(path.read_text())
    module = ModuleType("page")
    vars(module).update(readers_own() if any(block.kind == "python" for block in blocks(path)) else {})
    monkeypatch.setitem(sys.modules, "page", module)  # where the classes of a page are looked for
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTACKPT_STORE", raising=False)
    perform(path, tmp_path, module)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_the_links_of_a_page_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if "://" not in target:
            page, _, anchor = target.partition("#")
            found = path.parent / page if page else path
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)", without_blocks(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_design_pages_are_numbered_and_complete():
    pages = sorted((ROOT / "docs" / "design").glob("*.md"))
    assert [path.name[:4] for path in pages] == [f"{n:04}" for n in range(1, len(pages) + 1)]
    for path in pages:
        headings = re.findall(r"^## (.+)", path.read_text(), re.M)
        assert headings == ["Problem", "Decision", "Alternatives", "Consequences", "How it is tested"], path


# -- the page of the commands


def options_told(title: str) -> set[str]:
    """What stands before the meanings in a section's table."""
    text = re.search(rf"^## {title}\n(.*?)(?=^#|\Z)", COMMANDS_PAGE, re.M | re.S)[1]
    rows = re.findall(r"^\| (`-.*?) \|", text, re.M)
    return {option for row in rows for option in re.findall(r"`(.+?)`", row)}


def options_of(command: click.Command) -> set[str]:
    return {name for p in command.params if isinstance(p, click.Option) for name in p.opts}


def test_the_page_names_every_command_and_option():
    assert set(re.findall(r"^## `(\w+)`", COMMANDS_PAGE, re.M)) == set(cli.commands)
    assert options_told("For every command") == options_of(cli) | {"-h", "--help", "--json"}
    for name, command in cli.commands.items():
        of_every = set() if name == "completion" else {"--json", "-q", "--quiet"}
        assert options_told(f"`{name}`") | of_every == options_of(command), name


def test_the_page_names_every_exit_code():
    def kinds(error: type[DeltackptError]) -> set[type[DeltackptError]]:
        return {error}.union(*(kinds(kind) for kind in error.__subclasses__()))

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", COMMANDS_PAGE, re.M)}
    assert told == {0, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED} | {
        kind.exit_code for kind in kinds(DeltackptError)
    }


# -- the page of the names

REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def table_under(heading: str) -> list[list[str]]:
    """The cells of the table that comes first after a heading, without its head."""
    table = re.search(rf"^#+ {heading}\n(?s:.*?)^\|.+\n\|[-|]+\n((?:\|.+\n)+)", REFERENCE, re.M)[1]
    return [row.strip("|").split("|") for row in table.splitlines()]


def test_the_reference_has_every_public_name_with_its_signature():
    told = "".join(re.findall(r"^```api\n(.*?)^```", REFERENCE, re.M | re.S))
    entries = re.findall(r"^\S.*\n(?:(?: .*|\).*)\n)*", told, re.M)
    compact = [re.sub(r",(?=\))", "", re.sub(r"\s+", "", entry)) for entry in entries]
    assert sorted(compact) == sorted(re.sub(r"\s+", "", name) for name in signatures())


def test_the_reference_tells_every_field_of_a_report():
    told = [name for cells in table_under("SaveReport") for name in re.findall(r"`(\w+)`", cells[0])]
    assert told == [*(field.name for field in dataclasses.fields(deltackpt.SaveReport)), "ratio"]


def test_the_reference_tells_every_dtype():
    told = {name for cells in table_under("Dtypes") for name in re.findall(r"`(\w+)`", cells[0])}
    assert told == set(DTYPE_SIZES)


def test_the_reference_tells_every_error_with_its_exit_code():
    told = {name: int(code) for name, _, code in (map(str.strip, cells) for cells in table_under("Errors"))}
    kinds = [kind for kind in map(vars(deltackpt).get, deltackpt.__all__) if isinstance(kind, type)]
    assert told == {f"`{k.__name__}`": k.exit_code for k in kinds if issubclass(k, DeltackptError)}
