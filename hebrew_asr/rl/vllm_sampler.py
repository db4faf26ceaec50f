"""Samples drawn by vLLM, for Round 3 on GPUs.

The trainer's own encoder hears the clips; vLLM gets the prompts as embeddings and runs the language model alone, which
is a plain Qwen3ForCausalLM, whatever names the speech model has in a version of vLLM. Written against vLLM's documented
interface (0.19.1 is the first release that allows transformers 5) and tried with a stand-in of it only, never on a GPU.
"""

import copy
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Qwen3ASRForConditionalGeneration
from transformers.utils.versions import require_version

from hebrew_asr.errors import InputError
from hebrew_asr.rl.rollouts import Drawn, Prompt, cut, embed, ends_of

NEEDED = "vllm>=0.19.1"


def check_installed() -> None:
    """Raises InputError without vLLM, or with one that is too old."""
    try:
        require_version(NEEDED)
    except ImportError as error:
        is_missing = isinstance(error, importlib.metadata.PackageNotFoundError)
        raise InputError(
            f"rollout_engine vllm: {'vLLM is not installed' if is_missing else error}. It needs a CUDA GPU and brings"
            f" its own PyTorch: install {NEEDED} in a copy of this project's environment and start that with torchrun,"
            " not with uv run, which would put the locked PyTorch back; or leave --rollout_engine out: transformers'"
            " generate samples then"
        ) from error


def language_model_weights(model: Qwen3ASRForConditionalGeneration) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's weights by their names in Qwen3ForCausalLM; a head that is tied is not among them."""
    for name, weight in model.model.language_model.named_parameters():
        yield f"model.{name}", weight.detach()
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight.detach()


class VllmSampler:
    """An engine in each process, beside the trainer on its GPU; it takes the trainer's weights before each rollout."""

    def __init__(
        self,
        model: Qwen3ASRForConditionalGeneration,
        padding: int,
        temperature: float,
        autocast: Callable,
        *,
        dtype: torch.dtype,
        memory_share: float,
        rank: int,
        processes: int,
    ):
        """`memory_share` of the GPU's memory is vLLM's, weights and cache."""
        self.model, self.padding, self.temperature, self.autocast = model, padding, temperature, autocast
        self.ends = ends_of(model, padding)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, to hand it weights
        import vllm

        self.sampling_params = vllm.SamplingParams
        self.dtype = dtype
        config = copy.deepcopy(model.config.text_config)
        config.architectures, config.tie_word_embeddings = ["Qwen3ForCausalLM"], model.config.tie_word_embeddings
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.engine = vllm.LLM(
                model=folder,
                load_format="dummy",  # `refresh` brings the weights
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                enable_prefix_caching=False,  # weights change under it
                async_scheduling=False,
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=memory_share,
                max_model_len=min(config.max_position_embeddings, 4096),
                logprobs_mode="processed_logprobs",  # after the temperature
                distributed_executor_backend="external_launcher" if processes > 1 else None,  # torchrun's processes
                seed=rank,
            )

    def refresh(self) -> None:
        """Gives the engine the trainer's weights as they are now."""
        weights = list(language_model_weights(self.model))

        def load(model: Any) -> None:
            model.load_weights(weights)

        self.engine.apply_model(load)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt]) -> list[list[Drawn]]:
        with self.autocast():
            embedded, mask = embed(self.model, prompts, self.padding)
        requests, parameters = [], []
        for prompt, row, is_prompt in zip(prompts, embedded, mask, strict=True):
            alone = row[is_prompt].to("cpu", self.dtype)
            for uniforms in prompt.uniforms:
                requests.append({"prompt_embeds": alone})
                parameters.append(
                    self.sampling_params(
                        temperature=self.temperature,
                        top_p=1.0,
                        top_k=0,
                        seed=int(uniforms[0] * 2**31),
                        max_tokens=len(uniforms),
                        stop_token_ids=sorted(self.ends),
                        logprobs=0,  # of the token that is drawn, and no others
                        detokenize=False,
                    )
                )
        outputs = iter(self.engine.generate(requests, parameters, use_tqdm=False))
        return [[self.drawn(next(outputs).outputs[0], len(uniforms)) for uniforms in p.uniforms] for p in prompts]

    def drawn(self, output: Any, limit: int) -> Drawn:
        tokens = list(output.token_ids)
        if output.finish_reason == "stop" and not (tokens and tokens[-1] in self.ends):
            raise RuntimeError("vLLM leaves out the token that ends a transcript: another version of it is needed")
        log_p = [of_token[token].logprob for token, of_token in zip(tokens, output.logprobs, strict=True)]
        return cut(tokens, log_p, limit, self.ends)
