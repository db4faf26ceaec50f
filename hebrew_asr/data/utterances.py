"""One utterance: from a row to log-mel features and text."""

import mmap
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from transformers import Qwen3ASRProcessor

from hebrew_asr.data.audio import SAMPLE_RATE, AudioError, decode_audio
from hebrew_asr.data.augmentation import augment
from hebrew_asr.data.rows import SpeechRows, why_unheard
from hebrew_asr.data.sources import WaveformAugmentation

MOST_WORKERS = 256
LISTED = 0.5  # share of the contexts that are lists of words
SPOKEN = 0.5  # share of these that hold a word of the utterance


class UtteranceSettings(Protocol):
    """The settings that an utterance's audio and text depend on."""

    seed: int
    language: str
    no_system_prob: float
    prev_context_prob: float
    use_waveform_augmentation: bool
    waveform_augmentation: WaveformAugmentation


class SystemTurns(Protocol):
    """How often training leaves the system turn out, and how often it fills it."""

    seed: int
    no_system_prob: float
    prev_context_prob: float


class SystemTurn(NamedTuple):
    """What an utterance is trained under."""

    kind: Literal["empty", "none", "context"]
    lender: int
    """The utterance whose text is the context where none stands before the own one, or whose words are listed."""
    is_list: bool
    """Whether the context is a list of hot words, as engines send it."""


def system_turn(config: SystemTurns, epoch: int, number: int, count: int) -> SystemTurn:
    """Draws the system turn of one of `count` utterances; what is drawn for one depends on nothing else."""
    random = np.random.default_rng([config.seed, epoch, number, 1])
    drawn, lender = random.random(), int(random.integers(max(1, count)))
    if drawn < config.prev_context_prob:
        return SystemTurn("context", lender, drawn < LISTED * config.prev_context_prob)
    return SystemTurn("none" if drawn < config.prev_context_prob + config.no_system_prob else "empty", lender, False)


def word_list(lent: str, own: str, random: np.random.Generator) -> str:
    """Hot words in a random order: those of another text, and in a share of the lists one that is spoken."""
    words = lent.split()
    if own and random.random() < SPOKEN:
        words.append(str(random.choice(own.split())))
    return ", ".join(random.permutation(words).tolist())


def log_mel(feature_extractor: transformers.Qwen3ASRFeatureExtractor, waveform: np.ndarray) -> np.ndarray:
    """Features (mel, frames) of one waveform (samples,) at 16 kHz, without padding."""
    extracted = feature_extractor(
        waveform, sampling_rate=SAMPLE_RATE, padding=True, return_attention_mask=True, return_tensors="np"
    )
    return extracted["input_features"][0, :, : int(extracted["attention_mask"].sum())]


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances with log-mel features, addressed by (epoch, number), which alone seed their augmentation.

    Features are taken of each clip alone: in a batch the extractor gives most clips one more valid frame.
    """

    def __init__(
        self, rows: SpeechRows | None, processor: Qwen3ASRProcessor, config: UtteranceSettings, training: bool
    ):
        self.config, self.training = config, training
        self._rows = rows
        self.feature_extractor = processor.feature_extractor
        shared = mmap.mmap(-1, 8 * MOST_WORKERS)  # with the workers, which are forked
        self.in_hand = np.frombuffer(shared, np.int64)  # the utterance that each worker is at, counted from 1

    @property
    def rows(self) -> SpeechRows:
        assert self._rows is not None, "a stream's rows are not known"
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """One utterance, or, in training, `dropped` with the reason why it cannot be heard."""
        epoch, number = index
        info = torch.utils.data.get_worker_info()
        worker = info.id % MOST_WORKERS if info else 0
        self.in_hand[worker] = number + 1
        found = self.utterance(self.rows[number], epoch, number)
        self.in_hand[worker] = 0
        return found

    def begun(self) -> list[str]:
        """The recordings that workers have begun to decode and have not ended: where one died, it is among them."""
        return [self.rows[number - 1]["recording"] for number in self.in_hand.tolist() if number]

    def utterance(self, row: dict[str, Any], epoch: int, number: int) -> dict[str, Any]:
        try:
            waveform = self.waveform(row, epoch, number)
        except AudioError as error:
            if not self.training:
                raise AudioError(f"{error}: {row['recording']}") from error
            return {"dropped": f"{error}: {row['recording']} (utterance {number}, {row['text']!r})"}
        return {
            "features": log_mel(self.feature_extractor, waveform),
            "text": row["text"],
            "context": self.context(row, epoch, number) if self.training else "",
            "language": row["language"] or self.config.language,
            "epoch": int(epoch),
            "index": int(number),
        }

    def context(self, row: dict[str, Any], epoch: int, number: int) -> str | None:
        """What fills the system turn in training; None where there is no such turn."""
        turn = system_turn(self.config, epoch, number, len(self._rows or ()))
        if turn.kind != "context":
            return "" if turn.kind == "empty" else None
        if self._rows is None or (row["previous"] and not turn.is_list):  # nobody lends in a stream
            return row["previous"]
        lent = self.rows.index["text"][int(self.rows.used[turn.lender])].as_py()
        if not turn.is_list:
            return lent
        return word_list(lent, row["text"], np.random.default_rng([self.config.seed, epoch, number, 3]))

    def waveform(self, row: dict[str, Any], epoch: int, number: int) -> np.ndarray:
        """Decodes one utterance; in training also checks and augments it. Raises AudioError."""
        waveform = decode_audio(row["audio"], row["start"], row["end"])
        if not self.training:
            return waveform
        if problem := why_unheard(waveform, row["seconds"], row["language"]):
            raise AudioError(problem)
        if self.config.use_waveform_augmentation:
            random = np.random.default_rng([self.config.seed, epoch, number, 2])
            waveform = augment(waveform, self.config.waveform_augmentation, random)
        return waveform

    def __getitems__(self, micro_batches: list[list[tuple[int, int]]]) -> list[list[dict[str, Any]]]:
        """One step's share of one process, as torch's loader asks for it: a list of micro-batches."""
        return [[self[draw] for draw in micro_batch] for micro_batch in micro_batches]
