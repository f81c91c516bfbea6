"""What the documentation promises is true: code runs, links lead somewhere, names are documented.

Python blocks of one file share a namespace and run in a temporary folder that links to everything
in the repository. Shell blocks are checked word by word against the programs, subcommands and
options that exist. A comment above a block changes that:

    <!-- test: run -->           run this shell block as well
    <!-- test: skip, REASON -->  do not run this block; the reason is shown in the summary
"""

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tools import grid

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("packages/*/*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>run|skip)(?:, (?P<reason>[^>]*?))? -->\n\n?)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHELLS = ("console", "bash", "sh", "shell")
HEADINGS = ["Definition", "Shapes", "Algorithm", "Numerics", "Backward", "Limits", "References"]
OUR_PROGRAMS = {"ssm-models": ("-m", "ssm.cli"), "ssm-kernels": ("-m", "ssm_kernels.cli")}
OTHER_PROGRAMS = {
    *("apt", "cat", "cd", "clang-format", "cmake", "cp", "curl", "dnf", "export", "g++", "git"),
    *("ls", "mkdir", "meson", "nvcc", "pip", "pre-commit", "pytest", "python", "python3", "ruff"),
    "torchrun",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(languages: tuple[str, ...]) -> list:
    """List (page, line of the first line of code, match) for the blocks in these languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("code")) + 1
                found.append(pytest.param(page, line, match, id=f"{name_of(page)}:{line}"))
    return found


def refuse_reasonless_skip(match: re.Match) -> None:
    assert match["mark"] != "skip" or match["reason"], "a skipped block must give its reason"


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder that shows the repository and keeps what is written beside it."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", ".venv", "build"}:
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PYTHON_PAGES = sorted({p.values[0] for p in blocks(("python",))})


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page, sandbox):
    namespace = {"__name__": "__main__"}
    skipped = []
    for parameters in blocks(("python",)):
        where, line, match = parameters.values
        if where != page:
            continue
        refuse_reasonless_skip(match)
        if match["mark"] == "skip":
            skipped.append(match["reason"])
            continue
        if "transformers" in match["code"] and not importlib.util.find_spec("transformers"):
            skipped.append("transformers is not installed")
            continue
        # Blank lines in front give a traceback the line numbers of the page.
        exec(compile("\n" * (line - 1) + match["code"], str(page), "exec"), namespace)
    if skipped:
        pytest.skip("; ".join(skipped))


def commands_of(code: str, language: str) -> list[list[str]]:
    """Return the words of each command; a console block has commands only after a prompt."""
    code = code.replace("\\\n", " ")
    lines = [line.strip() for line in code.splitlines()]
    if language == "console" or any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    commands = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if not set(token) <= set(";&|()"):
                words.append(token)
                continue
            while words and (re.match(r"\w+=", words[0]) or words[0] == "sudo"):
                words = words[1:]
            if words:
                commands.append(words)
            words = []
    return commands


def our_env() -> dict[str, str]:
    """Return an environment in which our packages are found as they are here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@cache
def help_of(*arguments: str) -> str:
    """Return what a program of this repository prints for --help."""
    command = [sys.executable, *arguments, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=our_env())
    assert result.returncode == 0, f"{' '.join(arguments)} --help: {result.stderr}"
    return result.stdout


def command_fault(words: list[str]) -> str:
    """Return why a documented command cannot work, or an empty string."""
    program = Path(words[0]).name
    script = ()
    if program in OUR_PROGRAMS:
        script, rest = OUR_PROGRAMS[program], words[1:]
    elif program in {"python", "python3"} and len(words) > 1 and words[1].endswith(".py"):
        if not (ROOT / words[1]).is_file():
            return f"{words[1]} does not exist"
        program, script, rest = Path(words[1]).name, (words[1],), words[2:]
    elif program not in OTHER_PROGRAMS:
        return f"{program} is not a command this test knows"
    if not script:
        return ""
    text = help_of(*script)
    if rest and program in OUR_PROGRAMS and not rest[0].startswith("-"):
        if not re.search(rf"\b{re.escape(rest[0])}\b", text):
            return f"{program} has no command {rest[0]}"
        text += help_of(*script, rest[0])
    options = [word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    unknown = [o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", text)]
    return f"{program} has no option {', '.join(unknown)}" if unknown else ""


def run_shell(code: str) -> None:
    """Run the commands of a block, with our programs taken from this checkout."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(text.startswith("$ ") for text in lines):
        lines = [text[2:] for text in lines if text.startswith("$ ")]
    programs = {**OUR_PROGRAMS, "python": (), "python3": ()}
    python = shlex.quote(sys.executable)
    header = [f'{name}() {{ {python} {" ".join(how)} "$@"; }}' for name, how in programs.items()]
    script = "\n".join(["set -e", *header, *lines])
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=our_env())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("page", "line", "match"), blocks(SHELLS))
def test_shell_blocks_name_what_exists(page, line, match, sandbox):
    refuse_reasonless_skip(match)
    if match["mark"] == "skip":
        pytest.skip(match["reason"])
    faults = [command_fault(words) for words in commands_of(match["code"], match["language"])]
    assert not [fault for fault in faults if fault]
    if match["mark"] == "run":
        run_shell(match["code"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert not [t for t in local if not (page.parent / t).exists()]


@pytest.mark.parametrize("op", grid.OPERATORS)
def test_operator_page_has_the_fixed_headings(op):
    page = ROOT / f"docs/ops/{op}.md"
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^## (\w+)", text, re.MULTILINE)
    assert [h for h in headings if h in HEADINGS] == HEADINGS


def public_names(module) -> list:
    """List (name, object) of the public functions and classes that a module offers."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    objects = [(name, getattr(module, name)) for name in names]
    return [(n, o) for n, o in objects if callable(o) and not inspect.ismodule(o)]


def is_ours(thing) -> bool:
    """Say whether a function or class comes from one of the two packages."""
    return (getattr(thing, "__module__", "") or "").split(".")[0] in {"ssm", "ssm_kernels", "_cpu"}


def signature_of(thing) -> tuple[list[str], bool]:
    """Return the parameter names, and whether something is returned."""
    signatures = getattr(thing, "__nb_signature__", None)
    if signatures:
        text = signatures[0][0]
        return re.findall(r"(\w+):", text), not text.rstrip().endswith("-> None")
    signature = inspect.signature(thing)
    names = [name for name in signature.parameters if name not in {"self", "cls"}]
    silent = inspect.isclass(thing) or signature.return_annotation in (None, "None")
    return names, not silent


def docstring_of(thing) -> str:
    """Return a docstring without the signature that nanobind writes above it."""
    signatures = getattr(thing, "__nb_signature__", None)
    return (signatures[0][1] if signatures else inspect.getdoc(thing)) or ""


def docstring_faults(name: str, thing, forward=None) -> list[str]:
    """Return what is missing from a docstring; a gradient may leave the inputs to its forward."""
    doc = docstring_of(thing)
    if not doc.strip():
        return [f"{name}: no docstring"]
    parameters, returns = signature_of(thing)
    faults = []
    if parameters and "Args:" not in doc:
        faults.append(f"{name}: no Args")
    explained = doc.partition("Args:")[2]
    if forward and forward.__name__ in doc:
        explained += docstring_of(forward).partition("Args:")[2]
    faults += [
        f"{name}: {p} is not explained"
        for p in parameters
        if "Args:" in doc and not re.search(rf"\b{re.escape(p)}\b", explained)
    ]
    # The one sentence of a function without parameters already says what it returns.
    if parameters and returns and "Returns:" not in doc and "Yields:" not in doc:
        faults.append(f"{name}: no Returns")
    return faults


MODULES = ["ssm.ops", "ssm.modules", "ssm.models", "ssm.distributed", "ssm.compat", "ssm_kernels"]


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_have_docstrings(module_name):
    module = importlib.import_module(module_name)
    offered = [(n, o) for n, o in public_names(module) if is_ours(o)]
    for path in Path(module.__file__).parent.glob("*.py") if module_name != "ssm_kernels" else []:
        if path.stem != "__init__" and not path.stem.startswith("_"):
            inner = importlib.import_module(f"{module_name}.{path.stem}")
            offered += [
                (f"{path.stem}.{n}", o)
                for n, o in public_names(inner)
                if getattr(o, "__module__", "") == inner.__name__
            ]
    assert offered, f"{module_name} offers nothing"
    faults = []
    for name, thing in offered:
        forward = getattr(module, name.replace("_bwd", "_fwd"), None)
        faults += docstring_faults(f"{module_name}.{name}", thing, forward)
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(function) and not method.startswith("_") and not function.__doc__:
                faults.append(f"{module_name}.{name}.{method}: no docstring")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("op", "row"), [(op, row) for row in grid.OPERATORS for op in grid.operators_of(row)]
)
def test_operator_docstring_is_a_contract(op, row):
    doc = inspect.getdoc(getattr(importlib.import_module("ssm.ops"), op)) or ""
    assert re.search(r"\((B|R|S|\.\.\.), ", doc), "no shapes"
    assert re.search(r"float32|float64|dtype", doc), "no dtypes"
    assert "Raises:" in doc, "no errors"
    assert re.search(rf"arXiv:\d{{4}}\.\d{{5}}|docs/ops/{row}\.md", doc), "no source"


def test_block_pattern_reads_marks():
    text = "<!-- test: skip, needs a GPU -->\n```python\nx = 1\n```\n\n```console\n$ ls\n```\n"
    first, second = BLOCK.finditer(text)
    assert (first["mark"], first["reason"], first["code"]) == ("skip", "needs a GPU", "x = 1\n")
    assert (second["mark"], second["language"], second["code"]) == (None, "console", "$ ls\n")


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python3 tools/dev.py test -j 4", ""),
        ("PATH=x python3 tools/dev.py test --jobs=4 && git status", ""),
        ("python3 tools/dev.py test --fast", "dev.py has no option --fast"),
        ("python3 -c 'x; y | z' && ls # nothing", ""),
        ("ls | nothing", "nothing is not a command this test knows"),
        ("python3 tools/nothing.py", "tools/nothing.py does not exist"),
        ("ssm-modles info", "ssm-modles is not a command this test knows"),
    ],
)
def test_command_fault(command, fault):
    faults = [command_fault(words) for words in commands_of(f"$ {command}\noutput\n", "console")]
    assert next((f for f in faults if f), "").startswith(fault)
    assert bool(fault) == any(faults)


def test_docstring_faults():
    def half_bwd(u, delta):
        """As half.

        Args:
            delta: (B, L).
        """

    def undocumented(u):
        return u

    def half(u, delta):
        """Do it.

        Args:
            u: (B, L).
        """
        return u + delta

    assert docstring_faults("f", undocumented) == ["f: no docstring"]
    assert docstring_faults("f", half) == ["f: delta is not explained", "f: no Returns"]
    assert "f: u is not explained" in docstring_faults("f", half_bwd)
    assert docstring_faults("f", half_bwd, half) == ["f: no Returns"]
    assert docstring_faults("f", docstring_faults) == ["f: no Args", "f: no Returns"]
