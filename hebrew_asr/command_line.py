"""A dataclass as a command line: jsonargparse reads it, and what it leaves open is settled here for all commands.

A field's docstring in the source is its help, its type says what it takes, and `Range` bounds a number.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from hebrew_asr.console import use_console
from hebrew_asr.errors import InputError
from hebrew_asr.start import imported, say_last

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
WIDTH = 110  # columns of the help
YES, NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")  # of environment variables
NOT_OPTIONS = {  # what other trainers call an option, and where it is here
    "gradient_accumulation_steps": ": it follows from --target_effective_batch and the number of processes",
    "per_device_train_batch_size": " (did you mean --target_effective_batch, or --tokens_per_micro_batch?)",
    "num_train_epochs": " (did you mean --num_epochs?)",
    "fp16": " (did you mean --bf16?)",
    "mixed_precision": " (did you mean --bf16?)",
    "device": ": GPUs are used where there are any; CUDA_VISIBLE_DEVICES chooses them, and -1 the CPU",
    "gpus": ": torchrun's --nproc_per_node=N starts N processes, with a GPU each",
    "num_gpus": ": torchrun's --nproc_per_node=N starts N processes, with a GPU each",
}


@dataclass(frozen=True)
class Range:
    """The bounds of a number, both included: `Annotated[int, Range(1)]`."""

    low: float
    high: float = float("inf")

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high == float("inf") else f"{self.low:g} to {self.high:.10g}"


@dataclass(frozen=True)
class Between(Range):
    """The bounds of a number that reaches neither of them."""

    def __contains__(self, number: float) -> bool:
        return self.low < number < self.high

    def __str__(self) -> str:
        return f"above {self.low:g}" if self.high == float("inf") else f"between {self.low:g} and {self.high:g}"


def variable(name: str, otherwise: Any, read: Callable[[str, str], Any] = lambda name, text: text) -> Any:
    """A field whose default is in an environment variable, which wins over `--config`; set to nothing it is not set."""

    def default() -> Any:
        text = os.environ.get(name, "").strip()
        return read(name, text) if text else otherwise

    return dataclasses.field(default_factory=default, metadata={"variable": name})


def switch(name: str, text: str) -> bool:
    """What an environment variable says that switches something on or off; InputError for another word."""
    if text.lower() not in YES + NO:
        raise InputError(f"{name} is {text!r}: it takes {' or '.join(YES)} to switch on, {' or '.join(NO)} for off")
    return text.lower() in YES


# ------------------------------------------------------------------------------------------------------------- Reading


def parse_config(
    argv: list[str],
    defaults: Config,
    demo: Callable[[], Config] | None = None,
    about: str = "",
    of_another: bool = False,
    adapt: Callable[[Config], Config] = lambda config: config,
) -> Config:
    """Reads `--field value` over `defaults`; raises InputError that names the field, what it takes and what came.

    A value given here replaces all that `--config FILE` or an earlier option says of its field, a list and a source
    too; `--field.name value` replaces one name of a field that is a dataclass. An environment variable that gives a
    field's default wins over the file. `--help` and `--print_config` print and exit.

    Args:
        demo: other defaults, which `--demo` takes.
        about: what the command does, for its help.
        of_another: `--config` may be of another command, whose own fields are left out.
        adapt: what else is done to the settings, before they are printed.
    """
    if "--help" in argv or "-h" in argv:
        print(help_of(defaults, about, has_demo=demo is not None))
        sys.exit(0)
    if demo is not None and "--demo" in argv:
        defaults = demo()
    given = options_of([word for word in argv if word not in ("--demo", "--print_config")], defaults)
    values = read_file(Path(given.pop("config")), defaults, of_another) if "config" in given else {}
    for field in dataclasses.fields(defaults):
        if os.environ.get(field.metadata.get("variable", ""), "").strip():
            values.pop(field.name, None)
    for name, value in typed(given, defaults).items():
        nested = dataclasses.is_dataclass(getattr(defaults, name)) and any(o.startswith(f"{name}.") for o in given)
        values[name] = (values.get(name) or {}) | value if nested else value
    config = adapt(replaced(defaults, values))
    if "--print_config" in argv:
        print(yaml.safe_dump(as_written(config), allow_unicode=True, sort_keys=False, width=120), end="")
        sys.exit(0)
    return config


READERS: list[Callable[[list[str]], Any]] = []  # how this process's command reads its options


def read_options() -> None:
    """Reads the options before torch is imported: what is wrong with them, and --help, need not wait for it.

    The training script calls it between its settings and those imports; a command that reads options by these settings
    has added to READERS how. It reads them again when everything is imported.
    """
    for read in READERS:
        use_console()
        try:
            read(sys.argv[1:])
        except (InputError, SystemExit) as end:
            imported()  # ends the sign of life
            if isinstance(end, SystemExit):  # of --help
                raise
            say_last(f"error: {end}")
            sys.exit(1)


def read_run_settings(file: Path, defaults: Config) -> Config:
    """The config.yaml of a run over `defaults`; fields that only its command has (Round 3's) are left out."""
    return replaced(defaults, read_file(file, defaults, of_another=True))


def as_written(config: Any) -> dict[str, Any]:
    """A config as YAML and JSON have it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_file(file: Path, defaults: Any, of_another: bool = False) -> dict[str, Any]:
    """What a config.yaml holds, by field; raises InputError for a name that is no field, unless it is of_another."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise InputError(f"{file} holds no settings: give the config.yaml of a run")
    names = [field.name for field in dataclasses.fields(defaults)]
    unknown = [str(name) for name in written if name not in names]
    if unknown and not of_another:
        raise InputError(f"{file}: there is no setting {unknown[0]!r}{meant(unknown[0], names)}")
    return {name: value for name, value in written.items() if name in names}


def refuse_classes(value: Any, where: str) -> None:
    """Raises InputError for a `class_path`, which jsonargparse would import before it refuses the class."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, dict) and "class_path" in value:
        raise InputError(f"{where}: class_path is no setting here: settings are values, and load no code")
    for one in inside:
        refuse_classes(one, where)


def split_options(argv: list[str], of: "type[DataclassInstance]") -> tuple[list[str], list[str]]:
    """The options that are fields of a dataclass, and the others."""
    names = {field.name for field in dataclasses.fields(of)}
    mine: list[str] = []
    others: list[str] = []
    for option, words in options_and_words(argv):
        (mine if option.partition(".")[0] in names else others).extend([f"--{option}", *words])
    return mine, others


def options_of(argv: list[str], defaults: Any) -> dict[str, str]:
    """The text of each option, as jsonargparse takes it; of an option given twice the last counts."""
    hints = typing.get_type_hints(type(defaults), include_extras=True)
    names = [field.name for field in dataclasses.fields(defaults)]
    given: dict[str, str] = {}
    for option, words in options_and_words(argv):
        name, _, part = option.partition(".")
        if name not in names and option != "config":
            raise InputError(f"there is no option --{option}{instead(name, names)}")
        if part and part not in (parts := parts_of(hints[name])):
            raise InputError(f"there is no option --{option}{meant(part, parts, f'--{name}.')}")
        if not part:
            given = {earlier: text for earlier, text in given.items() if not earlier.startswith(f"{name}.")}
        hint = Any if part or name == "config" else hints[name]
        if words == ["none"] and without_none(hint) not in (hint, str):
            words = ["null"]
        given[option] = text_of(option, words, without_none(hint))
    return given


def options_and_words(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option without its dashes, and the words up to the next one."""
    place = 0
    while place < len(argv):
        if not argv[place].startswith("--"):
            raise InputError(f"{argv[place]!r} follows no option: options are --name value{dash(argv)}, see --help")
        option, equals, word = argv[place][2:].partition("=")
        words = [word] if equals else []
        place += 1
        while not equals and place < len(argv) and not argv[place].startswith("--"):
            words.append(argv[place])
            place += 1
        yield option, words


def dash(words: list[str]) -> str:
    """Says so where a text was copied in which two hyphens had become a dash."""
    return " (with two hyphens, not a dash)" if any(word.startswith(("–", "—", "−")) for word in words) else ""


def text_of(option: str, words: list[str], hint: Any) -> str:
    """An option's words as one text: a flag's is true; several words, or a path alone, are a list, none is no item."""
    if hint is bool and not words:
        return "true"
    if typing.get_origin(hint) is list and words == ["none"]:
        return "[]"
    if typing.get_origin(hint) is list and words and not (len(words) == 1 and words[0].lstrip().startswith("[")):
        item = typing.get_args(hint)[0]
        first = dataclasses.fields(item)[0].name if dataclasses.is_dataclass(item) else ""
        return "[" + ",".join(item_text(word, first) for word in words) + "]"
    if len(words) == 1 and words != ["null"] and dataclasses.is_dataclass(hint):
        return item_text(words[0], dataclasses.fields(hint)[0].name)
    if len(words) != 1:
        raise InputError(f"--{option} takes one value, got {' '.join(words) or 'none'}{dash(words)}")
    return words[0]


def item_text(word: str, first: str) -> str:
    """One item of a list: of dataclasses, a text alone is its first field, `path` of a source."""
    if not first:
        return json.dumps(word)
    return word if word.lstrip().startswith("{") else json.dumps({first: word})


def typed(given: dict[str, str], defaults: Any) -> dict[str, Any]:
    """The values of texts, by field, as YAML has them; of a nested dataclass those of its names that were given."""
    found: dict[str, Any] = {}
    for option, text in given.items():
        name, _, part = option.partition(".")
        hint = hint_of(option, type(defaults))
        parser = parser_of(hint)
        with contextlib.suppress(yaml.YAMLError, ValueError):  # 2026-02-30 is no date
            refuse_classes(yaml.safe_load(text), f"--{option}")
        try:
            value = parser.parse_args([f"--value={text}"], defaults=False).as_dict()["value"]
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            raise InputError(refusal(option, text, error, hint)) from error
        found[name] = found.get(name, {}) | {part: value} if part else value
    return found


def replaced(defaults: Config, values: dict[str, Any]) -> Config:
    """`defaults` with values as YAML has them; raises InputError for one that its field does not take."""
    made = {}
    for name, value in values.items():
        refuse_classes(value, name)
        mine, hint = getattr(defaults, name), hint_of(name, type(defaults))
        if dataclasses.is_dataclass(mine) and isinstance(value, dict):
            value = dataclasses.asdict(mine) | value
        parser = parser_of(hint)
        try:
            made[name] = parser.instantiate(parser.parse_object({"value": value}, defaults=False))["value"]
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            raise InputError(refusal(name, value, error, hint)) from error
    config = dataclasses.replace(defaults, **made)
    check_ranges(config)
    return config


def hint_of(option: str, of: type) -> Any:
    """The type of a field, or of a field's field (`text_rules.niqqud`)."""
    name, _, part = option.partition(".")
    hint = typing.get_type_hints(of, include_extras=True)[name]
    return typing.get_type_hints(item_of(hint), include_extras=True)[part] if part else hint


def parser_of(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("--value", type=hint)
    return parser


def refusal(option: str, value: Any, error: Exception, hint: Any) -> str:
    """One sentence for what jsonargparse refused."""
    item = item_of(hint)
    if isinstance(error, ValueError):  # of the field's own class, which says what is wrong
        return f"--{option}: {error}"
    fields: Any = value
    with contextlib.suppress(yaml.YAMLError, ValueError):
        fields = yaml.safe_load(value) if isinstance(value, str) else value
    found = re.search(r'key "value\.(\w+)"', str(error))
    if item and found and isinstance(fields, dict) and found[1] in fields:
        return refusal(f"{option}.{found[1]}", fields[found[1]], error, hint_of(found[1], item))
    for one in fields if item and isinstance(fields, list) else []:
        try:
            parser_of(item).parse_object({"value": one}, defaults=False)
        except (jsonargparse.ArgumentError, ValueError, TypeError) as problem:
            return refusal(option, one, problem, item)
    if item and (found := re.search(r"option '(\w+)'", str(error), re.IGNORECASE)):
        near = meant(found[1], parts_of(item))
        return f"--{option}: {item.__name__} has no {found[1]!r}{near}, it has {listed(item)}"
    if item and (found := re.search(r"required: (?:value\.)?(\w+)", str(error))):
        return f"--{option}: {item.__name__} needs {found[1]!r}, got {value}"
    return f"--{option} takes {takes(hint)}, got {value if isinstance(value, str) else json.dumps(value)}"


def check_ranges(config: Any) -> None:
    """Raises InputError for a number outside of its range, and for a choice that is none, also of nested settings."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        if not hasattr(config, name):
            continue
        value = getattr(config, name)
        inner = without_none(hint)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif value is not None and typing.get_origin(inner) is typing.Annotated:
            if not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
            if value not in inner.__metadata__[0]:
                raise InputError(f"{name} must be {inner.__metadata__[0]}, got {value}")
        elif typing.get_origin(inner) is typing.Literal and value not in typing.get_args(inner):
            raise InputError(f"{name} must be {takes(inner)}, got {value}")


# --------------------------------------------------------------------------------------------------------------- Types


def without_none(hint: Any) -> Any:
    """The type beside None of an optional one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [one for one in typing.get_args(hint) if one is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint


def item_of(hint: Any) -> Any:
    """The dataclass that a field is, or holds a list of."""
    inner = without_none(hint)
    if typing.get_origin(inner) is list:
        inner = typing.get_args(inner)[0]
    return inner if dataclasses.is_dataclass(inner) else None


def parts_of(hint: Any) -> list[str]:
    item = item_of(hint)
    return [field.name for field in dataclasses.fields(item)] if item else []


def listed(item: Any) -> str:
    return ", ".join(parts_of(item))


def takes(hint: Any) -> str:
    """What a field of a type takes, in words."""
    inner = without_none(hint)
    or_none = " or null" if inner is not hint else ""
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is typing.Annotated:
        kind = "a whole number" if arguments[0] is int else "a number"
        return f"{kind} {inner.__metadata__[0]}{or_none}"
    if origin is typing.Literal:
        return " or ".join(filter(None, [", ".join(arguments[:-1]), arguments[-1]])) + or_none
    if origin in (typing.Union, types.UnionType):  # of several types beside None
        kinds = [takes(one) for one in arguments if one is not type(None)]
        return " or ".join(kinds) + (" or null" if type(None) in arguments else "")
    if origin is list:
        is_choice = typing.get_origin(arguments[0]) is typing.Literal
        kind = f" of {arguments[0].__name__} ({listed(arguments[0])})" if item_of(inner) else ""
        return "a list" + (f" of {takes(arguments[0])}" if is_choice else kind) + or_none
    numbers: dict[Any, str] = {int: "a whole number", float: "a number", dict[str, float]: "numbers by name, as JSON"}
    names = numbers | {bool: "true or false", str: "a text"}
    return names.get(inner, f"{listed(inner)} as JSON" if item_of(inner) else str(inner)) + or_none


def instead(option: str, names: list[str]) -> str:
    """What is here in place of an option that there is not."""
    words = option.replace("-", "_").split("_")
    is_rate = "lr" in words or {"learning", "rate"} <= set(words)
    if "stages" in names and is_rate and {"scheduler", "schedule", "decay", "warmup"}.isdisjoint(words):
        return ": the learning rates are in --stages, one for each component"
    return NOT_OPTIONS.get(option) or meant(option, [*names, "config", "help"], "--")


def meant(name: str, names: list[str], before: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {before}{near[0]}?)" if near else ""


# ---------------------------------------------------------------------------------------------------------------- Help


def help_of(defaults: Any, about: str = "", has_demo: bool = False) -> str:
    """Every field with what it takes, its default and its meaning, in the groups of its dataclass."""
    lines = [about.strip(), "", "Options", ""] if about else []
    if has_demo:
        lines += option_lines("--demo", "", "The small world in demo/: other defaults, no GPU and no account.")
    if about:
        lines += option_lines("--config FILE", "", "A config.yaml as a run writes it; options replace its values.")
        lines += option_lines("--print_config", "", "Prints the settings as YAML, which --config reads, and exits.")
    hints = typing.get_type_hints(type(defaults), include_extras=True)
    for of in reversed(type(defaults).__mro__):
        if "__dataclass_fields__" not in vars(of):
            continue
        for group, name, meaning in described(of):
            if group:
                lines += ["", group, ""]
            default = as_written(defaults)[name]
            shown = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
            lines += option_lines(f"--{name}", f"{takes(hints[name])}; default {shown}", meaning)
    return "\n".join(lines)


def option_lines(option: str, what: str, meaning: str) -> list[str]:
    indent = " " * 6
    first = f"  {option}  {what}".rstrip()
    body = [*textwrap.wrap(first, WIDTH, subsequent_indent=indent)]
    return body + textwrap.wrap(meaning, WIDTH, initial_indent=indent, subsequent_indent=indent)


def described(of: type) -> Iterator[tuple[str, str, str]]:
    """Of each field of a class: the comment that opens its group (or ""), its name, its docstring."""
    source = textwrap.dedent(inspect.getsource(of))
    lines, (made,) = source.splitlines(), ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    body = made.body
    group = (inspect.getdoc(of) or of.__name__).splitlines()[0]
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above = lines[node.lineno - 2].strip()
        if above.startswith("# "):
            group = above[2:]
        is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        meaning = " ".join(inspect.cleandoc(str(following.value.value)).split()) if is_doc else ""
        yield group, node.target.id, meaning
        group = ""
