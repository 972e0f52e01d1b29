"""Self-speculation changes the time of greedy decoding and nothing else."""

from __future__ import annotations

import pytest
import torch

from pantarhei.compute.self_speculation import self_speculative
from pantarhei.errors import RequestError

transformers = pytest.importorskip("transformers", reason="needs pantarhei[transformers]")

DEPTHS = (2, 4)


def make(kind, agree):
    """A tiny random model; with ``agree`` its late blocks change little: exits are mostly right."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=128, n_embd=32, n_layer=6, n_head=4
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                # large enough that the continuation is not a constant token
                p.mul_(8 if "embed" not in name and "wte" not in name else 1)
            late = any(f".{k}." in name for k in (3, 4, 5))
            if agree and late and p.dim() > 1:
                p.mul_(0.05)
    return model.eval()


def greedy(model, prompt, n, **kwargs):
    return model.generate(prompt, max_new_tokens=n, do_sample=False, pad_token_id=0, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.5, 0.2), (2.0, 0.0), (2.0, 2.0)])
def test_greedy_output_is_that_of_the_full_model(kind, agree, thresholds):
    model = make(kind, agree)
    prompt = torch.randint(50, (1, 7), generator=torch.Generator().manual_seed(1))
    expected = greedy(model, prompt, 40, eos_token_id=None)
    found = self_speculative(model, prompt, depths=DEPTHS, thresholds=thresholds, max_new_tokens=40)
    assert torch.equal(found.tokens, expected)
    assert len(expected[0].unique()) > 3
    assert found.accepted <= found.drafted == sum(found.drafts)
    # every pass gives one token of its own and those that were accepted
    assert found.passes + found.accepted == 40
    if thresholds == (2.0, 2.0):
        assert found.drafted == 0 and found.passes == 40
    if thresholds == (2.0, 0.0):
        assert found.drafts[0] == 0 and found.drafts[1] > 0
    if thresholds == (0.0, 0.0):
        assert found.drafts[1] == 0 and (agree or found.drafted > found.accepted)
    if agree and thresholds == (2.0, 0.0):
        assert found.passes < 20  # drafts were right, and right drafts save passes


def test_nothing_stays_behind_in_the_model():
    model = make("llama", True)
    prompt = torch.tensor([[1, 2, 3]])
    before = {name: id(m) for name, m in model.named_modules()}
    first = self_speculative(model, prompt, depths=[3], max_new_tokens=5)
    again = self_speculative(model, prompt, depths=[3], max_new_tokens=5)
    assert torch.equal(first.tokens, again.tokens)
    assert {name: id(m) for name, m in model.named_modules()} == before


def test_ends_after_the_end_token_and_at_the_limit():
    model = make("llama", True)
    prompt = torch.tensor([[1, 2, 3]])
    whole = greedy(model, prompt, 30, eos_token_id=None)
    end = int(whole[0, 20])
    expected = greedy(model, prompt, 30, eos_token_id=end)
    options = {"depths": DEPTHS, "thresholds": (0.0, 0.0)}
    found = self_speculative(model, prompt, max_new_tokens=30, eos_token_id=end, **options)
    assert torch.equal(found.tokens, expected)
    for n in (0, 1, 2):
        assert self_speculative(model, prompt, max_new_tokens=n, **options).tokens.shape[1] == 3 + n


def test_bad_requests():
    model, prompt = make("gpt2", True), torch.tensor([[1, 2, 3]])
    for depths in ((), (0, 2), (2, 2), (4, 2), (6,)):
        with pytest.raises(RequestError, match="from 1 to 5"):
            self_speculative(model, prompt, depths=depths)
    with pytest.raises(RequestError, match="one for each"):
        self_speculative(model, prompt, depths=DEPTHS, thresholds=(0.5,))
    with pytest.raises(RequestError, match="one sequence"):
        self_speculative(model, prompt.repeat(2, 1), depths=DEPTHS)
    with pytest.raises(RequestError, match="layers="):
        self_speculative(torch.nn.Linear(2, 2), prompt, depths=DEPTHS)
    with pytest.raises(RequestError, match="norm="):
        self_speculative(model, prompt, depths=DEPTHS, norm="nothing")
