"""The package behind the commands: fine-tuning and evaluation of Qwen3-ASR for Hebrew.

Its rooms stand on one another: training, evaluation and rl on checkpoints and data, those on model and text, all on
processes, command_line, files and errors. Nothing here imports a script.
"""

import importlib.util
from typing import Any

if importlib.util.find_spec("torch") is None:
    raise SystemExit("error: the packages of this project are not in this Python: start the command with `uv run`")


def transcribe(*args: Any, **kwargs: Any) -> Any:
    """Transcribes recordings: `hebrew_asr.evaluation.recordings.transcribe`, imported when it is called."""
    from hebrew_asr.evaluation.recordings import transcribe

    return transcribe(*args, **kwargs)
