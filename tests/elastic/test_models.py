"""Real architectures: what the design promises holds for each of them, along every axis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import HUGGING, UNet, check, hugging, leaves, same, snapshot, unchanged

import pantarhei as pr
from pantarhei.elastic import Choice


@pytest.mark.parametrize("name", HUGGING)
def test_hugging_face(name: str) -> None:
    model, inputs, axes = hugging(name)
    before = snapshot(model)
    net = pr.elastic(model, inputs, **axes)
    check(model, net, **inputs)
    assert set(net.space.axes) == set(axes)
    assert unchanged(before, model)
    largest, smallest = net.cost(), net.cost(net.space.smallest)
    assert smallest.macs < 0.5 * largest.macs
    assert smallest.params < 0.6 * largest.params


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_unet(norm: str) -> None:
    model, x = UNet(norm).eval(), torch.randn(2, 3, 16, 16)
    before = snapshot(model)
    net = pr.elastic(model, x, width=(0.25, 0.5, 1.0))
    check(model, net, x)
    check(model, net, x, scale=0.5)
    assert unchanged(before, model)
    assert len(net.groups) == 7
    assert net.cost(net.space.smallest).macs < 0.2 * net.cost().macs
    # The second half of what a concatenation feeds is not contiguous: it is gathered, not viewed.
    cuts = net.plan(net.space.smallest).cuts
    assert [c.index is None for c in cuts["model.join2.0.weight"]] == [True, False]


def test_every_group_by_itself() -> None:
    model, inputs, _ = hugging("resnet")
    net = pr.elastic(model, inputs, width=pr.elastic.Sized((0.5, 1.0), per_group=True))
    assert len(net.space.axes) == len(net.groups) == 8
    check(model, net, choices=net.space.sample(3, seed=2), **inputs)


def test_grouped_queries_keep_their_ratio() -> None:
    model, inputs, _ = hugging("llama")
    net = pr.elastic(model, inputs, heads=(0.25, 1.0))
    sub = net.extract(Choice(heads=0.25))
    attention = sub.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (8, 32)  # 2 of 8 query heads of 4 channels
    assert attention.k_proj.weight.shape == (4, 32)  # 1 of 4 key-value heads


def test_tied_weights_stay_tied() -> None:
    model, inputs, _ = hugging("llama-tied")
    sub = pr.elastic(model, inputs, width=(0.5, 1.0)).extract(Choice(width=0.5))
    assert sub.lm_head.weight is sub.model.embed_tokens.weight
    assert sub.lm_head.weight.shape == (40, 16)


def test_pruning_by_another_library_agrees() -> None:
    """Torch-Pruning cuts the same channels out of a copy: an oracle that knows nothing of views."""
    tp = pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    for name in ("resnet", "mobilenetv2"):
        model, inputs, _ = hugging(name)
        net = pr.elastic(model, inputs, width=(0.25, 0.5, 1.0))
        for ratio in (0.25, 0.5):
            choice = Choice(width=ratio)
            ours = net.extract(choice)
            theirs, _, _ = hugging(name)
            wanted = dict(ours.named_parameters())
            graph = tp.DependencyGraph().build_dependency(
                theirs, example_inputs=inputs, forward_fn=lambda m, x: m(**x).logits
            )
            for path, module in list(theirs.named_modules()):
                if not isinstance(module, nn.Conv2d):
                    continue
                keep = wanted[f"{path}.weight"].shape[0]
                gone = list(range(keep, module.weight.shape[0]))
                if gone:
                    cut = tp.prune_depthwise_conv_out_channels if module.groups > 1 else (
                        tp.prune_conv_out_channels
                    )  # fmt: skip
                    graph.get_pruning_group(module, cut, idxs=gone).prune()
            shapes = {n: p.shape for n, p in theirs.named_parameters()}
            assert shapes == {n: p.shape for n, p in wanted.items()}
            with torch.no_grad():
                assert same(net(**inputs, choice=choice).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_an_extracted_network_stands_alone(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, inputs, axes = hugging(name)
    net = pr.elastic(model, inputs, **axes)
    choice = net.space.smallest
    sub, x = net.extract(choice), inputs["pixel_values"]
    with torch.no_grad():
        wanted = net(**inputs, choice=choice).logits
    safetensors.save_file(sub.state_dict(), tmp_path / "sub.safetensors")
    again = pr.elastic(hugging(name, seed=1)[0], inputs, **axes).extract(choice)
    assert not same(again(x).logits, wanted)
    again.load_state_dict(safetensors.load_file(tmp_path / "sub.safetensors"))
    assert same(again(x).logits, wanted)
    assert same(torch.compile(sub, backend="eager")(x).logits, wanted)
    exported = torch.export.export(sub, (x,))
    assert torch.allclose(leaves(exported.module()(x))[0], wanted, atol=1e-5)
    # its weights are its own
    next(sub.parameters()).data.zero_()
    with torch.no_grad():
        assert same(net(**inputs, choice=choice).logits, wanted)


def onnx_answer(module: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    pytest.importorskip("onnxscript", reason="needs pantarhei[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs pantarhei[onnx]")
    torch.onnx.export(module, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [name] = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_onnx(name: str, tmp_path: Path) -> None:
    model, inputs, axes = hugging(name)
    net = pr.elastic(model, inputs, **axes)
    choice = net.space.smallest
    with torch.no_grad():
        wanted = net(**inputs, choice=choice).logits
    got = onnx_answer(net.extract(choice), inputs["pixel_values"], tmp_path / "sub.onnx")
    assert torch.allclose(got, wanted, atol=1e-5)


def test_onnx_of_an_exit(tmp_path: Path) -> None:
    model, inputs, _ = hugging("vit")
    net = pr.elastic(model, inputs, exits=("vit.layers.0", "vit.layers.1"), width=(0.5, 1.0))
    choice = Choice(width=0.5, exit=2)
    with torch.no_grad():
        wanted = net(**inputs, choice=choice)
    got = onnx_answer(net.extract(choice), inputs["pixel_values"], tmp_path / "exit.onnx")
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_exits_and_depth(name: str) -> None:
    model, inputs, _ = hugging(name)
    exits = {
        "resnet": ("resnet.encoder.stages.0", "resnet.encoder.stages.1.layers.1"),
        "vit": ("vit.layers.0", "vit.layers.1"),
        "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    }[name]
    net = pr.elastic(model, inputs, width=(0.5, 1.0), depth=(1, 3), exits=exits)
    picks = [net.space.smallest, Choice(width=0.5, depth=1, exit=2), net.space.largest]
    check(model, net, choices=[*picks, Choice(width=1.0, depth=1, exit=3)], **inputs)
    assert net.space.axes["exit"] == (1, 2, 3)
    costs = [net.cost(Choice(width=1.0, depth=3, exit=e)).macs for e in (1, 2, 3)]
    assert costs == sorted(set(costs))
