"""Small models and the invariants that hold for every model and every choice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from pantarhei.cost import profile
from pantarhei.elastic import Choice, ElasticNet

torch.set_num_threads(1)


# --- invariants -------------------------------------------------------------------------------


def leaves(output: Any) -> list[Tensor]:
    """All tensors in an output: a tensor, a tuple, a dict or a data class."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two outputs hold the same numbers, bit for bit."""
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that wrapping and running must not change."""
    tensors = {n: (t, t.detach().clone()) for n, t in module.state_dict(keep_vars=True).items()}
    facts = {
        path: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), list(vars(m)))
        for path, m in module.named_modules()
    }
    numbers = {
        (path, name): value
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, int | float | tuple | str)
    }
    return {"tensors": tensors, "facts": facts, "numbers": numbers}


def unchanged(before: dict[str, Any], module: nn.Module) -> bool:
    after = snapshot(module)
    return (
        before["facts"] == after["facts"]
        and before["numbers"] == after["numbers"]
        and before["tensors"].keys() == after["tensors"].keys()
        and all(
            t is after["tensors"][n][0] and torch.equal(old, t)
            for n, (t, old) in before["tensors"].items()
        )
    )


def some_choices(net: ElasticNet, n: int = 6) -> list[Choice]:
    """The ends, a chain between them, the corners of each axis, and a sample."""
    space = net.space
    if len(space) <= n:
        return list(space)
    corners = [space.largest.replace(**{a: v[0]}) for a, v in space.axes.items()]
    return list(dict.fromkeys([*space.chain(3), *corners, *space.sample(2, seed=1)]))


def check(
    model: nn.Module, net: ElasticNet, *args: Any, choices: Any = None, **kwargs: Any
) -> ElasticNet:
    """Hold the invariants of the design for some choices of ``net``; all in evaluation mode."""
    n = net.batch
    with torch.no_grad():
        assert same(net(*args, **kwargs), model.eval()(*args, **kwargs)), "largest == original"
        for choice in choices or some_choices(net):
            sub = net.extract(choice).eval()
            assert same(net(*args, choice=choice, **kwargs), sub(*args, **kwargs)), str(choice)
            cost, seen = net.cost(choice), profile(sub, *args, **kwargs)
            assert (cost.macs * n, cost.params, cost.bytes) == (seen.macs, seen.params, seen.bytes)
            assert no_trace(sub)
        check_storage(net)
        check_monotone(net)
    return net


def no_trace(module: nn.Module) -> bool:
    """Whether a module keeps nothing of this library."""
    return not any(
        type(value).__module__.startswith("pantarhei")
        for m in module.modules()
        for value in (m, *vars(m).values())
    )


def inside(net: ElasticNet, choice: Choice, name: str) -> Tensor:
    """Which elements of one of the model's parameters a choice keeps, as a mask of its shape."""
    full = net.tensors()[f"model.{name}"]
    mask = torch.ones_like(full, dtype=torch.bool)
    for cut in net.plan(choice).cuts.get(f"model.{name}", ()):
        kept = torch.zeros(full.shape[cut.axis], dtype=torch.bool)
        index = cut.index
        kept[index if index is not None else slice(cut.start, cut.start + cut.length)] = True
        mask &= kept.view([-1 if d == cut.axis else 1 for d in range(full.dim())])
    return mask


def check_storage(net: ElasticNet) -> None:
    """A choice's tensors are views of the full ones wherever the kept channels are contiguous."""
    plan = net.plan(net.space.smallest)
    with net.body(plan) as body:
        for name, tensor in net.tensors().items():
            path, slot = net.slots[name][0]
            bound = {**body.index[path]._parameters, **body.index[path]._buffers}[slot]
            if all(cut.index is None for cut in plan.cuts.get(name, ())):
                assert bound.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def check_monotone(net: ElasticNet) -> None:
    """Costs never fall along a nested chain, nor along one axis."""
    space, top = net.space, net.space.largest
    chains = [space.chain(max(map(len, space.axes.values())))]
    chains += [[top.replace(**{a: v}) for v in values] for a, values in space.axes.items()]
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            assert a <= b
            small, large = net.cost(a), net.cost(b)
            assert small.macs <= large.macs
            assert small.params <= large.params
            assert small.bytes <= large.bytes


# --- Hugging Face models, tiny and with random weights ----------------------------------------

IMAGE = {"num_labels": 5, "image_size": 32}
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
          "intermediate_size": 24, "patch_size": 16}  # fmt: skip
BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 5}  # fmt: skip
LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 4, "intermediate_size": 32}  # fmt: skip
HEADED = {"width": (0.5, 1.0), "depth": (1, 3), "heads": (0.5, 1.0), "mlp": (0.25, 1.0)}
STAGED = {"width": (0.25, 0.6, 1.0), "depth": (0.5, 1.0)}
HUGGING = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", STAGED,
               {"layer_type": "basic", "depths": [2, 3], "hidden_sizes": [12, 16],
                "embedding_size": 8, "num_labels": 5}),
    "resnet-bottleneck": ("ResNetForImageClassification", "ResNetConfig", STAGED,
                          {"layer_type": "bottleneck", "depths": [2, 2], "hidden_sizes": [16, 32],
                           "embedding_size": 8, "num_labels": 5}),
    "mobilenetv2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", STAGED,
                    {"depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4, **IMAGE}),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config",
                   STAGED | {"mlp": (0.5, 1.0)},
                   {"depths": [2, 2], "hidden_sizes": [8, 16], "num_stages": 2, **IMAGE}),
    "regnet-x": ("RegNetForImageClassification", "RegNetConfig", STAGED,
                 {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 8,
                  "groups_width": 4, "layer_type": "x", "num_labels": 5}),
    "regnet-y": ("RegNetForImageClassification", "RegNetConfig", STAGED,
                 {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 8,
                  "groups_width": 4, "layer_type": "y", "num_labels": 5}),
    "vit": ("ViTForImageClassification", "ViTConfig", HEADED, VISION | IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", HEADED, VISION | IMAGE),
    "swin": ("SwinForImageClassification", "SwinConfig", HEADED | {"depth": (1, 2)},
             {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
              "patch_size": 2, **IMAGE}),
    "bert": ("BertForSequenceClassification", "BertConfig", HEADED, BERT | TOKENS),
    "bert-tied": ("BertForMaskedLM", "BertConfig", HEADED, BERT | TOKENS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", HEADED, LLAMA | TOKENS),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", HEADED,
                   LLAMA | TOKENS | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", HEADED,
             TOKENS | {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 16}),
}  # fmt: skip


def hugging(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model of :data:`HUGGING` in evaluation mode, keyword inputs for it, and its axes."""
    transformers = pytest.importorskip("transformers", reason="needs pantarhei[transformers]")
    transformers.logging.set_verbosity_error()
    model, config, axes, settings = HUGGING[name]
    torch.manual_seed(seed)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    for module in built.modules():  # statistics that matter
        if isinstance(module, nn.modules.batchnorm._NormBase):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    if "vocab_size" in settings:
        ids = torch.randint(3, 40, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        return built, {"input_ids": ids, "attention_mask": mask}, axes
    return built, {"pixel_values": torch.randn(2, 3, 32, 32)}, axes


class UNet(nn.Module):
    """Two levels down and up, joined by concatenation."""

    def __init__(self, norm: str, c: int = 8) -> None:
        super().__init__()
        make = {"group": lambda n: nn.GroupNorm(4, n), "batch": nn.BatchNorm2d}[norm]

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), make(o), nn.SiLU())

        self.down1, self.down2, self.middle = block(3, c), block(c, 2 * c), block(2 * c, 4 * c)
        self.up2, self.join2 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), block(4 * c, 2 * c)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * c, c, 2, 2), block(2 * c, c)
        self.out = nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        a = self.down1(x * scale)
        b = self.down2(F.max_pool2d(a, 2))
        m = self.middle(F.max_pool2d(b, 2))
        d = self.join2(torch.cat([b, self.up2(m)], 1))
        return {"image": self.out(self.join1(torch.cat([self.up1(d), a], 1)))}
