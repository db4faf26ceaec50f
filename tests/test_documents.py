"""What the documents say exists: links, files, and every command that is printed anywhere."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from hebrew_asr.command_line import as_written
from train_hebrew_asr_enhanced import TrainingConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("hebrew_asr", "scripts", "tests", "benchmarks", "demo", "docs")
TOP = "|".join(FOLDERS)
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
NAMES = ["/" + path.relative_to(ROOT).as_posix() for path in FILES]
MARKDOWN = [path for path in FILES if path.suffix == ".md" and path.parent.name != "tuned"]
SOURCES = [path for path in FILES if path.suffix == ".py" and "tests" not in path.parts]
PARSERS = {  # of each command, what reads its command line and starts nothing
    "train_round2_gradual.py": "recipe",
    "train_hebrew_asr_enhanced.py": "parse",
    "evaluate_hebrew_asr.py": "parse",
    "transcribe_hebrew_asr.py": "parse",
    "scripts/align_recordings.py": "parse",
    "scripts/audit_corpus.py": "settings",
    "scripts/average_checkpoints.py": "parse",
    "scripts/convert_layout.py": "parse",
    "scripts/pseudo_label.py": "parse",
    "scripts/train_domain.py": "recipe",
    "scripts/train_few_hours.py": "recipe",
    "scripts/train_round3_gspo.py": "recipe",
}
torchrun = get_args_parser()
TOOLS = {"hf", "wandb", "trackio", "pytest", "ruff", "lint-imports", "ty"}  # of the locked packages


def texts() -> Iterator[tuple[Path, str]]:
    """Every document, and every string in a source."""
    for path in MARKDOWN:
        yield path, path.read_text(encoding="utf-8")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


def commands() -> list[str]:
    """Command lines that begin with `uv run`, without what is said about them after `#` or two spaces."""
    found = set()
    for _, text in texts():
        text = re.sub(r" *\\\n *", " ", text)
        prose, blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.findall(r"```.*?```", text, re.DOTALL)
        lines = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        lines += "\n".join([*blocks, *re.findall(r"^    .*$", prose, re.MULTILINE)]).splitlines()
        for line in lines:
            if match := re.search(r"uv run .*", line):
                command = re.split(r"\s{2,}|\s#| && ", match[0])[0]
                if "'" not in command:
                    command = command.replace("[", "").replace("]", "")  # around what may be left out
                found.add(command.removesuffix("'") if command.count("'") % 2 else command)  # of bash -c '…'
    return sorted(found)


def words_of(command: str, config: Path) -> list[str]:
    """The words after `uv run`, its own options, python and torchrun; placeholders are filled in."""
    words = shlex.split(command)[2:]
    while words[0] in ("--group", "--with"):
        words = words[2:]
    words = words[1:] if words[0] == "--no-sync" else words
    if words[0] in ("torchrun", "python"):
        words = words[1:]
        while words[0].startswith("--"):  # torchrun's
            words = words[1:]
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    filled = {"N": "1", "runs/NAME/config.yaml": str(config)}
    return [filled.get(word, word) for word in words]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(as_written(TrainingConfig())))
    return file


@pytest.mark.parametrize("command", commands())
def test_every_printed_command_parses(command, config_file, capsys):
    script, *arguments = words_of(command, config_file)
    if script in TOOLS:
        return
    assert (ROOT / script).is_file(), f"{script} is no command"
    if not arguments:  # its name alone
        return
    if script in PARSERS:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            getattr(module, PARSERS[script])(arguments)
        except SystemExit as end:  # of --help and --print_config
            assert end.code == 0
        return
    source = (ROOT / script).read_text(encoding="utf-8")
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    settings = {f"--{one.name}" for one in fields(TrainingConfig)}  # which benchmarks/effects.py takes too
    assert not {option for option in options - settings if f'"{option}"' not in source}


@pytest.mark.parametrize("script", PARSERS)
def test_torchrun_passes_every_option_on(script, capsys):
    """It refuses one that is the beginning of two of its own, even behind the script's name."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit):
        getattr(module, PARSERS[script])(["--help"])
    options = set(re.findall(r"(?<![\w-])--\w+", capsys.readouterr().out))
    assert len(options) > 1
    for option in options:
        assert torchrun.parse_args([script, option, "1"]).training_script_args == [option, "1"]


def test_commands_are_found_in_documents_docstrings_and_messages():
    found = commands()
    assert "uv run train_round2_gradual.py --plan" in found
    assert "uv run torchrun --nproc_per_node=2 train_round2_gradual.py --demo" in found
    assert any("--train_sources '[{" in command and "--eval_sources" in command for command in found)
    assert any("train_domain.py" in command and "--nonspeech data/noise" in command for command in found)
    assert {words_of(command, ROOT)[0] for command in found} >= {*PARSERS, "hf", "pytest"}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_named_files_exist():
    """Names of Python files and templates, and paths that begin with a folder of the project."""
    missing = set()
    for path, text in texts():
        if path.name == "CHANGELOG.md":  # it names what was moved
            continue
        named = re.findall(r"(?<![\w./<*{-])((?:[\w-]+/)*[\w-]+\.(?:py|jinja))\b(?!\.)(?:::(\w+))?", text)
        named += [(name, "") for name in re.findall(rf"(?<![\w./-])((?:{TOP})/[\w./-]*\w)(?![\w*…<{{])", text)]
        for name, part in named:
            fitting = [file for file, known in zip(FILES, NAMES, strict=True) if known.endswith("/" + name)]
            if not fitting or (part and part not in fitting[0].read_text(encoding="utf-8")):
                missing.add((path.relative_to(ROOT).as_posix(), name))
    assert {name for _, name in missing} <= {"evaluate_model.py"}, "all but the command of ivrit.ai's own harness"


def test_architecture_has_every_file_of_the_package_once():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("<!-- tree -->")[1].split("```")[1]
    listed, folders = [], {0: ""}
    for line in tree.strip().splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        if name.endswith("/"):
            folders[depth + 2] = folders[depth] + name
        else:
            listed.append(folders[depth] + name)
    commands_at_root = [path for path in SOURCES if path.parent == ROOT]
    package = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("hebrew_asr", "scripts")]
    there = [path.relative_to(ROOT).as_posix() for path in [*commands_at_root, *package] if path.name != "__init__.py"]
    assert {*there} - {*listed} == set(), "add a line for each to the tree in docs/architecture.md"
    assert sorted(listed) == sorted(there)


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
