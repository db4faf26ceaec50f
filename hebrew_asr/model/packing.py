"""Deals the utterances of one optimizer step to processes and micro-batches, and packs a micro-batch into tensors.

Nothing is padded to the longest utterance: several stand one after the other in a row of tokens, and attention does not
reach from one into the next. So a process's share of a step may be any utterances, and only their tokens count.
"""

import heapq
import itertools
import math

import numpy as np
import torch

from hebrew_asr.model.attention import WINDOW_TOKENS
from hebrew_asr.model.frames import FRAMES_PER_CHUNK, TOKENS_PER_CHUNK, audio_token_count
from hebrew_asr.model.loss import IGNORED_LABEL, flat_audio_places, flat_label_places


def balanced(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Deals items to `parts` such that the largest sum is small: the largest first, each to the part with the least.

    Returns:
        The items' places of each part, in their own order; a part is empty where there are fewer items than parts.
    """
    sums = [(0.0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for place in np.argsort(-sizes, kind="stable").tolist():
        size, part = sums[0]
        found[part].append(place)
        heapq.heapreplace(sums, (size + float(sizes[place]), part))
    return [np.array(sorted(places), dtype=int) for places in found]


def deal_step(tokens: np.ndarray, processes: int, budget: int) -> list[list[np.ndarray]]:
    """Deals a step's utterances to processes, and each share to as few micro-batches as the budget of tokens allows.

    Args:
        tokens: (utterances,) tokens of each; one that is longer than the budget is alone in its micro-batch.

    Returns:
        For each process its micro-batches, as places in `tokens`: the same number for every process.
    """
    shares = balanced(tokens, processes)
    count = max(1, *(math.ceil(tokens[share].sum() / budget) for share in shares))
    while True:
        cut = [[share[places] for places in balanced(tokens[share], count)] for share in shares]
        if all(len(batch) < 2 or tokens[batch].sum() <= budget for batches in cut for batch in batches):
            return cut
        count += 1


def rows_of(tokens: np.ndarray) -> list[np.ndarray]:
    """Deals a micro-batch's utterances to rows that are equally full and not much wider than the longest utterance.

    Attention costs as much as a row is wide, so of the cuts with little padding it is the one with the most rows.
    """
    most = max(1, int(tokens.sum() // tokens.max()))
    cuts = [balanced(tokens, count) for count in range(1, most + 1)]
    padded = [len(rows) * max(tokens[row].sum() for row in rows) for rows in cuts]
    return [rows for rows, size in zip(cuts, padded, strict=True) if size <= 1.05 * min(padded)][-1]


def useful_tokens(batch: dict[str, torch.Tensor]) -> int:
    """How many positions of a batch, packed or padded, are not padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    positions = batch["position_ids"]
    following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
    return int(((positions > 0) | (following == 1)).sum())  # an utterance begins with 0, 1; padding is 0, 0


def pack_clips(
    clips: list[np.ndarray], order: list[int]
) -> tuple[dict[str, torch.Tensor], list[slice], dict[int, tuple[int, int]]]:
    """Features of clips that stand one after the other in this order, each filled up to a whole second.

    Returns:
        input_features (1, mel, frames), input_features_mask (1, frames), window_ends, in audio tokens, of the encoder's
        attention; where each clip's frames are; where each clip's audio tokens begin and end.
    """
    widths = [math.ceil(clip.shape[1] / FRAMES_PER_CHUNK) * FRAMES_PER_CHUNK for clip in clips]
    features = torch.zeros(1, len(clips[0]), sum(widths))
    mask = torch.zeros(1, sum(widths), dtype=torch.long)
    places, spans, begin, windows = {}, {}, 0, [0]
    for i in order:
        places[i] = slice(begin, begin + clips[i].shape[1])
        features[0, :, places[i]] = torch.from_numpy(clips[i])
        mask[0, places[i]] = 1
        begin += widths[i]
        last = windows[-1]
        end = last + audio_token_count(clips[i].shape[1])
        spans[i] = last, end
        windows += [*range(last + WINDOW_TOKENS, end, WINDOW_TOKENS), end]
    batch = {
        "input_features": features,
        "input_features_mask": mask,
        "window_ends": torch.tensor(windows, dtype=torch.int32),
    }
    return batch, [places[i] for i in range(len(clips))], spans


def pack_tokens(
    prompts: list[list[int]], targets: list[list[int]], rows: list[np.ndarray], padding: int
) -> dict[str, torch.Tensor]:
    """input_ids, position_ids (from 0 in each utterance) and labels (rows, tokens).

    And utterance_ends, in the tokens of all rows, padding being one more.
    """
    lengths = [len(prompt + target) for prompt, target in zip(prompts, targets, strict=True)]
    shape = len(rows), max(sum(lengths[i] for i in row) for row in rows)
    tokens, positions, labels = (torch.full(shape, value) for value in (padding, 0, IGNORED_LABEL))
    ends = {0}
    for number, row in enumerate(rows):
        begin = 0
        for i in row.tolist():
            middle, end = begin + len(prompts[i]), begin + lengths[i]
            tokens[number, begin:end] = torch.tensor(prompts[i] + targets[i])
            positions[number, begin:end] = torch.arange(lengths[i])
            labels[number, middle:end] = tokens[number, middle:end]
            ends |= {number * shape[1] + end, (number + 1) * shape[1]}
            begin = end
    utterance_ends = torch.tensor(sorted(ends), dtype=torch.int32)
    return {"input_ids": tokens, "position_ids": positions, "utterance_ends": utterance_ends, "labels": labels}


def places_of(batch: dict[str, torch.Tensor], audio_token: int) -> dict[str, torch.Tensor]:
    """What `label_states` would find on the device, where the host would wait for it: indices, found beforehand.

    encoder_places of the tokens of sound among those of the encoder's seconds; audio_places of placeholders, and
    label_places of what predicts a label, in the tokens of all rows one after the other.
    """
    frames = batch["input_features_mask"].view(-1, FRAMES_PER_CHUNK).sum(dim=1)
    for _ in range(3):
        frames = (frames + 1) // 2
    return {
        "encoder_places": (torch.arange(TOKENS_PER_CHUNK) < frames[:, None]).flatten().nonzero()[:, 0],
        "audio_places": flat_audio_places(batch["input_ids"], batch["labels"], audio_token),
        "label_places": flat_label_places(batch["labels"]),
    }


def all_rows(prompts: list[list[int]], targets: list[list[int]], in_one_row: bool) -> list[np.ndarray]:
    lengths = np.array([len(prompt + target) for prompt, target in zip(prompts, targets, strict=True)])
    return [np.arange(len(lengths))] if in_one_row else rows_of(lengths)


def pack(
    clips: list[np.ndarray], prompts: list[list[int]], targets: list[list[int]], padding: int, in_one_row: bool = False
) -> tuple[dict[str, torch.Tensor], list[slice]]:
    """The tensors of one forward pass over utterances that stand one after the other.

    Args:
        clips: (mel, frames) features of each utterance.
        prompts: tokens without a label, with a placeholder for each audio token of the clip.
        targets: tokens with one.
        in_one_row: where attention costs nothing across utterances; then nothing at all is padded.

    Returns:
        the tensors of `pack_clips` and `pack_tokens`, and where each clip's frames are.
    """
    rows = all_rows(prompts, targets, in_one_row)
    # clips stand in the order in which the rows hold their placeholders
    audio, places, _ = pack_clips(clips, np.concatenate(rows).tolist())
    return audio | pack_tokens(prompts, targets, rows, padding), places


def pack_samples(
    clips: list[np.ndarray],
    clip_of: list[int],
    prompts: list[list[int]],
    targets: list[list[int]],
    padding: int,
    in_one_row: bool = False,
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The tensors of one forward pass over several targets for each clip; the encoder hears each clip once.

    Args:
        clip_of: which clip each prompt and target belongs to.

    Returns:
        what `pack` returns, with `audio_order` for `label_states`; and the order in which the rows hold the targets.
    """
    rows = all_rows(prompts, targets, in_one_row)
    order = np.concatenate(rows).tolist()
    audio, _, spans = pack_clips(clips, list(range(len(clips))))
    placeholders = np.concatenate([np.arange(*spans[clip_of[i]]) for i in order])
    tokens = pack_tokens(prompts, targets, rows, padding)
    return audio | tokens | {"audio_order": torch.from_numpy(placeholders)}, order


def unpack(
    batch: dict[str, torch.Tensor], audio_token: int
) -> tuple[list[np.ndarray], list[list[int]], list[list[int]]]:
    """The clips, prompts and targets that `pack` was given, in the order of the rows."""
    tokens, positions, labels = (batch[name].flatten() for name in ("input_ids", "position_ids", "labels"))
    clips, prompts, targets, frame = [], [], [], 0
    for begin, end in itertools.pairwise(batch["utterance_ends"].tolist()):
        if end - begin < 2 or positions[begin + 1] != 1:
            continue  # padding
        mine, is_prompt = tokens[begin:end], labels[begin:end] == IGNORED_LABEL
        prompts.append(mine[is_prompt].tolist())
        targets.append(mine[~is_prompt].tolist())
        chunks = math.ceil(prompts[-1].count(audio_token) / TOKENS_PER_CHUNK)
        stretch = slice(frame, frame + chunks * FRAMES_PER_CHUNK)
        valid = int(batch["input_features_mask"][0, stretch].sum())
        clips.append(batch["input_features"][0, :, stretch][:, :valid].numpy())
        frame = stretch.stop
    return clips, prompts, targets


def halves(batch: dict[str, torch.Tensor], audio_token: int) -> list[dict[str, torch.Tensor]]:
    """A training batch, packed or padded, as two with about as many tokens each; as none where it is one utterance."""
    if "utterance_ends" not in batch:
        rows = len(batch["input_ids"])
        cuts = (slice(rows // 2), slice(rows // 2, rows)) if rows > 1 else ()
        return [{name: tensor[cut] for name, tensor in batch.items()} for cut in cuts]
    clips, prompts, targets = unpack(batch, audio_token)
    if len(clips) < 2:
        return []
    sizes = np.array([len(prompt + target) for prompt, target in zip(prompts, targets, strict=True)])
    padding = (targets[0] or prompts[0])[-1]
    in_one_row = len(batch["input_ids"]) == 1

    def packed(part: np.ndarray) -> dict[str, torch.Tensor]:
        chosen = [clips[i] for i in part], [prompts[i] for i in part], [targets[i] for i in part]
        batch = pack(*chosen, padding, in_one_row)[0]
        return batch | places_of(batch, audio_token)

    return [packed(part) for part in balanced(sizes, 2)]
