"""The settings of the data: sources, filters, augmentation. Imports neither torch nor `datasets`: they take seconds."""

import difflib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from hebrew_asr.command_line import Range
from hebrew_asr.data import tables
from hebrew_asr.data.decoding import AUDIO_SUFFIXES, AudioError, inspect_audio
from hebrew_asr.errors import InputError
from hebrew_asr.text.targets import TextRules


@dataclass
class Source:
    """One dataset of recordings with transcripts."""

    path: str
    """Hub id, a parquet file, a table (.csv, .tsv, .jsonl) that names audio files and their texts, or a folder: of
    parquet files, of `save_to_disk`, or of audio with such a table in it (docs/data.md)."""
    config_name: str | None = None
    revision: str | None = None
    """Branch, tag or commit on the Hub; where a dataset is a script, `refs/convert/parquet` is the Hub's copy of it."""
    split: str = "train"
    """A split, or a slice of one as `datasets` writes it (`train[:1000]`); folders name theirs in the file names."""
    text_column: str | None = None
    """The transcript's column; None takes the first of transcript, text, sentence, transcription. Empty: there is none,
    or it is not to be read, for scripts/pseudo_label.py and where nobody speaks."""
    probability: float | None = None
    """Share of an epoch's utterances; for all sources or for none, where an epoch is every utterance once."""
    replay: bool | None = None
    """It only stands beside the others, so that nothing is forgotten: it is heard as often as its share asks, however
    small it is, and the others alone say when an epoch ends."""
    language: str | None = None
    """What is spoken, as Qwen3-ASR names it (`English`); `None`, its name for no speech: nobody speaks, and the right
    transcript is empty. Left out (null): the language of the run."""
    channel: int | Literal["each"] | None = None
    """Of recordings with several channels, the one to use (0 is the first), or `each`: every channel is an utterance of
    its own, with a text of its own (a list in the text's column) or without any. None: their average."""

    @property
    def has_speech(self) -> bool:
        return self.language != "None"

    @property
    def is_table(self) -> bool:
        """Whether it is a table of files, or a folder with one, or of audio alone; see `table_rows`."""
        path = Path(self.path)
        return tables.is_table(path) or (path.is_dir() and not self.is_saved and not any(path.glob("**/*.parquet")))

    @property
    def is_saved(self) -> bool:
        """Whether `save_to_disk` wrote it."""
        return any((Path(self.path) / name).exists() for name in ("state.json", "dataset_dict.json"))

    def __str__(self) -> str:
        """The path, with what else tells it from another source."""
        extra = ", ".join(filter(None, [self.config_name, self.split if self.split != "train" else None]))
        return f"{self.path} ({extra})" if extra else self.path


LANGUAGE_CODES = {"he": "Hebrew", "iw": "Hebrew", "heb": "Hebrew", "en": "English", "ar": "Arabic", "ru": "Russian"}


def check_language(language: str, where: str = "") -> None:
    """Raises InputError for a language that is not named in English: the model would learn to write that instead."""
    if not re.fullmatch("[A-Z][a-z]+", language) or language.lower() in LANGUAGE_CODES:
        meant = LANGUAGE_CODES.get(language.strip().lower()[:2] if "-" in language else language.strip().lower())
        meant = meant or (language.strip().capitalize() if language.strip().isascii() else "")
        hint = f": {meant}?" if re.fullmatch("[A-Z][a-z]{3,}", meant) else ""
        raise InputError(f"{where}language is {language!r}, must be a name like English, or None{hint}")
    known = set(LANGUAGE_CODES.values())
    if language not in known and (near := difflib.get_close_matches(language, known, 1, 0.8)):
        raise InputError(f"{where}language is {language!r}: did you mean {near[0]}?")


@dataclass
class DataConfig:
    """What is trained and evaluated on; TrainingConfig adds the rest of the settings."""

    train_sources: list[Source] = field(
        default_factory=lambda: [
            Source("ivrit-ai/crowd-transcribe-v5", probability=0.97),
            Source("ivrit-ai/crowd-recital-whisper-training", probability=0.03),
        ]
    )
    eval_sources: list[Source] = field(default_factory=list)
    """Evaluated while training and at the end; empty: whole recordings are held out of the training sources, or,
    where a corpus has no ids of them, sessions or transcribers."""
    eval_fraction: Annotated[float, Range(0, 1)] = 0.02
    """Share of the hours held out when there is no evaluation source."""
    confirm_share: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of the evaluation set, whole recordings, that chooses nothing: the final model is measured on it once, at
    the end (`confirm/wer`). The WER that chose a checkpoint is too low: it is the lowest of several, by chance too."""
    max_eval_utterances: Annotated[int, Range(0)] | None = 2000
    """At most so many utterances are evaluated, taken evenly over the set; None: all."""
    text_rules: TextRules = field(default_factory=TextRules)
    """How targets are written; scoring has rules of its own."""
    no_system_prob: Annotated[float, Range(0, 1)] = 0.25
    """How often training leaves the system turn out, as the transcription endpoints of vLLM and SGLang do."""
    prev_context_prob: Annotated[float, Range(0, 1)] = 0.05
    """How often the system turn holds a context, where Qwen3-ASR takes one: half of the times the text before an
    utterance or, where none is known, another utterance's; half of the times a list of another one's words, and in half
    of these lists one that is spoken. In a stream always the text before. What is left has an empty turn."""

    # Filters of training utterances; evaluation sets keep whatever has text and decodes
    min_audio_length_seconds: Annotated[float, Range(0)] = 0.3
    max_audio_length_seconds: Annotated[float, Range(0.1)] = 30.0
    """Longer rows are cut between their timestamps; without timestamps they are dropped."""
    min_characters_per_second: Annotated[float, Range(0)] = 1.0
    max_characters_per_second: Annotated[float, Range(0)] = 40.0
    min_quality_score: float | None = None
    """Lowest `metadata.quality_score`, where a row has one."""
    require_hebrew: bool = True
    """Of a transcript in Hebrew: one without a Hebrew letter is dropped."""
    drop_duplicates: bool = True
    """Drop the same audio bytes a second time, in the same source or another."""
    leak_min_words: Annotated[int, Range(1)] = 4
    """A training utterance with the same words as an evaluation utterance is dropped, if these are at least so many."""
    audit_scores: str | None = None
    """Scores that scripts/audit_corpus.py wrote; with drop_worst_share, the transcripts that are most likely wrong are
    dropped."""
    drop_worst_share: float = 0.0
    """Share of the audited utterances."""
    max_broken_share: Annotated[float, Range(0, 1)] = 0.05
    """More unreadable rows than this share of a source end the run before it starts."""
    max_dropped_share: Annotated[float, Range(0, 1)] = 0.2
    """More than this share of a source's hours dropped as too long, silent or clipped end the run before it starts."""
    keep_flags: list[str] = field(default_factory=list)
    """Rows whose `extra_data` has a flag (skipped, noisy, multiple_speakers, …) are dropped, but for these flags."""
    streaming: bool = False
    """Training data is read while it is trained on, for corpora that do not fit the disk."""
    steps_per_epoch: Annotated[int, Range(1)] | None = None
    """Steps of an epoch when streaming: how many utterances there are is not known then."""
    preprocessing_num_workers: Annotated[int, Range(0)] = 8
    """Processes that read headers and transcripts at the start, and the audio in `--prepare`."""
    prepared_dir: str | None = None
    """Where `--prepare` keeps what it heard; None: beside a local corpus, in the cache of `datasets` for the Hub's."""

    def check_sources(self) -> None:
        """Raises InputError for a mixture that is none."""
        if not self.train_sources:
            raise InputError("train_sources is empty: name at least one dataset")
        for source in [*self.train_sources, *self.eval_sources]:
            if source.language is not None:
                check_language(source.language, f"{source}: ")
        if self.eval_sources and not any(source.has_speech for source in self.eval_sources):
            raise InputError("nobody speaks in eval_sources, so there is no error rate: name a set with speech")
        if not 0 <= self.drop_worst_share < 1 or (self.audit_scores is None) != (self.drop_worst_share == 0):
            raise InputError("audit_scores and drop_worst_share (above 0, below 1) go together: give both or neither")
        for what in ("audio_length_seconds", "characters_per_second"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low >= high:
                raise InputError(f"min_{what} ({low:g}) must be less than max_{what} ({high:g})")
        if self.no_system_prob + self.prev_context_prob > 1:
            raise InputError(
                "no_system_prob and prev_context_prob are shares of the utterances: together at most 1, not"
                f" {self.no_system_prob:g} and {self.prev_context_prob:g}"
            )
        if self.streaming:
            self._check_streaming()
        given = [source.probability for source in self.train_sources if source.probability is not None]
        if given and (len(given) < len(self.train_sources) or min(given) <= 0 or abs(sum(given) - 1) > 1e-6):
            raise InputError(
                f"the sources' probabilities must be above 0, given for all of them, and sum to 1: {given} for"
                f" {len(self.train_sources)} sources"
            )
        if any(source.replay for source in self.train_sources) and not given:
            raise InputError("a source that is replayed needs a share: give every source its probability")
        if all(source.replay for source in self.train_sources):
            raise InputError("every source is replayed, so nothing says when an epoch ends: leave replay out of one")

    def _check_streaming(self) -> None:
        needed = {
            "eval_sources (nothing can be held out of a stream)": bool(self.eval_sources),
            "steps_per_epoch": self.steps_per_epoch is not None,
            "a probability for each of its sources": len(self.train_sources) == 1
            or all(source.probability for source in self.train_sources),
            "audit_scores left out": self.audit_scores is None,
        }
        if missing := [name for name, is_there in needed.items() if not is_there]:
            raise InputError(f"streaming needs {', and '.join(missing)}")


@dataclass
class WaveformAugmentation:
    """What `augment` may do to a training utterance."""

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    """Factors of speed and pitch together, each as likely, in steps of 1 % (Ko et al. 2015, Audio Augmentation)."""
    speed_probability: float = 1.0
    gain_db: tuple[float, float] = (-6.0, 6.0)
    gain_probability: float = 0.5
    noise_folder: str | None = None
    """Recordings of noise, in subfolders too; None: white noise, pink noise and mains hum are generated."""
    snr_db: tuple[float, float] = (5.0, 25.0)
    """Power of the utterance over power of the noise, both over the whole clip; uniform like the gain."""
    noise_probability: float = 0.3
    rir_folder: str | None = None
    """Room impulse responses; None: no reverberation."""
    rir_probability: float = 0.3

    def __post_init__(self) -> None:
        for name in ("speed_probability", "gain_probability", "noise_probability", "rir_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be between 0 and 1")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"speeds ({self.speeds}) must be one or more factors between 0.5 and 2")
        for name in ("gain_db", "snr_db"):
            if list(getattr(self, name)) != sorted(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be its lower and its upper end")
        for folder in filter(None, (self.noise_folder, self.rir_folder)):
            audio_files(folder)


@lru_cache
def audio_files(folder: str) -> dict[str, float]:
    """A folder's audio files, each with its seconds; raises a ValueError that names the first that cannot be read."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = tables.audio_files(Path(folder))
    if not files:
        raise ValueError(f"{folder}: no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}) in it")
    seconds = {}
    for file in files:
        try:
            seconds[file] = inspect_audio({"path": file}).seconds
        except AudioError as error:
            raise ValueError(f"{file}: {error}") from error
    return seconds
