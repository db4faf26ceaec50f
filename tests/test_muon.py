"""Muon moves matrices as PyTorch's own does, AdamW all else; over processes, shards and a resumption it is the same."""

import dataclasses

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file

from hebrew_asr.checkpoints import store
from hebrew_asr.model.muon import Muon, by_muon, exchanged, numbers_within, operations, orthogonal
from hebrew_asr.training.run_folder import changes, folder_of
from train_hebrew_asr_enhanced import main

SHAPES = ((12, 12), (8, 20), (20, 8))


def drawn(seed: int, shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_matrices_move_as_those_of_torchs_muon_and_the_rest_as_those_of_adamw():
    matrices, theirs = drawn(0), drawn(0)
    rest, others = drawn(1, [(9,), (7, 5)]), drawn(1, [(9,), (7, 5)])
    decay = {"lr": 1.0, "weight_decay": 0.1}
    groups = [decay | {"params": matrices, "matrices": True}, decay | {"params": rest, "matrices": False}]
    mine = Muon(groups, lr=1.0)
    known = [
        torch.optim.Muon(theirs, lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, weight_decay=0.1),
    ]
    for step in range(6):
        for group in [*mine.param_groups, *(group for one in known for group in one.param_groups)]:
            group["lr"] = 0.01 / (step + 1)
        gradients = drawn(10 + step, [tensor.shape for tensor in (*matrices, *rest)])
        if step == 3:
            gradients[1] = gradients[-1] = None  # as those of a frozen part
        for tensors in ((*matrices, *rest), (*theirs, *others)):
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = None if gradient is None else gradient.clone()
        for optimizer in (mine, *known):
            optimizer.step()
    for tensor, other in zip((*matrices, *rest), (*theirs, *others), strict=True):
        assert torch.equal(tensor, other)
    assert {tuple(state) for tensor, state in mine.state.items() if any(tensor is m for m in matrices)} == {
        ("momentum_buffer",)
    }


@pytest.mark.parametrize("shape", [(64, 64), (32, 200), (200, 32)])
def test_a_matrix_is_made_orthogonal_about_its_own_directions(shape):
    matrix = drawn(3, [shape])[0]
    found = orthogonal([matrix.bfloat16()])[0].float()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    along = u.T @ found @ v.T  # in the matrix's own directions: about the unit matrix
    assert ((along.diagonal() > 0.5) & (along.diagonal() < 1.3)).float().mean() > 0.95
    assert (along - torch.diag(along.diagonal())).abs().max() < 0.1
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        orthogonal([matrix.bfloat16()])
    assert operations(shape) == counter.get_total_flops()


@pytest.mark.parametrize("at_once", [1, 400, 2**24])
def test_matrices_that_are_alike_come_out_of_one_call_as_each_alone(monkeypatch, at_once):
    monkeypatch.setattr("hebrew_asr.model.muon.AT_ONCE", at_once)
    matrices = [matrix.bfloat16() for matrix in drawn(6, [(20, 8), (8, 20), (8, 20), (16, 10), (12, 12), (20, 8)])]
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        assert found.shape == matrix.shape
        assert torch.allclose(found.float(), orthogonal([matrix])[0].float(), atol=0.02)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_three_processes_have_all_matrices_after_one_exchange(monkeypatch, count):
    like = [matrix.bfloat16() for matrix in drawn(4, [(9, 4), (4, 8), (5, 5), (3, 2), (2, 1)][:count])]
    made = [2 * matrix for matrix in like]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda received, mine: sent.append(mine))
    for rank in range(3):
        exchanged(made[rank::3], like, rank, 3)
    monkeypatch.setattr(
        torch.distributed, "all_gather_into_tensor", lambda received, mine: received.copy_(torch.cat(sent))
    )
    for rank in range(3):
        found = exchanged(made[rank::3], like, rank, 3)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, made, strict=True))


def test_matrices_that_move_at_once_are_as_many_as_memory_has_place_for(monkeypatch):
    assert [numbers_within(limit, [8, 4, 4]) for limit in (7, 8, 12, 15, 16)] == [1, 1, 2, 2, 3]
    moved = []
    matrices = drawn(5)
    for matrix in matrices:
        matrix.grad = matrix.clone()
    muon = Muon([{"params": matrices, "matrices": True}], lr=0.1)
    monkeypatch.setattr("hebrew_asr.model.muon.BUCKET", 310)
    monkeypatch.setattr(Muon, "move", lambda self, moving: moved.append([tuple(m.shape) for m, _ in moving]))
    muon.step()
    assert moved == [[(8, 20)], [(20, 8), (12, 12)]]


def test_tables_norms_and_convolutions_are_not_its(model):
    its = {name for name, parameter in model.named_parameters() if by_muon(name, parameter.dim())}
    assert not any("embed_tokens" in name or "lm_head" in name or "norm" in name or "conv2d" in name for name in its)
    assert {"model.language_model.layers.0.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.weight"} <= its
    assert by_muon("model.layers.0.embed_tokens_proj.weight", 2) and not by_muon("lm_head.weight", 2)


def test_a_run_of_before_keeps_its_folder_and_does_not_go_on_with_another_optimizer(config):
    config.output_dir = None
    before = {name: value for name, value in config.identity().items() if name != "optimizer"}
    muon = dataclasses.replace(config, optimizer="muon")
    assert folder_of(config).name == f"hebrew-asr-{store.fingerprint(before)}" != folder_of(muon).name
    assert changes(before, config) == [] and changes(before, muon) == ["optimizer: adamw → muon"]
    assert changes(muon.identity(), config) == ["optimizer: muon → adamw"]


def test_a_run_goes_on_in_the_same_bits(corpus, heldout, tmp_path):
    def settings(name: str, **changed):
        config = dataclasses.replace(small_config(corpus, heldout, tmp_path / name), optimizer="muon")
        return dataclasses.replace(config, max_steps=8, save_steps=5, save_total_limit=100, **changed)

    main(settings("whole"))
    main(settings("again", resume=str(tmp_path / "whole" / "checkpoints" / "step-00000005")))
    mine, theirs = (store.names(tmp_path / name / "checkpoints")[0] for name in ("again", "whole"))
    assert mine.name == theirs.name == "step-00000008"
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(mine / file), load_file(theirs / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    moments = {name.rpartition("/")[2] for name in one if ".up_proj.weight/" in name}
    assert moments == {"momentum_buffer"} and any(name.endswith("up_proj.weight/momentum_buffer") for name in one)
