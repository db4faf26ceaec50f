"""Audio of speech corpora: decoding, a check of what was decoded, augmentation for training, fingerprints for leaks.

Imports nothing of this project and needs no library of the system.
"""

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, of every waveform here
SOUND_VERSION = 1  # what was heard of a corpus is kept under it: raise it when decode_audio, check_waveform or
# fingerprint returns something else than before

PREROLL_SECONDS = 0.2  # decoded before a block and thrown away: an MP3 frame builds on earlier ones, and soundfile
# seeks after every read, which makes the decoder forget them
BLOCK_SECONDS = 30  # read at once, so that an hour of 48 kHz stereo is never held whole
UNKNOWN_WAV_BYTES = 0x7FFF_0000  # a recorder that cannot seek back writes a data size above it, or 0
WAV_DATA_CUT = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)  # libsndfile's log: declared, present


class AudioError(ValueError):
    """Audio that cannot be read; its message is a short reason to count by."""


def open_audio(audio: dict[str, Any]) -> io.BytesIO | str:
    """What soundfile opens for an undecoded `datasets` Audio value: its bytes, or else its path."""
    if audio.get("bytes") is None and audio.get("path"):
        if not Path(audio["path"]).is_file():
            raise AudioError("no such audio file")
        return str(audio["path"])
    if not audio.get("bytes"):
        raise AudioError("zero bytes of audio")
    return io.BytesIO(audio["bytes"])


def open_sound(audio: dict[str, Any]) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(open_audio(audio))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError("unreadable audio") from error


def audio_header(audio: dict[str, Any]) -> tuple[float, int, int]:
    """Returns (seconds, rate in Hz, channels) as the header declares them; nothing is decoded.

    The seconds of a truncated file are the whole one's for WAV, FLAC, and MP3 with a Xing header, so `check_waveform`
    can tell. Ogg (Opus, Vorbis) declares no length: they are what is left. Raises AudioError.
    """
    with open_sound(audio) as sound:
        if not sound.frames or not sound.samplerate:
            raise AudioError("no samples of audio")
        seconds = sound.frames / sound.samplerate
        if (cut := WAV_DATA_CUT.search(sound.extra_info)) and 0 < int(cut[1]) < UNKNOWN_WAV_BYTES:
            seconds *= max(1.0, int(cut[1]) / max(1, int(cut[2])))
        return seconds, sound.samplerate, sound.channels


def decode_audio(audio: dict[str, Any], start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Decodes from `start` to `end` seconds (None: to the end) into a mono waveform at 16 kHz, float32 (samples,).

    Channels are averaged. Only the slice is decoded. What lies past the end is missing from the result; libsndfile
    reads truncated WAV, MP3 and Opus as if they ended there. Raises AudioError.
    """
    with open_sound(audio) as sound:
        rate = sound.samplerate
        position, last = round(start * rate), math.inf if end is None else round(end * rate)
        blocks = [np.zeros(0, np.float32)]
        try:
            while (left := min(last, sound.frames) - position) > 0:
                preroll = min(position, round(PREROLL_SECONDS * rate))
                sound.seek(position - preroll)
                samples = preroll + min(left, BLOCK_SECONDS * rate)
                block = sound.read(samples, dtype="float32", always_2d=True)[preroll:]
                if not len(block):
                    break
                blocks.append(block.mean(axis=1))
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError("damaged audio") from error
    waveform = np.concatenate(blocks)
    return waveform if rate == SAMPLE_RATE or not len(waveform) else soxr.resample(waveform, rate, SAMPLE_RATE)


def check_waveform(
    waveform: np.ndarray,
    declared_seconds: float,
    missing_seconds: float = 0.1,
    missing_share: float = 0.01,
    silent_dbfs: float = -60.0,
    full_scale: float = 0.999,
    clipped_share: float = 0.01,
) -> str | None:
    """Says why a decoded waveform cannot be trained on, or None.

    `waveform` is (samples,) float32 at 16 kHz; `declared_seconds` is its length by the header or the corpus's index.
    The reasons, in this order: "not finite"; "truncated" when more than both `missing_seconds` and `missing_share` are
    missing (rounded durations stay below, a lost word does not); "silent" when the root mean square over the clip is
    below `silent_dbfs` (a constant of 1 has 0 dBFS, speech recorded far too quietly -50, a muted input -80); "clipped"
    when more than `clipped_share` of the samples reach `full_scale` (a clip normalised to its peak has a handful;
    what was attenuated after it was clipped is not seen).
    """
    if not np.isfinite(waveform).all():
        return "not finite"
    missing = declared_seconds - len(waveform) / SAMPLE_RATE
    if not len(waveform) or missing > max(missing_seconds, missing_share * declared_seconds):
        return "truncated"
    if np.sqrt(np.mean(np.square(waveform), dtype=np.float64)) < 10 ** (silent_dbfs / 20):
        return "silent"
    if np.mean(np.abs(waveform) >= full_scale) > clipped_share:
        return "clipped"
    return None


SAMPLE_SECONDS = 60  # of an evaluation recording, which may last an hour, no more is embedded


def encode_audio(waveform: np.ndarray) -> str:
    """A waveform (samples,) at 16 kHz as base64 of Ogg/Vorbis; nothing stays nothing.

    libsndfile encodes Opus 10 times slower. Given minutes at once, its Vorbis overruns the stack, hence the blocks.
    """
    buffer = io.BytesIO()
    if len(waveform):
        sound = np.clip(np.nan_to_num(waveform), -1, 1)
        with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, format="OGG", subtype="VORBIS") as file:
            for begin in range(0, len(sound), 10 * SAMPLE_RATE):
                file.write(sound[begin : begin + 10 * SAMPLE_RATE])
    return base64.b64encode(buffer.getvalue()).decode()
