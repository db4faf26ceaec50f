"""The package behind the commands: fine-tuning and evaluation of Qwen3-ASR for Hebrew.

Its rooms stand on one another: training, evaluation and rl on checkpoints and data, those on model and text, all on
processes, command_line, files and errors. Nothing here imports a script.
"""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise SystemExit("error: the packages of this project are not in this Python: start the command with `uv run`")
