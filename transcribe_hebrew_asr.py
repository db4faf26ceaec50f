"""Transcribes recordings: text, subtitles, and everything that is known as JSON.

    uv run transcribe_hebrew_asr.py --model runs/NAME/final_model interview.m4a
    uv run transcribe_hebrew_asr.py --model OWNER/NAME recordings/ --formats text,srt,vtt --output_dir transcripts
    uv run transcribe_hebrew_asr.py --demo                          the demo's checkpoint and clips, no GPU

Any format of sound or video, any length; folders with all that is in them. Transcripts stand beside each recording, or
in `--output_dir`. The same command goes on where it was interrupted. A recording that cannot be transcribed is named
at the end, the rest is done, and the exit status is 1.
"""

import argparse
import dataclasses
import io
import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import soundfile

from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.recordings import FORMATS, Recording, TranscribeConfig, run
from hebrew_asr.evaluation.transcription import Decoding
from hebrew_asr.files import DEMO
from hebrew_asr.processes import launch, quiet_libraries

MOST_NAMED = 20  # problems in the message at the end
DEMO_PAUSE_SECONDS = 2.5  # between the sentences of the demo's long recording


def parse(argv: list[str]) -> tuple[TranscribeConfig, bool]:
    """Reads the command line: the settings, and whether the demo's own clips are to be transcribed."""
    parser = argparse.ArgumentParser(
        "transcribe_hebrew_asr.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="FILE|FOLDER")
    parser.add_argument("--model", help="a folder or a Hub id")
    parser.add_argument("--demo", action="store_true", help="the demo's checkpoint; without a path, its clips too")
    parser.add_argument("--formats", default="text,srt", help=f"of {','.join(FORMATS)}; the JSON is always written")
    parser.add_argument("--output_dir", help="for the transcripts; without, they stand beside each recording")
    parser.add_argument("--channel", type=int, help="of recordings with several, from 0; without, their average")
    parser.add_argument("--no_word_times", action="store_true", help="times of segments only, which is faster")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this command did not write")
    parser.add_argument(
        "--num_workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read recordings"
    )
    helps = {"language": "given to the model, as Hebrew; without, it names the language itself"}
    helps |= {"context": "hot words: names and terms that may be said"}
    kinds = {int: int, int | None: int, float: float}
    for one in dataclasses.fields(Decoding):
        kind = kinds.get(one.type, str)
        parser.add_argument(f"--{one.name}", type=kind, default=one.default, help=helps.get(one.name))
    given = parser.parse_args(argv)
    check(given)
    decoding = Decoding(**{one.name: getattr(given, one.name) for one in dataclasses.fields(Decoding)})
    config = TranscribeConfig(
        paths=given.paths,
        model=given.model or str(DEMO / "tuned"),
        formats=[kind.strip() for kind in given.formats.split(",")],
        output_dir=given.output_dir,
        channel=given.channel,
        word_times=not given.no_word_times,
        overwrite=given.overwrite,
        num_workers=given.num_workers,
        decoding=decoding,
    )
    return config, given.demo and not given.paths


def check(given: argparse.Namespace) -> None:
    """Raises InputError for what cannot mean anything."""
    if not (given.model or given.demo):
        raise InputError("give the checkpoint: --model FOLDER, a Hub id, or --demo")
    if given.model and given.demo:
        raise InputError("--demo has its own checkpoint: leave --model out")
    if not (given.paths or given.demo):
        raise InputError("give files or folders to transcribe")
    least = {"longest_seconds": 1, "batch_seconds": 0, "num_beams": 1, "num_workers": 0, "max_new_tokens": 1}
    least |= {"channel": 0, "temperature": 0}
    for name, low in least.items():
        value = getattr(given, name)
        if value is not None and not (low <= value < math.inf):
            raise InputError(f"{name} must be a number from {low} up, got {value}")
    if given.dtype not in ("auto", "bfloat16", "float32"):
        raise InputError(f"dtype is {given.dtype!r}, must be auto, bfloat16 or float32")


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
    if cut := [recording.file.name for recording in done if recording.truncated]:
        lines.append(f"the limit of tokens ended pieces of {', '.join(cut)}: look for repetitions there")
    return lines


def command(argv: list[str]) -> None:
    config, is_demo = parse(argv)
    quiet_libraries(is_main=True)
    if is_demo:
        clips = Path(config.output_dir or "runs/transcripts-demo")
        write_demo_clips(clips)
        config.paths, config.output_dir, config.num_workers = [str(clips)], None, 0
    recordings, seconds, took = run(config)
    for recording in recordings:
        if recording.text and (is_demo or len(recordings) == 1):
            print(f"{recording.file.name}: {recording.text}", flush=True)
    print("\n".join(summary(recordings, seconds, took)), flush=True)
    where = config.output_dir or (clips if is_demo else "beside each recording")
    print(f"written: {', '.join(sorted({*config.formats, 'json'}))}, {where}", flush=True)
    if problems := [f"{recording.file}: {recording.problem}" for recording in recordings if recording.problem]:
        more = f"\nand {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise InputError("not transcribed:\n" + "\n".join(problems[:MOST_NAMED]) + more)


if __name__ == "__main__":
    launch(command)
