"""What is heard of a recording: a check of what was decoded, and a sound that a page can play."""

import base64
import io
from collections.abc import Iterable

import numpy as np
import soundfile

from hebrew_asr.data.decoding import (
    CUT,
    SAMPLE_RATE,
    AudioError,
    audio_blocks,
    decode_audio,
    inspect_audio,
    tolerated,
)

__all__ = [
    "SAMPLE_RATE",
    "SOUND_VERSION",
    "AudioError",
    "audio_blocks",
    "check_blocks",
    "check_waveform",
    "decode_audio",
    "encode_audio",
    "inspect_audio",
]
SOUND_VERSION = 2  # what was heard of a corpus is kept under it: raise it when decode_audio, check_blocks or
# fingerprint returns something else than before
SILENT_DBFS, FULL_SCALE, CLIPPED_SHARE = -60.0, 0.999, 0.01


def check_blocks(blocks: Iterable[np.ndarray], declared_seconds: float) -> str | None:
    """Says why a recording cannot be trained on, or None; holds one block at a time.

    Args:
        blocks: the waveform in parts, (samples,) float32 at 16 kHz.
        declared_seconds: its length by the header or the corpus's index.

    Returns:
        The first of: "not finite"; "truncated" when more is missing than is tolerated; "silent" when the root mean
        square over the clip is below -60 dBFS (a constant of 1 has 0 dBFS, speech recorded far too quietly -50, a muted
        input -80); "clipped" when more than 1 % of the samples reach full scale (a clip normalised to its peak has a
        handful; what was attenuated after it was clipped is not seen).
    """
    samples, clipped, power, is_finite = 0, 0, 0.0, True
    for block in blocks:
        samples += len(block)
        is_finite = is_finite and bool(np.isfinite(block).all())
        power += float(np.sum(np.square(block), dtype=np.float64))
        clipped += int(np.count_nonzero(np.abs(block) >= FULL_SCALE))
    if not is_finite:
        return "not finite"
    if not samples or declared_seconds - samples / SAMPLE_RATE > tolerated(declared_seconds):
        return CUT
    if power / samples < 10 ** (SILENT_DBFS / 10):
        return "silent"
    return "clipped" if clipped > CLIPPED_SHARE * samples else None


def check_waveform(waveform: np.ndarray, declared_seconds: float) -> str | None:
    """`check_blocks` of a whole waveform (samples,)."""
    return check_blocks([waveform], declared_seconds)


SAMPLE_SECONDS = 60  # of an evaluation recording, which may last an hour, no more is embedded


def encode_audio(waveform: np.ndarray) -> str:
    """A waveform (samples,) at 16 kHz as base64 of Ogg/Vorbis; nothing stays nothing.

    libsndfile encodes Opus 10 times slower. Given minutes at once, its Vorbis overruns the stack, hence the blocks.
    """
    buffer = io.BytesIO()
    if len(waveform):
        sound = np.clip(np.nan_to_num(waveform), -1, 1).astype(np.float32)
        with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, format="OGG", subtype="VORBIS") as file:
            for begin in range(0, len(sound), 10 * SAMPLE_RATE):
                file.write(sound[begin : begin + 10 * SAMPLE_RATE])
    return base64.b64encode(buffer.getvalue()).decode()
