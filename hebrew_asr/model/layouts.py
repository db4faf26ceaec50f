"""The two layouts of Qwen3-ASR checkpoints, and the conversion of one into the other.

"transformers" is the layout of transformers' own classes (Qwen/Qwen3-ASR-1.7B-hf); "thinker" is the older one of the
`qwen-asr` package (Qwen/Qwen3-ASR-1.7B), named after the prefix of its weights. The same tensors have other names, and
the configuration, processor and tokenizer are written in other files and fields. Of the weights only the names in the
safetensors headers change: the data is copied as it is, in blocks. Nothing is unpickled and no code of a checkpoint
runs.
"""

import copy
import dataclasses
import functools
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import filelock
import huggingface_hub
import safetensors
import tokenizers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.qwen3_asr.configuration_qwen3_asr import Qwen3ASREncoderConfig

from hebrew_asr.errors import InputError
from hebrew_asr.files import digest, sha256, whole_or_nothing
from hebrew_asr.model.generation import MAX_NEW_TOKENS

Layout = Literal["transformers", "thinker"]

PREFIXES = (  # of weights: (thinker, transformers); the first that fits
    ("thinker.audio_tower.proj1.", "model.multi_modal_projector.linear_1."),
    ("thinker.audio_tower.proj2.", "model.multi_modal_projector.linear_2."),
    ("thinker.audio_tower.", "model.audio_tower."),
    ("thinker.model.", "model.language_model."),
    ("thinker.lm_head.", "lm_head."),
)
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # all that either layout is read from

MOST_LAYERS, LARGEST_SIZE = 1024, 2**24  # beyond them a configuration is not believed
LAYERS = {"audio_config": "encoder_layers", "text_config": "num_hidden_layers"}
SIZES = {  # must be named by a configuration: the two layouts' classes have different defaults
    "audio_config": [
        "d_model",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "downsample_hidden_size",
        "num_mel_bins",
        "n_window",
        "n_window_infer",
        "output_dim",
    ],
    "text_config": [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
}
POSITIONS_IN_CHUNK = 13  # of the encoder's position table: audio tokens of a chunk of 100 mel frames
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "bos_token_id"}
AUDIO_TOKENS = {
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def layout_of(folder: str | Path) -> Layout:
    """The layout of a checkpoint's folder, by its config.json; raises InputError where it is no Qwen3-ASR."""
    folder = Path(folder)
    layout = _layout(config := read_json(folder / "config.json"))
    if layout is None:
        raise InputError(f"{folder} is no Qwen3-ASR checkpoint: model_type is {config.get('model_type')!r}")
    return layout


def _layout(config: dict[str, Any]) -> Layout | None:
    if config.get("model_type") != "qwen3_asr":
        return None
    return "thinker" if "thinker_config" in config else "transformers"


def in_transformers_layout(name_or_path: str) -> str:
    """A folder or Hub id that transformers' own classes load.

    That is the argument itself, unless it is a Qwen3-ASR checkpoint in the older layout: it is then converted once,
    into a folder of `$HF_HOME/hebrew_asr/layouts` that is named after the content of its files.
    """
    file = transformers.utils.cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False)
    layout = None if file is None else _layout(config := read_json(Path(file)))
    if layout == "transformers":
        check_own(config, Path(file))
    if layout != "thinker":
        return name_or_path
    folder = Path(file).parent
    if not Path(name_or_path).is_dir():
        folder = Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=FILES))
    converted = Path(huggingface_hub.constants.HF_HOME) / "hebrew_asr" / "layouts" / content_key(folder)
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(converted.with_suffix(".lock")):  # one of the processes on a machine converts
            if not converted.is_dir():
                convert(folder, converted, "transformers")
                print(f"{name_or_path} is in the older layout; its copy in transformers' own: {converted}", flush=True)
    except OSError as error:
        raise InputError(
            f"{name_or_path} is in the older layout, and its copy in transformers' own cannot be written to {converted}"
            f" ({error.strerror or error}): make room there, or name another place in HF_HOME"
        ) from error
    return str(converted)


def content_key(folder: Path) -> str:
    """Names the content of a checkpoint's files, and of this module, which decides what they become."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    status = [(file, file.stat()) for file in [*files, Path(__file__)]]
    content = [f"{file.name} {_sha256(file, found.st_size, found.st_mtime_ns)}" for file, found in status]
    return digest("\n".join(content).encode())


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Of a file's content; size and time of change only tell whether it is still the file that this process read."""
    return sha256(file)


def convert(source: str | Path, target: str | Path, to: Layout) -> None:
    """Writes the checkpoint in `source`, which is in the other layout, into the new folder `target`, or nothing.

    Raises InputError for a source that is not whole or not Qwen3-ASR, and for a target that holds something.
    """
    source, target = Path(source), Path(target)
    if layout_of(source) == to:
        raise InputError(f"{source} is in the {to} layout already")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: name another")
    try:
        with whole_or_nothing(target) as folder:
            folder.mkdir()
            write_converted(source, folder, to)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source} has a field that is not of the kind its library writes: {error!r}") from error


def write_converted(source: Path, folder: Path, to: Layout) -> None:
    """Writes every file of the other layout into an empty folder."""
    old = read_json(source / "config.json")
    check_sizes(old, source / "config.json")
    own_tokenizer = convert_tokenizer(source, folder, to)
    special = special_ids(own_tokenizer, source)
    new = to_transformers(old, special, source) if to == "transformers" else to_thinker(old, special, source)
    own, checked = (new, old["thinker_config"]) if to == "transformers" else (old, old)
    if checked.get("audio_token_id") != special["audio"]:
        raise InputError(
            f"{source / 'config.json'}: audio_token_id is {checked.get('audio_token_id')}, but the tokenizer's"
            f" {AUDIO_TOKENS['audio_token']} is {special['audio']}"
        )
    write_json(folder / "config.json", new)
    write_json(folder / "generation_config.json", generation_config(source, special))
    convert_processor(source, folder, to, own["audio_config"])
    convert_weights(source, folder, to, own)


# ------------------------------------------------------------------------------------------------------------- Weights


def renamed(name: str, to: Layout) -> str | None:
    """A weight's name in the other layout; None for a name that this layout does not have."""
    for thinker, own in PREFIXES:
        old, new = (thinker, own) if to == "transformers" else (own, thinker)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def expected_shapes(config: dict[str, Any], file: Path) -> dict[str, list[int]]:
    """Name and shape of every weight of a model, by its configuration in transformers' layout."""
    try:
        with torch.device("meta"):
            model = transformers.Qwen3ASRForConditionalGeneration(transformers.Qwen3ASRConfig.from_dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} describes no model: {' '.join(str(error).split())}") from error
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def convert_weights(source: Path, folder: Path, to: Layout, config: dict[str, Any]) -> None:
    """Copies the safetensors files, sharded as they are, under the other layout's names.

    Args:
        config: in transformers' layout; every weight it calls for must be there in its shape, and no other.
    """
    expected = expected_shapes(config, source / "config.json")
    found: dict[str, Path] = {}  # by name in transformers' layout
    index = None if (source / WEIGHTS).exists() else read_index(source)
    for file in [source / WEIGHTS] if index is None else sorted({source / name for name in index.values()}):
        header, _ = read_header(file)
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            own = renamed(name, to) if to == "transformers" else name
            if own not in expected:
                raise InputError(f"{file} holds {name}, which Qwen3-ASR does not have")
            if tensor["shape"] != expected[own]:
                raise InputError(
                    f"{file}: {name} has the shape {tensor['shape']}, config.json calls for {expected[own]}"
                )
            if own in found:
                raise InputError(f"{name} is in {found[own]} and in {file}")
            if index is not None and index.get(name) != file.name:
                raise InputError(f"{source / WEIGHTS_INDEX} does not say that {name} is in {file.name}")
            found[own] = file
    tied = config.get("tie_word_embeddings", True)
    missing = expected.keys() - found.keys() - ({HEAD} if tied else set())
    if missing:
        name = min(missing)
        name = renamed(name, "thinker") if to == "transformers" else name
        raise InputError(f"{source}: {len(missing)} weights are missing, {name} among them")
    if tied and HEAD in found:
        check_tied(found, to)
    for file in sorted(set(found.values())):
        copy_renamed(file, folder / file.name, to)
    if index is not None:
        content = read_json(source / WEIGHTS_INDEX)
        content["weight_map"] = {renamed(name, to): file for name, file in index.items()}
        write_json(folder / WEIGHTS_INDEX, content)


def read_index(source: Path) -> dict[str, str]:
    """The file of each weight of a sharded checkpoint."""
    if not (source / WEIGHTS_INDEX).exists():
        raise InputError(f"{source} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: save the weights as safetensors")
    index = read_json(source / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{source / WEIGHTS_INDEX}: weight_map is missing or no object")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{source / WEIGHTS_INDEX}: the file of {name} is {file!r}, no safetensors beside it")
    return index


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte at which its data begins."""
    try:
        with safetensors.safe_open(file, "pt"):  # raises unless the header describes the whole file
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} is not there or not whole ({error}): fetch or save it again") from error
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        return json.loads(content.read(length)), 8 + length


def copy_renamed(source: Path, target: Path, to: Layout) -> None:
    """Copies a safetensors file with the other layout's names; only the header is held in memory."""
    header, begin = read_header(source)
    header = {name if name == "__metadata__" else renamed(name, to): entry for name, entry in header.items()}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)  # the data must begin at a multiple of 8
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(len(written).to_bytes(8, "little") + written)
        old.seek(begin)
        shutil.copyfileobj(old, new, 16 << 20)


def check_tied(found: dict[str, Path], to: Layout) -> None:
    """Raises InputError where a head that config.json ties to the embedding differs from it."""
    tensors = []
    for own in (HEAD, EMBEDDING):
        name = renamed(own, "thinker") if to == "transformers" else own
        with safetensors.safe_open(found[own], "pt") as file:
            tensors.append(file.get_tensor(name))
    if not torch.equal(*tensors):
        raise InputError(
            f"{found[HEAD]}: lm_head.weight differs from the embedding, but config.json ties them:"
            " set tie_word_embeddings to false if the head was trained apart, or remove it"
        )


# ------------------------------------------------------------------------------------------------------- Configuration


def check_sizes(config: dict[str, Any], file: Path) -> None:
    """Raises InputError for a configuration, of either layout, that lacks a size or has one that cannot be."""
    place = ""
    if "thinker_config" in config:
        config, place = config["thinker_config"], "thinker_config."
        if not isinstance(config, dict):
            raise InputError(f"{file}: thinker_config is no object")
        if "classify_num" in config:
            raise InputError(f"{file} is of a forced aligner, which does not transcribe")
    for part, names in SIZES.items():
        if not isinstance(config.get(part), dict):
            raise InputError(f"{file}: {place}{part} is missing or no object")
        for name in [LAYERS[part], *names]:
            value = config[part].get(name)
            most = MOST_LAYERS if name == LAYERS[part] else LARGEST_SIZE
            if type(value) is not int or not 1 <= value <= most:
                said = "is missing" if value is None else f"is {value!r}"
                raise InputError(f"{file}: {place}{part}.{name} {said}; it must be an integer of 1 to {most}")
    audio, text = config["audio_config"], config["text_config"]
    for why, wrong in {
        "audio_config.encoder_attention_heads does not divide d_model": audio["d_model"]
        % audio["encoder_attention_heads"],
        "audio_config.n_window_infer is no multiple of 2 * n_window": audio["n_window_infer"] % (2 * audio["n_window"]),
        "audio_config.output_dim is not text_config.hidden_size": audio["output_dim"] != text["hidden_size"],
        "text_config.num_key_value_heads does not divide num_attention_heads": text["num_attention_heads"]
        % text["num_key_value_heads"],
        "text_config.head_dim is odd": text["head_dim"] % 2,
    }.items():
        if wrong:
            raise InputError(f"{file}: {place}{why}")


def check_own(config: dict[str, Any], file: Path) -> None:
    """Raises InputError for a configuration in transformers' layout of which no model should be built."""
    if config.get("quantization_config"):
        raise InputError(f"{file} is of quantized weights: give the checkpoint that they were made from")
    for part in SIZES:
        if not isinstance(config.get(part), dict):
            raise InputError(f"{file}: {part} is missing or no object")
        layers = config[part].get(LAYERS[part], 1)
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:  # transformers makes lists of them
            raise InputError(
                f"{file}: {part}.{LAYERS[part]} is {layers!r}; it must be an integer of 1 to {MOST_LAYERS}"
            )
    try:
        whole = transformers.Qwen3ASRConfig.from_dict(copy.deepcopy(config)).to_dict()
    except Exception as error:  # the library raises many classes
        raise InputError(f"{file} describes no model: {' '.join(str(error).split())}") from error
    check_sizes(whole, file)


def known_fields(config: dict[str, Any], kind: type[transformers.PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a class of transformers has beyond those of every configuration."""
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    known = {field.name for field in dataclasses.fields(kind)} - base
    return {name: value for name, value in config.items() if name in known}


def to_transformers(config: dict[str, Any], special: dict[str, Any], source: Path) -> dict[str, Any]:
    """A checked config.json of the older layout in transformers' own."""
    thinker, file = config["thinker_config"], source / "config.json"
    text = thinker["text_config"]
    scaling = text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind not in ("default", "mrope"):
        raise InputError(f"{file}: thinker_config.text_config.rope_scaling is of type {kind!r}, not default")
    theta = text.get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        said = "is missing" if theta is None else f"is {theta!r}"
        raise InputError(f"{file}: thinker_config.text_config.rope_theta {said}; Qwen3-ASR has 1000000")
    tied = bool(text.get("tie_word_embeddings", False))  # the older class's default
    dtypes = (level.get(name) for level in (thinker, config) for name in ("dtype", "torch_dtype"))
    dtype = next((dtype for dtype in dtypes if dtype), None)
    top = known_fields(thinker, transformers.Qwen3ASRConfig)
    return {
        **top,
        **({"dtype": dtype} if dtype else {}),
        **{name: config[name] for name in ("transformers_version",) if name in config},
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "audio_config": {
            **known_fields(thinker["audio_config"], Qwen3ASREncoderConfig),
            "model_type": "qwen3_asr_encoder",
            "max_position_embeddings": POSITIONS_IN_CHUNK,
        },
        "text_config": {
            **known_fields(text, transformers.Qwen3Config),
            "model_type": "qwen3",
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": tied,
        },
        "tie_word_embeddings": tied,
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
    }


def to_thinker(config: dict[str, Any], special: dict[str, Any], source: Path) -> dict[str, Any]:
    """A checked config.json of transformers' layout in the older one."""
    file = source / "config.json"
    # Without the parts' types: the older library would load the weights in these, whatever type it is asked for.
    audio, text = ({n: v for n, v in config[part].items() if n != "dtype"} for part in ("audio_config", "text_config"))
    rope = text.pop("rope_parameters", None)
    if not isinstance(rope, dict) or type(rope.get("rope_theta")) not in (int, float):
        raise InputError(f"{file}: text_config.rope_parameters.rope_theta is missing; Qwen3-ASR has 1000000")
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{file}: text_config.rope_parameters are not plain RoPE, which the older layout needs")
    if text.get("use_sliding_window"):
        raise InputError(f"{file}: text_config.use_sliding_window is true, which the older layout cannot say")
    if audio.pop("max_position_embeddings", POSITIONS_IN_CHUNK) != POSITIONS_IN_CHUNK:
        raise InputError(f"{file}: audio_config.max_position_embeddings is not {POSITIONS_IN_CHUNK}")
    half = text["head_dim"] // 2
    third = half * 20 // 64  # [24, 20, 20] of 64: an utterance has one position, so that any three parts of it do
    dtype = {"dtype": config["dtype"]} if "dtype" in config else {}
    skipped = {"audio_config", "text_config", "eos_token_id", "pad_token_id", "tie_word_embeddings", "auto_map"}
    skipped |= {"architectures", "transformers_version"}
    return {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        **dtype,
        "model_type": "qwen3_asr",
        "thinker_config": {
            **{name: value for name, value in config.items() if name not in skipped},
            "model_type": "qwen3_asr_thinker",
            "audio_config": {
                **audio,
                "model_type": "qwen3_asr_audio_encoder",
                "num_hidden_layers": audio["encoder_layers"],
                "max_source_positions": 1500,
                "conv_chunksize": 500,
            },
            "text_config": {
                **text,
                "model_type": "qwen3_asr_text",
                "rope_theta": rope["rope_theta"],
                "rope_scaling": {
                    "rope_type": "default",
                    "type": "default",
                    "mrope_section": [half - 2 * third, third, third],
                    "mrope_interleaved": True,
                    "interleaved": True,
                },
                "tie_word_embeddings": config.get("tie_word_embeddings", True),
            },
            "audio_start_token_id": special["audio_start"],
            "audio_end_token_id": special["audio_end"],
        },
        **{name: config[name] for name in ("transformers_version",) if name in config},
    }


def generation_config(source: Path, special: dict[str, Any]) -> dict[str, Any]:
    """Greedy decoding that stops at both end tokens, whatever the source's file says of these."""
    file = source / "generation_config.json"
    given = read_json(file) if file.exists() else {}
    kept = {name: value for name, value in given.items() if name not in SAMPLING}
    if type(kept.get("max_new_tokens")) is not int or kept["max_new_tokens"] < 1:
        kept["max_new_tokens"] = MAX_NEW_TOKENS
    return kept | {"do_sample": False, "eos_token_id": special["eos"], "pad_token_id": special["pad"]}


# --------------------------------------------------------------------------------------------- Processor and tokenizer


def convert_processor(source: Path, folder: Path, to: Layout, audio: dict[str, Any]) -> None:
    """Feature extractor and chat template."""
    if to == "transformers":
        file = source / "preprocessor_config.json"
        given = _without_code(read_json(file))
        outer = {"processor_class": "Qwen3ASRProcessor", "timestamp_segment_time": 80}
        outer |= {name: given.pop(name) for name in ("processor_class", "timestamp_segment_time") if name in given}
        given = {"min_length": 8000, "n_window": audio["n_window"]} | given
        given["feature_extractor_type"] = "Qwen3ASRFeatureExtractor"
        written = {"feature_extractor": given, **outer}
        write_json(folder / "processor_config.json", written)
        (folder / "chat_template.jinja").write_text(chat_template(source), encoding="utf-8")
    else:
        file = source / "processor_config.json"
        outer = read_json(file)
        given = outer.pop("feature_extractor", None)
        if not isinstance(given, dict):
            raise InputError(f"{file}: feature_extractor is missing or no object")
        given["feature_extractor_type"] = "WhisperFeatureExtractor"
        write_json(folder / "preprocessor_config.json", _without_code(given | outer))
        write_json(folder / "chat_template.json", {"chat_template": chat_template(source)})
    if given.get("feature_size") != audio["num_mel_bins"]:
        raise InputError(f"{file}: feature_size is {given.get('feature_size')}, the model has {audio['num_mel_bins']}")


def chat_template(source: Path) -> str:
    """The chat template, wherever a library has put it."""
    if (source / "chat_template.jinja").exists():
        return (source / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (source / name).exists():
            template = read_json(source / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise InputError(f"{source} has no chat template (chat_template.json or chat_template.jinja)")


def convert_tokenizer(source: Path, folder: Path, to: Layout) -> tokenizers.Tokenizer:
    """Writes the tokenizer's files and returns it."""
    given = read_json(source / "tokenizer_config.json")
    if to == "thinker":
        tokenizer = load_tokenizer(source / "tokenizer.json")
        write_older_tokenizer(json.loads(tokenizer.to_str()), given, folder)
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        return tokenizer
    if (source / "special_tokens_map.json").exists():
        given = read_json(source / "special_tokens_map.json") | given
    if (source / "tokenizer.json").exists():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    else:
        build_tokenizer(source, given, folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for number, token in (given.pop("added_tokens_decoder", None) or {}).items():
        if tokenizer.token_to_id(token["content"]) != int(number):
            raise InputError(
                f"{source / 'tokenizer_config.json'}: {token['content']} is {number},"
                f" in the tokenizer {tokenizer.token_to_id(token['content'])}"
            )
    named = given.pop("extra_special_tokens", None) or {}
    if "additional_special_tokens" in given:
        given["extra_special_tokens"] = [text_of(token) for token in given.pop("additional_special_tokens") or []]
    named |= {name: given[name] for name in AUDIO_TOKENS if name in given}
    tokens = AUDIO_TOKENS | {name: text_of(token) for name, token in named.items()}
    given |= {"backend": "tokenizers", **tokens, "model_specific_special_tokens": tokens}
    if given.get("tokenizer_class") == "Qwen2TokenizerFast":  # tokenizer.json as it is
        given["tokenizer_class"] = "TokenizersBackend"
    given.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", _without_code(given))
    return tokenizer


def text_of(token: str | dict[str, Any]) -> str:
    """A special token's text: a configuration holds it alone or among its properties."""
    return token if isinstance(token, str) else token["content"]


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"{file} is not there or no tokenizer ({error})") from error


def build_tokenizer(source: Path, given: dict[str, Any], file: Path) -> None:
    """Makes tokenizer.json of vocab.json and merges.txt."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("vocab.json", "merges.txt"):
            if not (source / name).exists():
                raise InputError(f"{source} has no tokenizer.json, and no {name} to make it of")
            shutil.copyfile(source / name, Path(place, name))
        write_json(Path(place, "tokenizer_config.json"), _without_code(given))
        try:
            transformers.Qwen2Tokenizer.from_pretrained(place).backend_tokenizer.save(str(file))
        except Exception as error:  # of the tokenizers library
            raise InputError(f"{source}: vocab.json and merges.txt make no tokenizer ({error})") from error


def write_older_tokenizer(content: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """tokenizer_config.json and special_tokens_map.json, and the vocabulary apart where it is byte-pair encoded.

    Args:
        content: of tokenizer.json.
        given: tokenizer_config.json in transformers' layout.
    """
    given = dict(given)
    named = given.pop("model_specific_special_tokens", None) or {}
    tokens = AUDIO_TOKENS | {name: given[name] for name in AUDIO_TOKENS if name in given} | named
    if "extra_special_tokens" in given:
        given["additional_special_tokens"] = given.pop("extra_special_tokens")
    given["extra_special_tokens"] = tokens
    given.pop("backend", None)
    if given.get("tokenizer_class") == "TokenizersBackend":
        given["tokenizer_class"] = "Qwen2TokenizerFast"
    given["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in content["added_tokens"]
    }
    write_json(folder / "tokenizer_config.json", _without_code(given))
    named = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {name: given[name] for name in named if given.get(name)})
    model = content["model"]
    if model["type"] == "BPE":
        write_json(folder / "vocab.json", model["vocab"])
        lines = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")


def special_ids(tokenizer: tokenizers.Tokenizer, source: Path) -> dict[str, Any]:
    """Ids of the tokens that configurations name."""
    names = {"end": "<|im_end|>", "text_end": "<|endoftext|>"}
    names |= {"audio": "<|audio_pad|>", "audio_start": "<|audio_start|>", "audio_end": "<|audio_end|>"}
    ids = {key: tokenizer.token_to_id(token) for key, token in names.items()}
    for key, token in names.items():
        if ids[key] is None:
            raise InputError(f"{source}: the tokenizer has no {token}")
    return ids | {"eos": [ids["text_end"], ids["end"]], "pad": ids["end"]}


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "auto_map"}


# --------------------------------------------------------------------------------------------------------------- Files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises InputError where the file is not there or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
