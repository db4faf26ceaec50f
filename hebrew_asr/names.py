"""What a user calls a model or a dataset: a path, or an id on the Hub."""

import difflib
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import huggingface_hub

from hebrew_asr.errors import InputError

HUB_SECONDS = 20  # to say whether it has something


def check_name(name: str, kind: Literal["model", "dataset"], suffixes: Collection[str] = ()) -> None:
    """Raises InputError for a path that is not there and plainly no Hub id, or for an id of which nothing is known here
    while the Hub cannot be reached: the libraries would try for minutes.

    Args:
        suffixes: of files that are such a thing.
    """
    if Path(name).exists():
        return  # what is wrong with it is said by what loads it
    is_local = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1
    is_local |= "/" in name and Path(name.split("/")[0]).is_dir()
    if is_local or Path(name).suffix.lower() in suffixes:
        raise InputError(f"{name}: no such folder or file{nearest(name)}")
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    if not cached.exists():
        ask_the_hub(name, kind)


def nearest(path: str) -> str:
    """A path beside it that it may have meant, as `; did you mean …?`."""
    parent = Path(path).parent
    names = [str(one) for one in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(str(Path(path)), names, 1)
    return f"; did you mean {near[0]}?" if near else ""


@functools.lru_cache
def ask_the_hub(name: str, kind: str) -> None:
    """Raises InputError where it cannot be asked; what it has not, or has behind a gate, is said by what loads it."""
    hub = huggingface_hub.HfApi()
    try:
        (hub.model_info if kind == "model" else hub.dataset_info)(name, timeout=HUB_SECONDS)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError):
        return
    except Exception as error:  # the HTTP client's own, by the phase that it is in
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise InputError(
            f"{name}: no such folder, no such {kind} in the cache ({cache}), and the Hub cannot be reached: {error}"
        ) from error
