import itertools
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch

from demo.recordings import clips, join
from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.data.voice import LEAST_ATOM, atoms, cut, network, speech_spans, utterances

PAUSE = 0.6  # seconds between the utterances


@pytest.fixture(scope="module")
def recording() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Twenty utterances with pauses of faint noise between them, and where each one is."""
    random = np.random.default_rng(0)
    rows = pyarrow.parquet.read_table("demo/heldout/test-00000-of-00001.parquet").slice(0, 20).to_pylist()
    waves, spans, position = [], [], 0
    for row in rows:
        wave = decode_audio(row["audio"])
        faint = 1e-4 * random.standard_normal(round(PAUSE * SAMPLE_RATE)).astype(np.float32)
        spans.append((position / SAMPLE_RATE, (position + len(wave)) / SAMPLE_RATE))
        waves += [wave, faint]
        position += len(wave) + len(faint)
    return np.concatenate(waves), spans


def test_speech_is_found_and_pauses_between_utterances_are_not_speech(recording):
    waveform, utterances = recording
    found = speech_spans(waveform)
    assert len(found) == len(utterances)
    for (start, end), (first, last) in zip(found, utterances, strict=True):
        assert start < first + 0.1 and last - 0.1 < end, "the utterance is inside"
        assert end - start < last - first + PAUSE, "and little else"


@pytest.mark.parametrize("longest", [4.0, 10.0, 30.0])
def test_pieces_are_short_enough_hold_all_speech_and_end_in_pauses(recording, longest):
    waveform, utterances = recording
    pieces = cut(waveform, longest)
    assert all(end - start <= longest for start, end in pieces)
    for start, end in utterances:
        assert any(a < start + 0.1 and end - 0.1 < b for a, b in pieces), "no utterance is cut or left out"
    assert len(pieces) <= 2 * len(waveform) / SAMPLE_RATE / longest + 1


def test_speech_without_a_pause_is_cut_all_the_same(recording):
    waveform, utterances = recording
    speech = np.concatenate([waveform[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)] for a, b in utterances])
    pieces = cut(speech, 2.0)
    assert all(end - start <= 2.0 for start, end in pieces)
    assert sum(end - start for start, end in pieces) > 0.97 * len(speech) / SAMPLE_RATE


@pytest.mark.parametrize("seconds", [0, 0.01, 20])
def test_silence_and_noise_have_no_pieces(seconds):
    noise = np.random.default_rng(1).standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)
    assert cut(0 * noise, 30.0) == cut(0.05 * noise, 30.0) == []


def test_the_network_leaves_the_number_of_threads_as_it_was(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("silero_vad")]:
        monkeypatch.delitem(sys.modules, name)  # it is as it is imported that it sets it
    network.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    network()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_speech_after_loud_music_is_not_missed():
    """Forwards alone, the network misses twelve sentences in a row of this recording."""
    recording = join(clips("corpus"), 420.0, seed=1)
    spans = speech_spans(recording.waveform)
    for sentence in recording.sentences:
        inside = sum(max(0.0, min(b, sentence.end) - max(a, sentence.start)) for a, b in spans)
        assert inside > 0.7 * (sentence.end - sentence.start)


def test_utterances_begin_and_end_with_their_first_and_last_sound(recording):
    waveform, utterances_there = recording
    found = utterances(waveform, 30.0)
    assert len(found) == len(utterances_there)
    off = np.array(found) - np.array(utterances_there)
    assert np.percentile(np.abs(off), 80) < 0.03, "seconds"


def test_speech_is_divided_at_every_short_pause_with_noise(recording):
    """Two utterances with 0.2 s between them, which silero-vad takes for speech."""
    waveform, there = recording
    one, other = (waveform[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)] for a, b in there[:2])
    loud = float(np.sqrt(np.mean(one**2)))
    noise = 10 ** (-35 / 20) * loud * np.random.default_rng(0).standard_normal(SAMPLE_RATE // 5).astype(np.float32)
    joined = np.concatenate([waveform[:SAMPLE_RATE], one, noise, other])
    end, start, last = 1 + len(one) / SAMPLE_RATE, 1.2 + len(one) / SAMPLE_RATE, len(joined) / SAMPLE_RATE
    parts = atoms(joined, (1.0, last))
    assert parts[0][0] == 1.0 and parts[-1][1] == last
    assert all(a < b and b - a > 0.9 * LEAST_ATOM for a, b in parts)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
    assert min(abs(b - end) for _, b in parts) < 0.1
    assert min(abs(a - start) for a, _ in parts) < 0.2, "a soft first sound may be taken for the pause"
