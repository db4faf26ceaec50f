"""Transcribes recordings: text, subtitles, and everything that is known as JSON.

    uv run transcribe_hebrew_asr.py interview.m4a --model runs/NAME/final_model
    uv run transcribe_hebrew_asr.py recordings/ --model OWNER/NAME --formats text srt vtt --output_dir transcripts
    uv run transcribe_hebrew_asr.py --demo                          the demo's checkpoint and clips, no GPU

Any format of sound or video, any length; folders with all that is in them. Transcripts stand beside each recording, or
in `--output_dir`. The same command goes on where it was interrupted. A recording that cannot be transcribed is named
at the end, the rest is done, and the exit status is 1.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import io
import os
import typing
from pathlib import Path
from typing import Any

from hebrew_asr.command_line import NO, READERS, YES, dash, parse_config, read_options
from hebrew_asr.console import escaped
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import FORMATS, Format, TranscribeConfig
from hebrew_asr.files import DEMO

HINTS = typing.get_type_hints(TranscribeConfig)


def demo() -> TranscribeConfig:
    return TranscribeConfig(model=str(DEMO / "tuned"), num_workers=0)


def parse(argv: list[str]) -> TranscribeConfig:
    """Reads the command line, where words that no option takes are paths; raises InputError."""
    name = ""
    paths: list[str] = []
    options: list[str] = []
    hint: Any = None  # of the option whose words come now
    is_path = True  # as if --paths came first
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.removeprefix("--").partition("=")
            is_path = name == "paths"
            if is_path:
                paths += [value] if equals else []
            else:
                options.append(word)
                hint = None if equals or name in ("demo", "print_config") else HINTS.get(name, str)
        elif is_path or (os.path.lexists(word) and not takes_word(hint, word)):
            paths.append(word)
        elif hint is None:
            raise InputError(f"there is no file or folder {word!r}, and --{name} takes no more{dash([word])}")
        else:  # what does not suit the option is refused with it
            options.append(word)
            hint = hint if typing.get_origin(hint) is list else None
    return parse_config([*(["--paths", *paths] if paths else []), *options], TranscribeConfig(), demo, __doc__)


def takes_word(hint: Any, word: str) -> bool:
    """Whether a word that is a path too belongs to an option of this type before it; None: it has all that it takes."""
    if hint is bool:
        return word.lower() in (*YES, *NO)
    return word in FORMATS if hint == list[Format] else hint is not None


if __name__ == "__main__":
    READERS.append(parse)
    read_options()  # what follows takes seconds to import

import numpy as np
import pyarrow.parquet
import soundfile

from hebrew_asr.evaluation.recordings import Recording, run
from hebrew_asr.processes import launch, quiet_libraries

MOST_NAMED = 20  # problems in the message at the end
DEMO_PAUSE_SECONDS = 2.5  # between the sentences of the demo's long recording


def write_demo_clips(folder: Path) -> None:
    """Six clips of one sentence, a longer recording of eight, and one without speech."""

    def clips(part: str) -> list[bytes]:
        (file,) = (DEMO / part).glob("*.parquet")
        return [row["bytes"] for row in pyarrow.parquet.read_table(file, columns=["audio"])["audio"].to_pylist()]

    folder.mkdir(parents=True, exist_ok=True)
    spoken = clips("heldout")
    for number, clip in enumerate(spoken[:6], start=1):
        (folder / f"sentence-{number}.opus").write_bytes(clip)
    (folder / "no-speech.opus").write_bytes(clips("nonspeech")[0])
    decoded = [soundfile.read(io.BytesIO(clip), dtype="float32") for clip in spoken[6:14]]
    rate = decoded[0][1]
    pause = np.zeros(int(DEMO_PAUSE_SECONDS * rate), np.float32)
    long = np.concatenate([part for wave, _ in decoded for part in (wave, pause)])
    soundfile.write(folder / "recording.flac", long, rate)


def summary(recordings: list[Recording], seconds: float, took: float) -> list[str]:
    """What the console shows at the end."""
    done = [recording for recording in recordings if not recording.problem]
    lines = [f"{len(done)} of {len(recordings)} recordings have a transcript"]
    if seconds:
        lines[0] += f"; {seconds:.0f} s of speech in {took:.0f} s: {seconds / took:.1f} times as fast as it was said"
    if silent := [recording.file.name for recording in done if not recording.segments]:
        lines.append(f"no words in {len(silent)} of them: {', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}")
    if cut := [recording.file.name for recording in done if recording.is_cut]:
        lines.append(f"the end is missing of {', '.join(cut)}: what is there was transcribed")
    if ended := [recording.file.name for recording in done if recording.truncated]:
        lines.append(f"the limit of tokens ended pieces of {', '.join(ended)}: look for repetitions there")
    return lines


def command(argv: list[str]) -> None:
    config = parse(argv)
    is_demo = "--demo" in argv and not config.paths
    quiet_libraries(is_main=True)
    if is_demo:
        clips = Path(config.output_dir or "runs/transcripts-demo")
        write_demo_clips(clips)
        config.paths, config.output_dir = [str(clips)], None
    recordings, seconds, took = run(config)
    for recording in recordings:
        if recording.text and (is_demo or len(recordings) == 1):
            print(escaped(f"{recording.file.name}: {recording.text}"), flush=True)
    print("\n".join(map(escaped, summary(recordings, seconds, took))), flush=True)
    where = config.output_dir or (clips if is_demo else "beside each recording")
    print(escaped(f"written: {', '.join(sorted({*config.formats, 'json'}))}, {where}"), flush=True)
    if problems := [escaped(f"{one.file}: {one.problem}") for one in recordings if one.problem]:
        more = f"\nand {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise InputError("not transcribed:\n" + "\n".join(problems[:MOST_NAMED]) + more)


if __name__ == "__main__":
    launch(command)
