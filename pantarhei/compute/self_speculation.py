"""A causal language model that drafts with its own first blocks and checks with all of them.

SortedNet's second contribution (arXiv 2309.00255 v3, named in the abstract; the procedure here is
the reading of the fact sheet): every token is drafted by the shallowest exit that is confident,
and one pass of the rest of the network verifies the whole draft. Nothing is computed twice: the
verification continues from the hidden states at the exits, and keys and values of the blocks that
the draft ran are kept. What comes out is, token by token, the full model's own greedy decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError

# Confidence asked of an exit by its relative depth (Sorted LLaMA, arXiv 2309.08968, thresholds).
THRESHOLDS = ((0.45, 0.95), (0.65, 0.9), (0.85, 0.8), (1.0, 0.7))
FIRST_DRAFT = 4


@dataclass(frozen=True)
class Speculated:
    """Generated tokens and how they came about.

    ``tokens``: prompt and continuation (1, T); ``drafted`` and ``accepted``: numbers of tokens;
    ``passes``: verifications, which is what runs the deep blocks one after the other;
    ``drafts``: how many tokens each exit drafted.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    passes: int
    drafts: tuple[int, ...]


@torch.no_grad()
def self_speculative(
    model: nn.Module,
    input_ids: Tensor,
    *,
    depths: Sequence[int],
    thresholds: Sequence[float] | None = None,
    max_new_tokens: int = 64,
    eos_token_id: int | None = None,
    layers: str | None = None,
    norm: str | None = None,
) -> Speculated:
    r"""Generate greedily, exactly as the full model would, in fewer passes of its deep blocks.

    Draft: at each position the exits after ``depths`` blocks (final norm and head on the hidden
    state) are asked in turn; the first with :math:`\max_v p(v) \ge \tau` gives the token. The draft
    ends after K tokens or when no exit is sure. Verification: all drafted positions run through the
    remaining blocks in one pass; the longest prefix that agrees with the full model's arg-max is
    kept, and one token of the full model's own. K starts at 4, grows by 2 when a whole draft was
    right and shrinks by 1 otherwise.

    Args:
        model: A Hugging Face causal language model (LLaMA, GPT-2 and the like) in evaluation mode.
        input_ids: The prompt (1, T).
        depths: Numbers of blocks after which a draft may exit, rising, below the model's depth.
        thresholds: A confidence for each depth; by default 0.95 for early exits to 0.7 for late.
        max_new_tokens: Tokens to generate at most.
        eos_token_id: Generation ends after this token.
        layers, norm: Names of the list of blocks and of the final norm inside the base model, where
            they are not found.

    Raises:
        RequestError: For depths, thresholds or a prompt that do not fit the model.
    """
    body = _Body(model, layers, norm, depths)
    confidence = _thresholds(thresholds, depths, body.depth)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise RequestError(
            f"The prompt has shape {tuple(input_ids.shape)}: give one sequence, (1, T) with T > 0."
        )
    tokens, prompt = input_ids, input_ids.shape[1]
    end = prompt + max_new_tokens
    length, drafts, drafted, accepted, passes = FIRST_DRAFT, [0] * len(depths), 0, 0, 0
    new = tokens
    while tokens.shape[1] < end:
        draft: list[Tensor] = []
        body.enter(new)
        while len(draft) < min(length, end - tokens.shape[1] - 1):
            exit, guess = body.guess(confidence)
            if guess is None:
                break
            drafts[exit] += 1
            draft.append(guess)
            body.enter(guess)
        wanted = body.verify(len(draft) + 1)
        passes += 1
        agree = _agreement(draft, wanted)
        new = wanted[:, agree : agree + 1]
        tokens = torch.cat([tokens, *draft[:agree], new], dim=1)
        body.forget(len(draft) - agree)
        drafted, accepted = drafted + len(draft), accepted + agree
        length = length + 2 if agree == len(draft) else max(1, length - 1)
        if eos_token_id is not None and eos_token_id in (said := tokens[0, prompt:].tolist()):
            tokens = tokens[:, : prompt + said.index(eos_token_id) + 1]
            break
    return Speculated(tokens, drafted, accepted, passes, tuple(drafts))


def _agreement(draft: list[Tensor], wanted: Tensor) -> int:
    """Return how many drafted tokens, from the first on, are the full model's."""
    if not draft:
        return 0
    same = torch.cat(draft, dim=1)[0] == wanted[0, :-1]
    return int(same.long().cumprod(0).sum())


class _Body:
    """A model cut at the exits, with the hidden states that wait at each of them.

    ``waiting[i]`` holds, for the positions that have come as far as cut i and no further, the
    hidden states there. Blocks see positions in order, each once, so that their keys and values are
    those of an ordinary pass whatever the draft did.
    """

    def __init__(
        self, model: nn.Module, layers: str | None, norm: str | None, depths: Sequence[int]
    ) -> None:
        base, blocks, self.norm_name = _find(model, layers, norm)
        self.depth = len(blocks[1])
        rising = list(depths) == sorted(set(depths))
        if not depths or not rising or depths[0] < 1 or depths[-1] >= self.depth:
            raise RequestError(
                f"depths={tuple(depths)} do not fit this model: name rising numbers of blocks from "
                f"1 to {self.depth - 1}."
            )
        self.norm = base.get_submodule(self.norm_name)
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        bounds = [0, *depths, self.depth]
        self.first = bounds[:-1]
        self.parts = [
            _part(base, blocks[0], self.norm_name, list(blocks[1])[a:b], a > 0)
            for a, b in pairwise(bounds)
        ]
        self.cache = _cache()
        self.waiting: list[Tensor | None] = [None] * (len(self.parts) + 1)

    def _run(self, part: int, **inputs: Tensor) -> None:
        """Run a part on hidden states (or token ids) and let the result wait behind it."""
        self.cache.first = self.first[part]
        module, given = self.parts[part]
        if given is not None:
            given.hidden = inputs["inputs_embeds"]
        out = module(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state
        before = self.waiting[part + 1]
        self.waiting[part + 1] = out if before is None else torch.cat([before, out], dim=1)

    def enter(self, ids: Tensor) -> None:
        """Take new tokens as far as the first exit."""
        self._run(0, input_ids=ids)

    def _advance(self, cut: int) -> None:
        """Take everything that waits at a cut through the next part, in one pass."""
        hidden, self.waiting[cut] = self.waiting[cut], None
        if hidden is not None:
            self._run(cut, inputs_embeds=hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden)).float()

    def guess(self, confidence: Sequence[float]) -> tuple[int, Tensor | None]:
        """Return the first sure exit and its token (1, 1) for the last position; None if none."""
        for cut, threshold in enumerate(confidence, start=1):
            if cut > 1:
                self._advance(cut - 1)
            hidden = self.waiting[cut]
            assert hidden is not None
            best, token = self._scores(hidden[:, -1:]).softmax(-1).max(-1)
            if best.item() >= threshold:
                return cut - 1, token
        return len(confidence), None

    def verify(self, n: int) -> Tensor:
        """Take all positions to the end; return the full model's next tokens of the last ``n``."""
        for cut in range(1, len(self.parts)):
            self._advance(cut)
        hidden, self.waiting[-1] = self.waiting[-1], None
        assert hidden is not None
        return self._scores(hidden[:, -n:]).argmax(-1)

    def forget(self, n: int) -> None:
        """Drop the last ``n`` positions, whose tokens were wrong."""
        for layer in self.cache.layers if n else ():
            layer.keys, layer.values = layer.keys[..., :-n, :], layer.values[..., :-n, :]


class _Given(nn.Module):
    """Stands before the first block of a later part: hands it the hidden states that waited.

    The model's own forward still embeds positions and builds the mask, but its input is not used.
    """

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return the hidden states."""
        return self.hidden


def _part(
    base: nn.Module, layers: str, norm: str, blocks: list[nn.Module], later: bool
) -> tuple[nn.Module, _Given | None]:
    """Return the base model with some of its blocks and no final norm; ``base`` is not changed."""
    part, given = copy.copy(base), _Given() if later else None
    start: list[nn.Module] = [] if given is None else [given]
    part._modules = {**base._modules, layers: nn.ModuleList(start + blocks), norm: nn.Identity()}
    return part, given


def _find(
    model: nn.Module, layers: str | None, norm: str | None
) -> tuple[nn.Module, tuple[str, nn.ModuleList], str]:
    """Return the base model, its list of blocks with its name, and the name of its final norm."""
    base = getattr(model, "base_model", None)
    modules = getattr(base, "_modules", {})
    lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList)}
    layers = layers or max(lists, key=lambda name: len(lists[name]), default="")
    if base is None or layers not in lists or not hasattr(model, "get_output_embeddings"):
        raise RequestError(
            f"{type(model).__name__} is not a causal language model with a list of blocks in its "
            f"base model (lists found: {', '.join(lists) or 'none'}): name it with layers=."
        )
    behind = list(modules)[list(modules).index(layers) :]
    norms = [name for name in behind if "norm" in type(modules[name]).__name__.lower()]
    norm = norm or next(iter(norms), "")
    if norm not in modules:
        raise RequestError(
            f"The final norm of {type(base).__name__} was not found: name it with norm=."
        )
    return base, (layers, lists[layers]), norm


def _cache() -> Any:
    """Return a key-value cache that answers for the part that runs."""
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise RequestError(
            "Language models need an extra: pip install 'pantarhei[transformers]'."
        ) from error

    class Cache(DynamicCache):
        first = 0  # block whose length tells which positions are next

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return super().get_seq_length(self.first)

        def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
            return super().get_mask_sizes(query, self.first)

    return Cache()


def _thresholds(
    given: Sequence[float] | None, depths: Sequence[int], blocks: int
) -> Sequence[float]:
    if given is None:
        return [next(tau for upto, tau in THRESHOLDS if d / blocks <= upto) for d in depths]
    if len(given) != len(depths):
        raise RequestError(
            f"There are {len(given)} thresholds for {len(depths)} depths: give one for each."
        )
    return given
