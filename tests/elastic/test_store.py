"""A saved elastic network comes back whole, and what is damaged is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pantarhei.elastic import Choice, Sized, elastic, load, save
from pantarhei.errors import RequestError


def build(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


X = torch.randn(4, 3, 8, 8)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[object, Path]:
    torch.manual_seed(0)
    net = elastic(build(), X, width=Sized((0.5, 1.0), divisor=2), exits=("3",)).eval()
    net.recalibrate(Choice(width=0.5), [X, 2 * X])
    save(net, tmp_path / "net")
    return net, tmp_path / "net"


def test_comes_back_whole(saved) -> None:
    net, folder = saved
    again = load(folder, build()).eval()
    assert again.space.axes == net.space.axes
    assert list(again.statistics) == list(net.statistics)
    for choice in net.space:
        assert torch.equal(again(X, choice), net(X, choice))
        assert again.cost(choice) == net.cost(choice)


def test_others_may_read_it(saved) -> None:
    _, folder = saved
    (folder / "new").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_recalibrated_statistics_matter(saved) -> None:
    net, folder = saved
    without = load(folder, build()).eval()
    without.statistics.clear()
    small = Choice(width=0.5)
    assert not torch.equal(without(X, small), net(X, small))


def test_switchable_norms_come_back(tmp_path: Path) -> None:
    net = elastic(build(), X, width=(0.5, 1.0), norm="switchable")
    net(2 * X + 1, Choice(width=0.5))  # training mode: only this choice's statistics move
    net.eval()
    save(net, tmp_path)
    again = load(tmp_path, build()).eval()
    for choice in net.space:
        assert torch.equal(again(X, choice), net(X, choice))


def test_keywords_and_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 32, (2, 5)), "use_cache": False}
    net = elastic(
        transformers.LlamaForCausalLM(config).eval(), inputs, mlp=(0.5, 1.0), depth=(1, 2)
    )
    save(net, tmp_path)
    again = load(tmp_path, transformers.LlamaForCausalLM(config).eval())
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    for choice in net.space:
        assert torch.equal(
            net(choice=choice, **inputs).logits, again(choice=choice, **inputs).logits
        )


def test_no_pickle_on_disk(saved) -> None:
    _, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["elastic.json", "weights.safetensors"]
    assert json.loads((folder / "elastic.json").read_text())["model"] == "Sequential"


@pytest.mark.parametrize("name", ["weights.safetensors", "elastic.json"])
def test_damage_is_refused(saved, name: str) -> None:
    _, folder = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=name):
        load(folder, build())
    (folder / name).unlink()
    with pytest.raises(RequestError, match="does not exist"):
        load(folder, build())


def test_damaged_description_is_refused(saved) -> None:
    _, folder = saved
    described = json.loads((folder / "elastic.json").read_text())
    for key in ("axes", "exits", "example", "statistics", "norm"):
        broken = {k: v for k, v in described.items() if k != key}
        (folder / "elastic.json").write_text(json.dumps(broken))
        with pytest.raises(RequestError, match="damaged"):
            load(folder, build())


def test_another_model_is_refused(saved) -> None:
    _, folder = saved
    with pytest.raises(RequestError, match="same settings"):
        load(folder, build(width=16))
    with pytest.raises(RequestError):
        load(folder, nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)))
