r"""Families of networks in any width and depth, to sweep and to measure scaling limits with.

Each is a factory: called with ``width=`` and ``depth=`` it returns a fresh ``nn.Module``;
``roles`` and ``branches`` are what :func:`pantarhei.learning.parametrization.parametrize` needs.
A function of your own serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from pantarhei.errors import RequestError, nearest
from pantarhei.learning._roles import Role


class Network(nn.Module):
    r"""The network of the literature on scaling limits, plain or residual, without biases.

    .. math:: h^1 = W^0 x, \quad h^{l+1} = \tau h^l + W^l \phi(h^l), \quad
              f = W^{out} \phi(h^{L+1})

    with the multipliers left to a parametrisation. ``layers`` :math:`> 1` makes branches of
    :math:`k` layers, :math:`W^{l,k} \phi(\cdots W^{l,1} \phi(h^l))`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int,
        skip: bool,
        layers: int,
        activation: Callable[[], nn.Module],
    ):
        super().__init__()
        self.skip = skip
        self.stem = nn.Linear(inputs, width, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    part
                    for _ in range(layers)
                    for part in (activation(), nn.Linear(width, width, bias=False))
                )
            )
            for _ in range(depth)
        )
        self.activation = activation()
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (B, outputs) of inputs (B, ...), which are flattened."""
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = h + block(h) if self.skip else block(h)
        return self.head(self.activation(h))


@dataclass(frozen=True)
class Networks:
    """Factory of :class:`Network`.

    >>> family = Networks(inputs=3, outputs=2, skip=True)
    >>> len(family(width=8, depth=4).blocks)
    4
    """

    inputs: int
    outputs: int
    skip: bool = False
    layers: int = 1
    activation: Callable[[], nn.Module] = nn.ReLU

    @property
    def roles(self) -> dict[str, Role]:
        """Which weights are input, hidden and output ones."""
        return {"stem.*": "input", "blocks.*": "hidden", "head.*": "output"}

    @property
    def branches(self) -> tuple[str, ...]:
        """The linear maps that end the residual branches, if the network has them."""
        return (f"blocks.*.{2 * self.layers - 1}",) if self.skip else ()

    def __call__(self, width: int = 64, depth: int = 2) -> Network:
        """Return a fresh network."""
        return Network(
            self.inputs, self.outputs, width, depth, self.skip, self.layers, self.activation
        )


@dataclass(frozen=True)
class Transformers:
    """Factory of Hugging Face language models: ``"gpt2"`` (causal) and ``"bert"`` (masked).

    ``head_size`` keeps the size of a head and lets their number grow; otherwise there are
    ``heads`` that grow. Dropout is off. Embeddings are tied. ``config`` holds further settings of
    the model's configuration. GPT-2's own initial weights shrink with its depth: compare with a
    base of the proxy's depth. BERT normalises after each residual sum, which the theory of depth
    does not cover.

    >>> family = Transformers("gpt2", heads=2, config={"vocab_size": 11, "n_positions": 8})
    >>> model = family(width=16, depth=3)  # doctest: +SKIP
    """

    architecture: Literal["gpt2", "bert"]
    heads: int = 4
    head_size: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in _BRANCHES:
            raise RequestError(
                f"architecture={self.architecture!r} is unknown: choose gpt2 or bert."
                f"{nearest(self.architecture, _BRANCHES)}"
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """The linear maps that end the residual branches."""
        return _BRANCHES[self.architecture]

    def __call__(self, width: int = 64, depth: int = 2) -> nn.Module:
        """Return a fresh model."""
        try:
            import transformers
        except ImportError:
            raise RequestError(
                "Hugging Face models need: pip install 'pantarhei[transformers]'."
            ) from None
        heads = self.heads if self.head_size is None else width // self.head_size
        if heads < 1 or width % heads:
            raise RequestError(
                f"width={width} cannot be shared by {heads} heads: choose a multiple of "
                f"{self.heads if self.head_size is None else self.head_size}."
            )
        kind: Any
        configuration: Any
        if self.architecture == "gpt2":
            sizes: dict[str, Any] = {"n_embd": width, "n_layer": depth, "n_head": heads}
            off: tuple[str, ...] = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
            kind, configuration = transformers.GPT2LMHeadModel, transformers.GPT2Config
        else:
            sizes = {"hidden_size": width, "num_hidden_layers": depth}
            sizes |= {"num_attention_heads": heads, "intermediate_size": 4 * width}
            off = ("hidden_dropout_prob", "attention_probs_dropout_prob")
            kind, configuration = transformers.BertForMaskedLM, transformers.BertConfig
        return kind(configuration(**{**dict.fromkeys(off, 0.0), **sizes, **self.config}))


_BRANCHES = {
    "gpt2": ("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"),
    "bert": (
        "bert.encoder.layer.*.attention.output.dense",
        "bert.encoder.layer.*.output.dense",
    ),
}
