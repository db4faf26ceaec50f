"""A dataclass as a command line."""

import dataclasses
import difflib
import itertools
import json
from pathlib import Path
from typing import TypeVar

import jsonargparse
import yaml

from hebrew_asr.errors import InputError

Config = TypeVar("Config")  # a dataclass


def read_run_settings(file: Path, defaults: Config) -> Config:
    """The config.yaml of a run over `defaults`; fields that only another command has (Round 3's) are left out."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(written, dict):
        raise InputError(f"{file} holds no settings: give the config.yaml of a run")
    names = {field.name for field in dataclasses.fields(defaults)}
    kept = {name: value for name, value in written.items() if name in names}
    return parse_config([f"--{name}={json.dumps(value)}" for name, value in kept.items()], defaults)


def parse_config(argv: list[str], defaults: Config) -> Config:
    """Reads `--field value` over `defaults`; raises InputError that names the nearest field for an unknown one."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(type(defaults), as_group=False)
    parser.add_argument("--config", action="config", help="a config.yaml of an earlier run")
    parser.set_defaults(dataclasses.asdict(defaults))
    flags = ("--inspect_data", "--prepare", "--plan", "--find_token_budget")  # like --demo
    argv = [a + "=true" if a in flags and b.startswith("--") else a for a, b in itertools.pairwise([*argv, "--"])]
    try:
        # Without defaults: jsonargparse would fill a given list's items up from the default list's items.
        given = parser.parse_args(argv, defaults=False)
        for name, value in list(vars(given).items()):
            if dataclasses.is_dataclass(nested := getattr(defaults, name, None)):
                given[name] = jsonargparse.Namespace(dataclasses.asdict(nested) | value.as_dict())
        # Also of what was not given: `instantiate` makes every nested dataclass, with the class's own values.
        values = parser.instantiate(given)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        names = [f"--{f.name}" for f in dataclasses.fields(defaults)]
        unknown = [a.split("=")[0] for a in argv if a.startswith("--") and a.split("=")[0].split(".")[0] not in names]
        near = [match for a in unknown for match in difflib.get_close_matches(a, names, n=1)]
        raise InputError(str(error) + (f" (did you mean {', '.join(near)}?)" if near else "")) from error
    return dataclasses.replace(defaults, **{name: values[name] for name in vars(given) if name != "config"})
