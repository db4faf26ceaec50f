"""Where a recording has speech, and where to cut it: silero-vad, a small network whose weights come in its package."""

import warnings
from functools import lru_cache

import numpy as np
import torch

from hebrew_asr.data.audio import SAMPLE_RATE

FRAME = 512  # samples that silero-vad judges at once: 32 ms
SPEECH = 0.4  # probability from which a frame is speech
LEAST_SPEECH = 0.1  # seconds; a shorter span is a click
LEAST_PAUSE = 0.1  # seconds; a shorter one is the closure of a plosive
MARGIN = 0.2  # seconds kept around speech, for sounds that begin or end softly
LONGEST_PAUSE = 2.0  # seconds; a longer one is in no piece
SMOOTHED_FRAMES = 5  # averaged where speech has to be cut: 160 ms
QUIET = 160  # samples in which loudness is measured: 10 ms
PAUSE_FRAMES = 50  # of a pause, in which its loudness is measured
LEAST_PART = 0.5  # seconds; of speech that is cut, no part is shorter
REACH = 0.25  # seconds by which a span may miss the first or last sound of its speech
ONSET = 0.2  # of the way from the pause's loudness to the speech's, in decibels
FAINT = 0.15  # probability from which a frame may be speech that noise or music hides
QUIETER_DB = 12.0  # below the speech around it, from which a moment may be a pause
MOMENT_FRAMES = 8  # averaged for it: 80 ms
LEAST_ATOM = 0.3  # seconds; of speech that is divided at every such moment, no part is shorter

Span = tuple[float, float]  # start and end in seconds


@lru_cache(maxsize=1)
def network() -> torch.jit.ScriptModule:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        from silero_vad import load_silero_vad  # sets torch to one thread as it is imported

        torch.set_num_threads(threads)
        return load_silero_vad()


@torch.no_grad()
def speech_probabilities(waveform: np.ndarray) -> np.ndarray:
    """The probability of speech in each 32 ms of a waveform (samples,) at 16 kHz, float32: (frames,).

    The mean of what the network says forwards and backwards. Heard forwards alone, speech after loud music is missed
    for a minute and more, and each first sound is noticed late.
    """
    if not len(waveform):
        return np.zeros(0, np.float32)
    padded = np.pad(waveform, (0, -len(waveform) % FRAME))
    both = torch.from_numpy(np.stack([padded, padded[::-1]]))
    forwards, backwards = network().audio_forward(both, SAMPLE_RATE).numpy()
    return (forwards + backwards[::-1]) / 2


def spans_of(probabilities: np.ndarray, samples: int, margin: float = MARGIN, threshold: float = SPEECH) -> list[Span]:
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    spans = get_speech_timestamps_from_probs(
        probabilities.tolist(),
        threshold=threshold,
        sampling_rate=SAMPLE_RATE,
        min_speech_duration_ms=round(1000 * LEAST_SPEECH),
        min_silence_duration_ms=round(1000 * LEAST_PAUSE),
        speech_pad_ms=round(1000 * margin),
        audio_length_samples=samples,
    )
    return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in spans]


def speech_spans(waveform: np.ndarray, longest: float = float("inf")) -> list[Span]:
    """The stretches of speech between pauses of 0.1 s and more, in order, without overlap.

    `waveform` is (samples,) float32 at 16 kHz. Each span has 0.2 s around it, or half of the pause where that is less.
    What goes on for more than `longest` seconds is divided where it sounds least like speech.
    """
    probabilities = speech_probabilities(waveform)
    spans = spans_of(probabilities, len(waveform))
    return [part for span in spans for part in split(probabilities, *span, longest)]


def utterances(waveform: np.ndarray, longest: float, threshold: float = SPEECH) -> list[Span]:
    """The stretches of speech as `speech_spans`, without the pauses around them.

    A model that learnt from clips without a pause before the first word mishears one that has it. So each begins and
    ends where loudness leaves that of the pause beside it.
    """
    probabilities = speech_probabilities(waveform)
    spans = spans_of(probabilities, len(waveform), 0.0, threshold)
    spans = [part for span in spans for part in split(probabilities, *span, longest - 2 * REACH)]
    power = loudness(waveform)
    tight: list[Span] = []
    seconds = len(waveform) / SAMPLE_RATE
    for number, (start, end) in enumerate(spans):
        earliest = max(start - REACH, (spans[number - 1][1] + start) / 2 if number else 0.0)
        latest = min(end + REACH, (end + spans[number + 1][0]) / 2 if number + 1 < len(spans) else seconds)
        first, begin, stop, last = (int(time * SAMPLE_RATE / QUIET) for time in (earliest, start, end, latest))
        loud = np.percentile(power[begin : stop + 1], 80)
        before, after = (
            power[max(0, begin - PAUSE_FRAMES) : begin + 1],
            power[min(stop, len(power) - 1) :][:PAUSE_FRAMES],
        )
        onset = first + quiet_frames(power[first : last + 1], loud, before, begin - first)
        offset = last + 1 - quiet_frames(power[first : last + 1][::-1], loud, after, last - stop)
        onset, offset = (onset, offset) if onset < offset else (begin, stop)
        tight.append((max(earliest, onset * QUIET / SAMPLE_RATE), min(latest, offset * QUIET / SAMPLE_RATE)))
    return tight


def loudness(waveform: np.ndarray) -> np.ndarray:
    """The power of each 10 ms."""
    whole = waveform[: len(waveform) // QUIET * QUIET]
    return np.square(whole, dtype=np.float64).reshape(-1, QUIET).mean(axis=1) + 1e-10


def atoms(waveform: np.ndarray, span: Span) -> list[Span]:
    """Divides a stretch of speech at every moment that may be a pause, though silero-vad takes it for speech."""
    first, last = (round(time * SAMPLE_RATE / QUIET) for time in span)
    power = loudness(waveform)[first:last]
    smooth = np.convolve(power, np.ones(MOMENT_FRAMES) / MOMENT_FRAMES, mode="same")
    edge = round(LEAST_ATOM * SAMPLE_RATE / QUIET)
    parts: list[Span] = []
    left = [(0, len(power))]
    while left:
        start, end = left.pop()
        inner = smooth[start + edge : end - edge]
        quiet = np.percentile(power[start:end], 80) * 10 ** (-QUIETER_DB / 10) if len(inner) else 0.0
        if not len(inner) or inner.min() > quiet:
            until = span[1] if end == len(power) else span[0] + end * QUIET / SAMPLE_RATE
            parts.append((span[0] + start * QUIET / SAMPLE_RATE, until))
            continue
        middle = stop = begin = start + edge + int(np.argmin(inner))
        while stop > start + edge and smooth[stop - 1] <= quiet:
            stop -= 1
        while begin < end - edge and smooth[begin] <= quiet:
            begin += 1
        left += [(max(begin, middle), end), (start, min(stop, middle))]
    return parts


def quiet_frames(power: np.ndarray, loud: float, pause: np.ndarray, supposed: int) -> int:
    """How many frames there are before the first sound of speech, which is supposed to be at frame `supposed`.

    It comes after the last three quiet frames until there, so that a sound that ends just before is not taken for it.
    """
    quiet = min(loud, max(float(np.percentile(pause, 20)), loud * 1e-4))
    is_loud = power > quiet * (loud / quiet) ** ONSET
    silences = np.flatnonzero(~(is_loud[:-2] | is_loud[1:-1] | is_loud[2:])[: supposed + 1])
    after = int(silences[-1]) if len(silences) else 0
    return after + int(np.argmax(is_loud[after:]))


def split(probabilities: np.ndarray, start: float, end: float, longest: float) -> list[Span]:
    """Divides a span where it sounds least like speech, then its parts, until none is longer than `longest`."""
    second = SAMPLE_RATE / FRAME  # frames
    smooth = np.convolve(probabilities, np.ones(SMOOTHED_FRAMES) / SMOOTHED_FRAMES, mode="same")
    edge = min(LEAST_PART, longest / 3)
    parts: list[Span] = []
    left = [(start, end)]
    while left:
        start, end = left.pop()
        if end - start <= longest:
            parts.append((start, end))
            continue
        first, last = int(np.ceil((start + edge) * second)), int((end - edge) * second)
        middle = (first + int(np.argmin(smooth[first:last]))) / second
        left += [(middle, end), (start, middle)]
    return parts


def cut(waveform: np.ndarray, longest: float) -> list[Span]:
    """Cuts a recording at pauses into pieces of at most `longest` seconds (1 or more) that hold all its speech.

    `waveform` is (samples,) float32 at 16 kHz. A piece ends at the longest pause in the second half of what would
    still fit, or else at the last pause before, and at every pause of more than 2 s; what has no pause is cut where it
    sounds least like speech. Silence, music and noise between pieces are in none; without speech there is no piece.
    """
    return gathered(speech_spans(waveform, longest), longest)


def gathered(spans: list[Span], longest: float) -> list[Span]:
    """Joins stretches of speech, none longer than `longest`, to pieces as `cut` does."""
    pieces: list[Span] = []
    while spans:
        start, count = spans[0][0], 1
        while count < len(spans) and spans[count][1] - start <= longest and pause(spans, count) <= LONGEST_PAUSE:
            count += 1
        if count < len(spans) and pause(spans, count) <= LONGEST_PAUSE:
            late = [i for i in range(1, count + 1) if spans[i - 1][1] - start >= longest / 2]
            count = max(late or [count], key=lambda i: pause(spans, i))
        pieces.append((start, spans[count - 1][1]))
        spans = spans[count:]
    return pieces


def pause(spans: list[Span], number: int) -> float:
    """Seconds between a span and the one before it."""
    return spans[number][0] - spans[number - 1][1]
