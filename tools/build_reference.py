"""docs/reference.md from the docstrings: every public module, class and function that has one, with
its signature. Nothing is imported.

    python tools/build_reference.py [--check]

--check: exit code 1 if the file is not what the docstrings say.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "reference.md"
INTERNAL = (
    "cluster",
    "report",  # the command and reporting/
    "inference.samples",
)  # parts of ebwm_scale that nobody imports
PACKAGES = {"ebwm_scale": ROOT / "ebwm_scale", "ebwm_kernels": ROOT / "kernels" / "ebwm_kernels"}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = reference()
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
        print(TARGET.relative_to(ROOT))
        return 0
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print(
            "docs/reference.md is not what the docstrings say: run python tools/build_reference.py"
        )
        return 1
    return 0


def reference() -> str:
    """The page as Markdown."""
    parts = [
        "# Reference",
        (
            "Built from the docstrings by `tools/build_reference.py`. Private names, what has no "
            "docstring, and pages and jobs, which nobody imports, are left out; "
            "`python -m module --help` explains commands."
        ),
    ]
    contents, bodies = [], []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(
                [package, *path.relative_to(folder).with_suffix("").parts]
            ).removesuffix(".__init__")
            inner = name.partition(".")[2]
            if not any(part.startswith("_") for part in name.split(".")) and not inner.startswith(
                INTERNAL
            ):
                body = module(name, ast.parse(path.read_text(encoding="utf-8")))
                if body:
                    contents.append(f"[`{name}`](#{name.replace('.', '').lower()})")
                    bodies.append(body)
    return "\n\n".join([*parts, " · ".join(contents), *bodies]) + "\n"


def module(name: str, tree: ast.Module) -> str:
    """A section, or nothing where nothing is documented."""
    documented = ast.get_docstring(tree)
    parts = [entry(node) for node in tree.body if not getattr(node, "name", "_").startswith("_")]
    parts = [part for part in parts if part]
    if not documented and not parts:
        return ""
    return "\n\n".join([f"## {name}", *([fenced(documented)] if documented else []), *parts])


def entry(node: ast.AST, owner: str = "") -> str:
    """A class or function with what it says of itself, methods below."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        documented = ast.get_docstring(node)
        return f"**`{owner}{signature(node)}`**\n\n{fenced(documented)}" if documented else ""
    if not isinstance(node, ast.ClassDef):
        return ""
    documented = ast.get_docstring(node)
    methods = [
        entry(child, f"{node.name}.")
        for child in node.body
        if not getattr(child, "name", "_").startswith("_")
    ]
    methods = [method for method in methods if method]
    if not documented and not methods:
        return ""
    start = next(
        (
            child
            for child in node.body
            if isinstance(child, ast.FunctionDef) and child.name == "__init__"
        ),
        None,
    )
    fields = [
        f"{child.target.id}: {ast.unparse(child.annotation)}"
        + (f" = {ast.unparse(child.value)}" if child.value is not None else "")
        for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    ]
    made = (
        signature(start, node.name)
        if start is not None
        else f"{node.name}({', '.join(fields)})"
        if fields
        else node.name
    )
    return "\n\n".join(
        [f"**class `{made}`**", *([fenced(documented)] if documented else []), *methods]
    )


def signature(node: ast.FunctionDef, name: str | None = None) -> str:
    arguments = ast.unparse(node.args)
    for receiver in ("self", "cls"):
        arguments = arguments.removeprefix(f"{receiver}, ") if arguments != receiver else ""
    returns = (
        f" -> {ast.unparse(node.returns)}" if node.returns is not None and name is None else ""
    )
    return f"{name or node.name}({arguments}){returns}"


def fenced(text: str) -> str:
    return f"```text\n{inspect.cleandoc(text)}\n```"


if __name__ == "__main__":
    raise SystemExit(main())
