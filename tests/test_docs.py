"""Documents held true: generated pages are in step with the code, links lead somewhere, every command runs."""

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from pages import blocks, free_port, run_page

DOCS = REPOSITORY / "docs"
WRITTEN = [
    DOCS / "clusters.md",
    DOCS / "real-models.md",
]  # the tutorial and targets.md have tests of their own
EXAMPLES = {folder: sorted(DOCS.glob(f"{folder}/*.md")) for folder in ("sources", "stages", "recipes")}
PAGES = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]


def generated() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_generated_pages_say_what_the_code_says():
    for name, text in generated().items():
        assert (DOCS / name).is_file(), f"{name}: run `make docs`"
        assert (DOCS / name).read_text(encoding="utf-8") == text.rstrip() + "\n", f"{name}: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if heading and target.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, link


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES["sources"], ids=lambda page: page.stem)
def test_the_example_of_every_source_runs_as_typed(page: Path, tmp_path: Path):
    assert run_page(page, tmp_path) or page.stem == "own-files"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_of_stages_and_recipes_run_as_typed(tmp_path: Path):
    """One workspace for all pages: what one made, the next finds."""
    for number, page in enumerate([*EXAMPLES["stages"], *EXAMPLES["recipes"]]):
        assert run_page(page, tmp_path, {r"dpipe sample .*\n": ""} if number else None), page


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs_as_typed(page: Path, tmp_path: Path):
    assert len(run_page(page, tmp_path, {"8786": str(free_port())})) >= 3


@pytest.mark.slow
def test_the_three_commands_of_the_readme_run_as_typed(tmp_path: Path):
    """In a workspace that holds only raw/egodex; training is cut to a few steps."""
    readme = blocks(REPOSITORY / "README.md")
    three = next(block.body for block in readme if "dpipe train libra" in block.body)
    (tmp_path / "page.md").write_text(f"```sh\ndpipe sample egodex --episodes 2\n{three}```\n")
    (said,) = run_page(tmp_path / "page.md", tmp_path, {"train libra": "train libra --steps 4"})
    assert "libra: 4 steps" in said and (tmp_path / "runs/libra/egodex").is_dir()


def test_the_readmes_first_two_commands_are_targets_of_make():
    first = next(iter(blocks(REPOSITORY / "README.md"))).body.split("\n")
    makefile = (REPOSITORY / "Makefile").read_text()
    assert first[:2] == ["make demo", "make test"]
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE) for line in first[:2])
