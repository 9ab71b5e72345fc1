"""The house: which folder may look into which. The table stands in the package docstrings and in DECISIONS.md."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "schemas": set(),
    "video": {"schemas"},
    "samples": {"schemas", "video"},
    "converters": {"schemas", "video"},
    "models": {"schemas"},
    "stages": {"schemas", "video", "models"},
    "streams": {"schemas", "video"},
    "pipeline": {"schemas", "video", "samples", "converters", "models", "stages", "streams"},
    "trainer": {"schemas", "video", "samples", "models", "streams"},
    "commands": {
        "schemas",
        "video",
        "samples",
        "converters",
        "models",
        "stages",
        "streams",
        "pipeline",
        "trainer",
    },
}
NUMPY_ONLY = {"schemas"}


def relative_imports(path: Path) -> set[str]:
    """Top-level folders of the package that a module imports, at any depth of its code."""
    found: set[str] = set()
    folder = path.parent.relative_to(REPOSITORY).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(folder)[: len(folder) - (node.level - 1)]
            parts = base + (node.module.split(".") if node.module else [])
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


def outside_imports(path: Path) -> set[str]:
    """Third-party modules a file imports when it is loaded or later."""
    import sys

    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names and name != "__future__"}


def test_folders_look_only_where_the_table_allows():
    wrong = []
    for folder, allowed in MAY_IMPORT.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for target in relative_imports(path) - allowed - {folder}:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {target}")
    assert wrong == []


def test_schemas_know_only_numpy():
    wrong = []
    for folder in NUMPY_ONLY:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            wrong += [f"{path.name} imports {name}" for name in outside_imports(path) - {"numpy"}]
    assert wrong == []


def test_the_package_never_imports_itself_by_name():
    wrong = []
    for folder in MAY_IMPORT:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if "dpipe" in outside_imports(path):
                wrong.append(str(path.relative_to(REPOSITORY)))
    assert wrong == []


def test_every_folder_of_the_house_is_in_the_table():
    folders = {p.parent.name for p in REPOSITORY.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
