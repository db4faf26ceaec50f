"""Writes a Qwen3-ASR checkpoint in the layout that another engine loads.

    uv run scripts/convert_layout.py runs/NAME/final_model OLDER --to thinker

`thinker` is the older layout: qwen-asr 0.0.6, ms-swift 4.6, SGLang, vLLM up to 0.25. `transformers` is the layout of
transformers' own classes: vLLM 0.26 and later, and this project, which reads the older one as well. The first
folder must be in the other layout; the weights change their names and nothing else.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import argparse
from pathlib import Path

from hebrew_asr.errors import InputError
from hebrew_asr.model.layouts import convert, layout_of
from hebrew_asr.processes import launch


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkpoint's folder")
    parser.add_argument("target", type=Path, help="a folder that is not there yet, or is empty")
    parser.add_argument("--to", choices=["thinker", "transformers"], help="default: the layout that `source` is not in")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    to = options.to or {"thinker": "transformers", "transformers": "thinker"}[layout_of(options.source)]
    try:
        convert(options.source, options.target, to)
    except OSError as error:
        raise InputError(f"{options.target} cannot be written: {error}") from error
    print(f"{options.target}: {options.source} in the {to} layout")


if __name__ == "__main__":
    launch(main)
