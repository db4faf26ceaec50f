"""Which rows train and which are held out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from hebrew_asr.data.audio import SOUND_VERSION, AudioError, audio_blocks, check_blocks, decode_audio
from hebrew_asr.data.rows import (
    Dropped,
    SpeechRows,
    check_broken,
    check_lost,
    counts,
    drop,
    load_rows,
    remedy,
    total_dropped,
)
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DIGEST, digest
from hebrew_asr.text import targets

PREPARED = pyarrow.schema(
    {
        "name": pyarrow.string(),  # of a piece of audio, see `piece_names`
        "seconds": pyarrow.float64(),  # as decoded
        "problem": pyarrow.string(),  # why it cannot be used, or ""
        "fingerprint": pyarrow.binary(),  # of its sound, one uint32 every 16 ms
    }
)
LEAKED = pyarrow.schema(
    {
        "name": pyarrow.string(),  # of a piece of training audio
        "recording": pyarrow.string(),  # of the evaluation utterance that sounds alike
        "bit_error_rate": pyarrow.float64(),
    }
)
HEARD = f"heard-{SOUND_VERSION}-*.parquet"


def prepared_folder(source: Source, config: DataConfig) -> Path:
    """Where `--prepare` keeps what it heard of a source: heard-….parquet, leaks-<evaluation set>/….parquet."""
    local = Path(source.path).resolve()
    if config.prepared_dir is None and local.exists():  # beside a file it is hidden, or it would be data of its folder
        return local.with_name(f"{local.name}.prepared" if local.is_dir() else f".{local.name}.prepared")
    name = local.name if local.exists() else source.path.replace("/", "--")
    return Path(config.prepared_dir or Path(datasets.config.HF_DATASETS_CACHE) / "prepared") / f"{name}.prepared"


def piece_names(rows: SpeechRows) -> pyarrow.ChunkedArray:
    """A name for each piece of audio: the digest of its content and its start, and its end; no row or source."""
    ends = pyarrow.compute.round(rows.arrow("end"), 2).cast(pyarrow.string())
    return pyarrow.compute.binary_join_element_wise(rows.arrow("digest"), ends.fill_null("end"), " ")


def evaluation_key(heldout: SpeechRows) -> str:
    return digest("".join(sorted(heldout.column("digest"))).encode())


def read_parts(folders: list[Path], pattern: str, columns: pyarrow.Schema) -> pyarrow.Table:
    files = [file for folder in folders for file in sorted(folder.glob(pattern))]
    tables = [pyarrow.parquet.read_table(file, columns=columns.names) for file in files]
    return pyarrow.concat_tables([columns.empty_table(), *tables])


def with_prepared(train: SpeechRows, config: DataConfig) -> SpeechRows:
    """Uses what `--prepare` heard: exact durations, and what only decoding shows is dropped and counted.

    Pieces that were not listened to yet stay as their headers describe them.
    """
    folders = list(dict.fromkeys(prepared_folder(source, config) for source in config.train_sources))
    heard = read_parts(folders, HEARD, pyarrow.schema([PREPARED.field(i) for i in range(3)]))
    if not len(heard):
        return train
    places = pyarrow.compute.index_in(piece_names(train), heard["name"].combine_chunks())
    is_heard = pyarrow.compute.is_valid(places).to_numpy()
    places = places.fill_null(0).to_numpy()
    seconds = np.where(is_heard, heard["seconds"].to_numpy()[places], train.seconds)
    problems = np.where(is_heard, heard["problem"].to_numpy(zero_copy_only=False)[places], "")
    has_speech = np.array([source.has_speech for source in config.train_sources])[train.source_numbers]
    problems = np.where(~has_speech & (problems == "silent"), "", problems)
    sizes = np.bincount(train.source_numbers, minlength=len(config.train_sources)).tolist()
    sizes = [size + total_dropped(train, source) for size, source in zip(sizes, config.train_sources, strict=True)]
    train = SpeechRows(train.sources, train.index, train.used, train.dropped, seconds)
    train.notes.append(f"listened to before: {is_heard.mean():.1%} of the training utterances (--prepare)")
    characters = pyarrow.compute.utf8_length(train.arrow("text")).to_numpy()
    rate = characters / np.maximum(seconds, 1e-9)
    slowest, fastest = config.min_characters_per_second, config.max_characters_per_second
    reasons = {
        f"shorter than {config.min_audio_length_seconds:g} s": seconds < config.min_audio_length_seconds,
        f"longer than {config.max_audio_length_seconds:g} s": seconds
        > config.max_audio_length_seconds + targets.PAST_THE_END,
        f"not {slowest:g}–{fastest:g} characters a second": has_speech & ((rate < slowest) | (rate > fastest)),
    }
    for reason, is_so in reasons.items():
        problems = np.where(is_heard & is_so & (problems == ""), reason, problems)
    for reason in sorted(set(problems.tolist()) - {""}):
        mask = problems == reason
        train, problems = drop(train, config.train_sources, mask, reason), problems[~mask]
    for source, size in zip(config.train_sources, sizes, strict=True):
        check_broken(source, train.dropped, size, config.max_broken_share)
    check_all_lost(train, config)
    return train


def check_all_lost(train: SpeechRows, config: DataConfig) -> None:
    """`check_lost` of every source; raises InputError."""
    kept = np.bincount(train.source_numbers, train.seconds, len(config.train_sources)) / 3600
    for source, hours in zip(config.train_sources, kept.tolist(), strict=True):
        mine = [one for one in train.dropped if one.source == str(source)]
        check_lost(source, mine, hours + sum(one.hours for one in mine), config.max_dropped_share)


FEW_UTTERANCES = 30  # of an evaluation set; below it an error rate says nothing
SAMPLE = 32  # utterances of a source that are listened to before a run


def check_sound(train: SpeechRows, config: DataConfig) -> None:
    """Listens to a sample of every source; raises InputError when more than `max_dropped_share` of it is of no use.

    A source whose clips are all silent, clipped or in antiphase is so refused at the start, not dropped clip by clip.
    """
    for number, source in enumerate(config.train_sources):
        mine = np.flatnonzero(train.source_numbers == number)
        sample = mine[np.linspace(0, len(mine) - 1, min(SAMPLE, len(mine))).astype(int)].tolist()
        problems: dict[str, list[str]] = {}
        for piece in (train[place] for place in sample):
            try:
                heard = audio_blocks(piece["audio"], piece["start"], piece["end"])
                problem = check_blocks(heard, piece["seconds"])
            except AudioError as error:
                problem = str(error)
            if problem and not (problem == "silent" and not source.has_speech):
                problems.setdefault(problem, []).append(piece["recording"])
        found = [Dropped(str(source), reason, len(names), 0.0, names[:5]) for reason, names in problems.items()]
        if sum(one.utterances for one in found) > config.max_dropped_share * len(sample):
            names = [name for one in found for name in one.examples]
            raise InputError(
                f"{source}: of {len(sample)} utterances that were listened to, more than max_dropped_share"
                f" ({config.max_dropped_share:g}) cannot be used: {counts(found)}, among them {', '.join(names[:5])}"
                f"{remedy(found)}"
            )


def without_leaks(train: SpeechRows, heldout: SpeechRows, config: DataConfig) -> SpeechRows:
    """Removes training pieces with the words of an evaluation utterance, with its very bytes, or with its sound.

    The sound is compared by `--prepare`, so that it is found under another codec, rate or level.
    """
    contents = [pyarrow.compute.utf8_slice_codeunits(rows.arrow("digest"), 0, DIGEST) for rows in (train, heldout)]
    by_audio = pyarrow.compute.is_in(contents[0], contents[1].combine_chunks()).to_numpy()
    train = drop(train, config.train_sources, by_audio, "audio of an evaluation set", named=None)
    folders = list(dict.fromkeys(prepared_folder(source, config) for source in config.train_sources))
    compared = f"leaks-{evaluation_key(heldout)}"
    if leaks := sorted(read_parts(folders, f"{compared}/*.parquet", LEAKED)["name"].to_pylist()):
        by_sound = pyarrow.compute.is_in(piece_names(train), pyarrow.array(leaks)).to_numpy()
        train = drop(train, config.train_sources, by_sound, "sound of an evaluation set", named=None)
    parts = [part for folder in folders for part in folder.glob(HEARD)]
    if any(not (part.parent / compared / part.name).exists() for part in parts):
        train.notes.append("not all of it was compared by sound with this evaluation set: run --prepare again")
    is_long = pyarrow.compute.greater_equal(heldout.arrow("word_count"), config.leak_min_words)
    sentences = heldout.arrow("words").filter(is_long).combine_chunks()
    by_text = pyarrow.compute.is_in(train.arrow("words"), sentences).to_numpy()
    return drop(train, config.train_sources, by_text, "text of an evaluation set", named=None)


def read_audit(file: str) -> pyarrow.Table:
    """An audit's utterances and their ranks; InputError where the file is none of an audit."""
    try:
        return pyarrow.parquet.read_table(file, columns=["digest", "words", "rank"])
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} is no table of scripts/audit_corpus.py: {error}") from error


def audited_as(column: Callable[[str], pyarrow.ChunkedArray]) -> pyarrow.Array:
    """Names of utterances, given their columns: the audio and the words that were audited."""
    return pyarrow.compute.binary_join_element_wise(column("digest"), column("words"), " ").combine_chunks()


def worst(scores: pyarrow.Table, share: float) -> pyarrow.Table:
    """The utterances of an audit whose rank is within `share` of all that have one."""
    limit = round(share * (len(scores) - scores["rank"].null_count))
    return scores.filter(pyarrow.compute.less_equal(scores["rank"], limit))


def without_worst(train: SpeechRows, config: DataConfig) -> SpeechRows:
    """Drops what the audit ranks worst; a transcript that was corrected since has other words, and stays."""
    assert config.audit_scores
    scores, mine = read_audit(config.audit_scores), audited_as(train.arrow)
    if not pyarrow.compute.any(pyarrow.compute.is_in(mine, audited_as(scores.column))).as_py():
        raise InputError(f"{config.audit_scores}: none of its utterances is in train_sources")
    is_bad = pyarrow.compute.is_in(mine, audited_as(worst(scores, config.drop_worst_share).column))
    reason = f"among the audit's worst {config.drop_worst_share:.0%}"
    return drop(train, config.train_sources, is_bad.to_numpy(zero_copy_only=False), reason)


def split(config: DataConfig, seed: int) -> tuple[SpeechRows, SpeechRows]:
    """Training and evaluation rows, as texts and headers describe them; leaks are still in."""
    train = load_rows(config.train_sources, config, for_training=True)
    if config.eval_sources:
        heldout = load_rows(config.eval_sources, config, for_training=False)
    else:
        is_own = pyarrow.compute.is_null(train.arrow("language"))  # an error rate is of one language
        groups, own = train.arrow("group"), is_own.to_numpy()
        chosen = held_out_groups(groups.filter(is_own), train.seconds[own], config.eval_fraction, seed)
        is_heldout = pyarrow.compute.is_in(groups, pyarrow.array(chosen)).to_numpy() & own
        heldout = SpeechRows(train.sources, train.index, train.used[is_heldout], [])
        train = drop(train, config.train_sources, is_heldout, "held out for evaluation")
        train.notes += notes_of_held_out(heldout)
    return train, heldout


def held_out_groups(groups: pyarrow.ChunkedArray, seconds: np.ndarray, share: float, seed: int) -> list[str]:
    """Whole recordings (or sessions, transcribers) that together have about `share` of the time, at least one.

    Drawn without regard to their size; one that would take more than half as much again as is wanted is left. Raises
    InputError where there are fewer than two.
    """
    encoded = groups.combine_chunks().dictionary_encode()
    lengths = np.bincount(encoded.indices.to_numpy(), seconds, len(encoded.dictionary))
    by_name = sorted(zip(encoded.dictionary.to_pylist(), lengths.tolist(), strict=True))
    if len(by_name) < 2:
        raise InputError(
            f"eval_sources is empty, and the training data in the run's language has {len(by_name)} recordings (or"
            " sessions, or transcribers, where it has no `metadata.entry_id`): name an evaluation set"
        )
    wanted, chosen, taken = share * float(lengths.sum()), [], 0.0
    for number in np.random.default_rng(seed).permutation(len(by_name)).tolist():
        name, length = by_name[number]
        if taken < wanted and taken + length <= 1.5 * wanted and len(chosen) < len(by_name) - 1:
            chosen.append(name)
            taken += length
    return sorted(chosen) or [min(by_name, key=lambda one: one[1])[0]]


def notes_of_held_out(heldout: SpeechRows) -> list[str]:
    """What the reader of an error rate must know: how the set was divided, and whether it is large enough."""
    kinds = sorted({f"{name.split()[0]}s" for name in set(heldout.column("group")) - set(heldout.column("recording"))})
    notes = []
    if kinds:
        notes.append(
            f"held out: whole {' and '.join(kinds)}, since there are no ids of recordings (`metadata.entry_id`):"
            " parts of one recording may be on both sides, which makes the error rate too good"
        )
    if len(heldout) < FEW_UTTERANCES:
        notes.append(
            f"warning: {len(heldout)} utterances are held out, so few that the error rate says nothing: name an"
            " evaluation set (eval_sources), or hold out more (eval_fraction): hundreds are better"
        )
    return notes


def load_train_and_eval(config: DataConfig, seed: int) -> tuple[SpeechRows, SpeechRows]:
    train, heldout = split(config, seed)
    train = without_leaks(with_prepared(train, config), heldout, config)
    if config.audit_scores:
        train = without_worst(train, config)
    check_sound(train, config)
    heldout = to_choose_by(heldout, config, seed)
    used = set(np.unique(train.source_numbers).tolist())
    if lost := [source.path for number, source in enumerate(config.train_sources) if number not in used]:
        raise InputError(f"nothing is left to train on of {', '.join(lost)}, after the split and the removal of leaks")
    return train, heldout


def to_choose_by(heldout: SpeechRows, config: DataConfig, seed: int) -> SpeechRows:
    """What is evaluated while training; its `set_aside` is what is measured once, at the end (`confirm_share`)."""
    if not config.confirm_share:
        return evaluated(heldout, config)
    groups = heldout.arrow("group")
    if pyarrow.compute.count_distinct(groups).as_py() < 2:
        raise InputError(
            f"confirm_share is {config.confirm_share:g}, but the evaluation set is one recording (or session, or"
            " transcriber), which is not divided: leave confirm_share out, and measure the final model on another set"
        )
    aside = held_out_groups(groups, heldout.seconds, config.confirm_share, seed)
    is_aside = pyarrow.compute.is_in(groups, pyarrow.array(aside)).to_numpy()
    sources = config.eval_sources or config.train_sources
    chooses = drop(heldout, sources, is_aside, "set aside, to confirm the final model")
    chooses = evaluated(chooses, config)
    chooses.set_aside = evaluated(heldout.keep(is_aside), config)
    return chooses


def evaluated(heldout: SpeechRows, config: DataConfig) -> SpeechRows:
    heldout = without_too_many(heldout, config)
    if config.eval_sources:
        return heldout
    return drop(heldout, config.train_sources, ~np.array([decodes(row) for row in heldout]), "does not decode")


def without_too_many(heldout: SpeechRows, config: DataConfig) -> SpeechRows:
    """At most `max_eval_utterances`, spread over the set."""
    if not config.max_eval_utterances or len(heldout) <= config.max_eval_utterances:
        return heldout
    is_left_out = np.ones(len(heldout), bool)
    is_left_out[np.linspace(0, len(heldout) - 1, config.max_eval_utterances).astype(int)] = False
    reason = f"more than max_eval_utterances ({config.max_eval_utterances})"
    return drop(heldout, config.eval_sources or config.train_sources, is_left_out, reason)


def decodes(piece: dict[str, Any]) -> bool:
    try:
        return len(decode_audio(piece["audio"], piece["start"], piece["end"])) > 0
    except AudioError:
        return False


def chosen_by_difficulty(
    train: SpeechRows, sources: list[Source], scores_file: str, quantiles: tuple[float, float]
) -> SpeechRows:
    """Keeps the utterances between two quantiles of the audit's ranking (1: most likely a wrong transcript)."""
    scores = read_audit(scores_file)
    scores = scores.filter(pyarrow.compute.is_valid(scores["rank"]))
    places = pyarrow.compute.index_in(audited_as(train.arrow), audited_as(scores.column))
    is_known = pyarrow.compute.is_valid(places).to_numpy(zero_copy_only=False)
    ranks = scores["rank"].to_numpy()[places.fill_null(0).to_numpy()] if len(scores) else np.zeros(len(train))
    low, high = quantiles
    quantile = 1 - (ranks - 1) / max(1, len(scores) - 1)
    is_kept = is_known & (low <= quantile) & (quantile <= high)
    if not is_kept.any():
        raise InputError(f"{scores_file}: none of its utterances in difficulty_range is in train_sources")
    train = drop(train, sources, ~is_kept & is_known, f"not in difficulty_range {low:g}–{high:g}")
    return drop(train, sources, ~is_known[is_kept | ~is_known], "not audited")
