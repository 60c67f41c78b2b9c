# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What the pages of the site say is so: names, code, sentences of a verdict. ``make docs`` builds them."""

import ast
import importlib
import re
import runpy
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import pyro_artransform
from pyro_artransform.diagnostics.checks import Check, warn_of_prior
from tests.project.conftest import python_blocks, shortened

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = "pyro_artransform"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
REFERENCE = {path.name: path.read_text() for path in sorted((DOCS / "api").glob("*.rst"))}
# The modules whose names are public; `guides` and `inference` have more names than the front door.
MODULES = [
    "",
    *("diagnostics", "flows", "flows.conditioners", "flows.conditioners.masks", "flows.transforms"),
    *("flows.univariate", "guides", "inference", "model", "model.graphs", "model.protocols"),
    *("plots", "posterior", "sampling", "testing"),
]
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
MARKDOWN = sorted(
    path
    for folder in (ROOT, DOCS, ROOT / "benchmarks", ROOT / "tutorials")
    for path in [*folder.glob("*.md"), *folder.glob("*.ipynb")]
)


def script_of_the_site(name: str) -> SimpleNamespace:
    """The names of a script in the folder of the pages."""
    return SimpleNamespace(**runpy.run_path(str(DOCS / f"{name}.py")))


with_dots = script_of_the_site("check_table").with_dots
RUN_PAGES = script_of_the_site("run_pages")


def module(name: str) -> ModuleType:
    found = importlib.import_module(PACKAGE)
    for part in filter(None, name.split(".")):
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def described() -> Iterator[Any]:
    """The objects that the reference describes."""
    for text in REFERENCE.values():
        current = PACKAGE
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", text, flags=re.MULTILINE):
            if directive in ("module", "currentmodule", "automodule"):
                current = name
            if directive == "automodule":
                found = importlib.import_module(name)
                yield from (getattr(found, public) for public in own_names(found))
            elif directive.startswith("auto"):
                yield resolve(name if name.startswith(PACKAGE) else f"{current}.{name}")


def resolve(target: str) -> Any:
    """The object of a dotted name: a name of a module comes before a module of the same name."""
    first, *rest = target.split(".")
    found: Any = importlib.import_module(first)
    for part in rest:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def own_names(found: ModuleType) -> list[str]:
    """The public names of a module: its ``__all__``, or else all that it defines."""
    defined = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == found.__name__
    ]
    return list(getattr(found, "__all__", defined))


# kept, so that no id is used twice
DESCRIBED = {id(value): value for value in described()}


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    values = {public: getattr(module(name), public) for public in own_names(module(name))}
    is_module = {public for public, value in values.items() if isinstance(value, ModuleType)}
    missing = [p for p in values if p not in is_module and id(values[p]) not in DESCRIBED]
    assert not missing
    named = {values[public].__name__.removeprefix(f"{PACKAGE}.") for public in is_module}
    assert named <= {*MODULES}, "a public module whose names nobody looks for"


@pytest.mark.parametrize(("folder", "pattern"), [("benchmarks", "*.md"), ("tutorials", "*.ipynb")])
def test_every_benchmark_and_tutorial_is_listed(folder: str, pattern: str) -> None:
    linked = set(re.findall(rf"\]\(\.\./({folder}/\S+)\)", PAGES[f"{folder}.md"]))
    assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)} <= linked


# ArviZ finds so few draws too few
@pytest.mark.filterwarnings("ignore:(More chains|Estimated shape parameter of Pareto):UserWarning")
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if python_blocks(text)])
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page alone, with short fits and few draws."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / page.replace(".md", ".py")
    script.write_text(shortened(python_blocks(PAGES[page])))
    runpy.run_path(str(script), run_name=script.stem)


@pytest.mark.slow
def test_the_fit_of_the_first_page_prints_its_verdict() -> None:
    """To the digits of the sentence's ELBO: other processors round otherwise."""
    first, printed = (
        re.findall(rf"```{kind}\n(.*?)```", PAGES["start.md"], re.DOTALL)[0]
        for kind in ("python", "text")
    )
    names: dict[str, Any] = {}
    exec(first.replace("seed=0", "seed=0, progress=False"), names)
    (elbo,) = re.findall(r"ELBO +(-[\d.]+)", printed)
    assert names["result"].elbo == pytest.approx(float(elbo), abs=2e-3)
    assert repr(names["result"]).startswith(printed.split(",")[0])


every_page = pytest.mark.parametrize(
    "path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)).replace("/", "-")
)


@every_page
def test_a_page_can_be_read_in_a_checkout(path: Path) -> None:
    """Its links lead to files that are there before the site is built, it has no roles of Sphinx, and
    rows of its tables are as long as their heads, below which a page leaves cells out.
    """
    text = path.read_text()
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", text)
    built = {DOCS / folder for folder in ("_build", "benchmarks", "tutorials")}
    targets = {link: (path.parent / link).resolve() for link in links}
    missing = [link for link, to in targets.items() if not to.exists() or built & {*to.parents}]
    assert not missing
    assert not re.findall(r"\{[\w:]+\}`", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table.splitlines()[0]


def test_a_fraction_of_two_digits_is_that_of_tex() -> None:
    pytest.importorskip("sphinx")
    script = script_of_the_site("mathml")
    assert script.from_tex(r"\tfrac12 (x)") == script.from_tex(r"\tfrac{1}{2} (x)")
    assert script.from_tex(r"s \log x").count("<mspace") == 2
    assert script.from_tex(r"\log (x)").count("<mspace") == 1


@pytest.mark.parametrize("page", list(PAGES))
def test_the_names_are_there(page: str) -> None:
    rooms = "conditioners|diagnostics|inference|plots|sampling|testing|transforms|univariate"
    for room, name in set(re.findall(rf"(?<![\w.])({rooms})\.(\w+)", PAGES[page])):
        assert name in {"py", "md", "html"} or hasattr(module(room), name), f"{room}.{name}"
    for target in re.findall(rf"`({PACKAGE}\.[\w.]+)`", PAGES[page]):
        assert resolve(target) is not None, target


def test_every_failure_is_on_its_page_once() -> None:
    files = (ROOT / "benchmarks" / "pitfalls").glob("test_*.py")
    text = "".join(path.read_text() for path in files)
    found = re.findall(r"`(f\d\d_\w+)` \|$", PAGES["failures.md"], re.M)
    assert sorted(found) == sorted(re.findall(r"^def test_(f\d\d_\w+)", text, re.M))


def sentences(path: Path) -> Iterator[str]:
    """The texts in a file, with dots where a number or a name is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield with_dots(node.value)


def test_a_verdict_says_what_its_page_quotes() -> None:
    package = ROOT / PACKAGE
    rooms = "inference", "diagnostics", "sampling"
    paths = [path for room in rooms for path in (package / room).rglob("*.py")]
    paths.remove(package / "diagnostics" / "checks.py")  # says what it means with the same quotes
    paths += [package / "_base" / "time_limit.py", package / "model" / "traces.py"]
    templates = [with_dots(part) for check in Check for part in check.value[:2]]
    with pytest.warns(UserWarning, match="posterior is the prior"):
        templates.append(warn_of_prior(False))
    said = "\n".join([*templates, *(text for path in paths for text in sentences(path))])
    said = re.sub(r"\s+", " ", said)
    quotes = re.findall("“(.*?)”", PAGES["verdict.md"])
    assert len(quotes) > 20
    for quote in quotes:
        # the verdict begins with a sentence that is made of two
        assert quote.removesuffix(" …") in said, quote


def test_the_page_of_verdicts_has_the_table_that_its_script_writes() -> None:
    page = PAGES["verdict.md"]
    assert script_of_the_site("check_table").renewed(page) == page, "run python docs/check_table.py"


@pytest.mark.parametrize("check", Check)
def test_a_check_says_what_it_means(check: Check) -> None:
    """But for those whose sentence is made elsewhere."""
    assert bool(check.value.meaning) != bool(re.fullmatch(r"\{\w+\}", check.value.sentence))


def comments(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from (
            t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT
        )


def test_every_paper_that_the_code_names_is_in_the_bibliography() -> None:
    """A year in a docstring or a comment is that of a paper, whose first author stands before it."""
    script = script_of_the_site("bibliography")
    listed = {(paper.authors.split(",")[0].split()[0], paper.year) for paper in script.papers()}
    assert len(listed) > 40
    texts = [text for _, text in script.docstrings()]
    texts += [" ".join(comments(path)) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]
    for text in (re.sub(r"https?://\S+", "", text) for text in texts):
        for year in re.finditer(r"\b(?:19|20)\d\d(?=[),])", text):
            before = text[max(year.start() - 100, 0) : year.start()]
            known = any(author in before and year[0] == paper for author, paper in listed)
            assert known, f"{before}{year[0]}: expected Title (Authors, {year[0]}) in a docstring"


def test_the_check_of_links_finds_faults(tmp_path: Path) -> None:
    script = script_of_the_site("check_site")
    with pytest.raises(ValueError, match="a folder with pages"):
        script.faults(tmp_path)
    (tmp_path / "other.html").write_text('<p id="here">')
    for body, fault in (
        ('<a href="other.html#here"><a href="https://pyro.ai">', ""),
        ('<a href="other.html#there">', "no such place"),
        ('<img src="gone.png">', "is not there"),
        ('<script src="https://pyro.ai/a.js">', "from the network"),
    ):
        (tmp_path / "index.html").write_text(body)
        found = script.faults(tmp_path)
        assert len(found) == bool(fault), body
        assert all(fault in line for line in found)


def figures(text: str) -> set[str]:
    """Numbers in a text, without code, links to elsewhere and the commas of thousands."""
    words = re.sub(r"`[^`]*`|\[[^]]*\]\(https?:[^)]*\)|\]\([^)]*\)", " ", text)
    return {number.replace(",", "") for number in FIGURE.findall(words)}


def claims(page: str) -> Iterator[tuple[str, set[str]]]:
    """Paragraphs, items and rows of tables, each with the benchmarks that it names.

    A row that names none is of those that the paragraph before its table names.
    """
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    above = set[str]()
    for block in re.split(r"\n\s*\n|\n(?=- |\|)", prose):
        named = set(re.findall(r"\]\((?:\.\./)?(benchmarks(?:/\w+)?\.md)", block))
        if not block.startswith("|"):
            above = named
        yield block, named or above


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name
)
def test_figures_are_those_of_the_benchmark_that_is_named(path: Path) -> None:
    # the table of the benchmarks says what they are about
    for block, named in claims(path.read_text()) if path.name != "benchmarks.md" else ():
        if named:
            pages = [ROOT / name if "/" in name else DOCS / name for name in named]
            missing = figures(block) - set().union(*(figures(page.read_text()) for page in pages))
            assert not missing, f"{sorted(named)} lack {sorted(missing)} of: {block}"


def test_the_comparison_finds_a_wrong_figure() -> None:
    page = (
        "Faster ([all](benchmarks/fit.md), `seed=0`):\n\n| a | 1,200.5 |\n|---|---|\n\nOf 7 rows.\n"
    )
    paragraph, row, _, other = claims(page)
    assert paragraph[1] == row[1] == {"benchmarks/fit.md"}
    assert figures(paragraph[0]) == set()
    assert figures(row[0]) == {"1200.5"}
    assert not other[1]


def words(page: str) -> list[str]:
    """The text blocks of a page, without numbers: other processors round otherwise."""
    text = "\n".join(re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    return re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", text).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_PAGES.PAGES)
def test_a_page_shows_what_its_code_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGES[f"{name}.md"]
    assert words(RUN_PAGES.with_output(page)) == words(page)


def test_the_version_is_the_one_of_changelog_and_citation() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    version, date = headings[1].split(" - ")
    citation = (ROOT / "CITATION.cff").read_text()
    assert pyro_artransform.__version__ == version
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


def test_addresses_are_filled_in_at_one_place() -> None:
    paths = [path for pattern in ("*.md", "*.cff", "docs/*.md") for path in ROOT.glob(pattern)]
    paths += (ROOT / PACKAGE).rglob("*.py")
    placeholder = re.compile(r"example\.(org|com)|\bTODO\b|filled in by a maintainer")
    assert not [path for path in paths if placeholder.search(path.read_text())]


def test_what_is_missing_before_an_upload_is_said(tmp_path: Path) -> None:
    missing = runpy.run_path(str(ROOT / "tools" / "missing.py"))["missing"]
    project, changelog = tmp_path / "pyproject.toml", tmp_path / "CHANGELOG.md"
    project.write_text(
        '[project.urls]\nIssues = "https://example.org/x"\nSecurity = "https://pyro.ai"'
    )
    changelog.write_text("# Changelog\n\n## Unreleased\n\n### Added\n\n## 0.1.0 - 2026-01-01\n")
    address, version = missing(tmp_path)
    assert "Issues" in address
    assert "CHANGELOG" in version
    project.write_text(project.read_text().replace("example.org", "pyro.ai"))
    changelog.write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0 - 2026-01-01\n\n- All.\n")
    assert not missing(tmp_path)
