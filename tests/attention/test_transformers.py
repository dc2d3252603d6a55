"""Models of the transformers library on our kernels, small and with random weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from torch.profiler import ProfilerActivity, profile

import udlkernels
from udlkernels import ArgumentError, testing
from udlkernels.attention import transformers_socket

transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")

pytestmark = pytest.mark.skipif(
    udlkernels._library._extension is None, reason="needs the C++ kernels"
)

WORDS = 99
SIZES = dict(
    vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=96, max_position_embeddings=64,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2, head_dim=16)
# The special tokens' usual numbers lie beyond this vocabulary.
PLAIN = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return transformers.T5EncoderModel, config


FAMILIES = {
    "llama": lambda: (
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED, **PLAIN),
    ),
    "bert": lambda: (
        transformers.BertModel,
        transformers.BertConfig(
            **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
    ),
    "mistral": lambda: (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**GROUPED, **PLAIN, sliding_window=7),
    ),
    "gemma2": lambda: (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            **GROUPED, **PLAIN, sliding_window=7, attn_logit_softcapping=2.0,
            query_pre_attn_scalar=16, tie_word_embeddings=False,
        ),
    ),
    # Both experts are always chosen: rounding cannot choose others.
    "gpt_oss": lambda: (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            **GROUPED, **PLAIN, sliding_window=7, num_local_experts=2, num_experts_per_tok=2,
        ),
    ),
    "t5": _t5,
}  # fmt: skip
# Terms that sums add up on the way through both layers, there and back, and over the tokens.
TERMS = 2 * 2 * (3 * 64 + 96) + 60
CAUSAL = ("llama", "mistral", "gemma2", "gpt_oss")


def _exact(
    module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float = 0.0, scaling: Any = None,
    softcap: Any = None, s_aux: Any = None, position_bias: Any = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What the models' own eager functions compute, which round the weights to float32."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if position_bias is None else s + position_bias
    s = s if mask is None else s.masked_fill(~mask, torch.finfo(s.dtype).min)
    if s_aux is not None:
        s = torch.cat((s, s_aux[:, None, None].expand(*s.shape[:3], 1)), -1)
    return (s.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2).contiguous(), None


def _whole_mask(*args: Any, **options: Any) -> torch.Tensor:
    return masking_utils.sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


@pytest.fixture(autouse=True)
def registered() -> None:
    udlkernels.attention.register()
    transformers.AttentionInterface.register("exact", _exact)
    transformers.AttentionMaskInterface.register("exact", _whole_mask)


@pytest.fixture
def active() -> Iterator[None]:
    activate_flash_attention_impl("udlkernels")
    yield
    restore_flash_attention_impl()


def _model(family: str, implementation: str = "eager") -> Any:
    """Weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]()
    model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif "sinks" in name:
                weight.normal_()
            if "key.bias" in name or "router.bias" in name:  # gradients that cancel to nothing
                weight.requires_grad_(False)
    model.set_attn_implementation(implementation)
    return model.train()


def _tokens(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


def _padding(tokens: torch.Tensor, side: str) -> torch.Tensor | None:
    """The mask of rows that are 0, 5, 10, ... tokens shorter."""
    if side == "none":
        return None
    at = torch.arange(tokens.shape[1])
    short = 5 * torch.arange(tokens.shape[0])[:, None]
    return (at >= short if side == "left" else at < tokens.shape[1] - short).long()


def _output(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The result at the tokens that are there, [tokens, ...]."""
    found = model(tokens, attention_mask=mask)[0]
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


def _run(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> testing.Results:
    out = _output(model, tokens, mask)
    (cotangent,) = testing.make_cotangents([out])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(out, weights, cotangent.to(out.dtype), allow_unused=True)
    return testing.Results([out.detach()], list(gradients))


def _oracle(model: Any) -> Any:
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("exact")
    return wide


def _check(ours: testing.Results, exact: testing.Results, peers: list[testing.Results]) -> None:
    others = [peer.outputs[0] for peer in peers]
    testing.check(ours.outputs[0], exact.outputs[0], others, reduction=TERMS)
    assert any(gradient is not None for gradient in exact.gradients)
    for i, (found, wanted) in enumerate(zip(ours.gradients, exact.gradients, strict=True)):
        if wanted is None or not bool(wanted.any()):
            assert found is None or not bool(found.any())
            continue
        others = [peer.gradients[i] for peer in peers]
        testing.check(found, wanted, others, f"gradient {i}", TERMS)


def _ops(fn: Any) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fn()
    return " ".join(event.key for event in profiler.key_averages())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_eager(family, side):
    tokens = _tokens()
    mask = _padding(tokens, side)
    model = _model(family)
    exact, peer = _run(_oracle(model), tokens, mask), _run(model, tokens, mask)
    model.set_attn_implementation("udlkernels")
    assert "udlkernels::attention_fwd" in _ops(lambda: _output(model, tokens, mask))
    _check(_run(model, tokens, mask), exact, [peer])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_that_know_nothing_of_us(active, family):
    tokens = _tokens()
    mask = _padding(tokens, "right") if family == "bert" else None
    model = _model(family)
    exact, peer = _run(_oracle(model), tokens, mask), _run(model, tokens, mask)
    model.set_attn_implementation("sdpa")
    assert "udlkernels::attention_fwd" in _ops(lambda: _output(model, tokens, mask))
    _check(_run(model, tokens, mask), exact, [peer])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_padding_holds_changes_nothing(family, side):
    model = _model(family, "udlkernels")
    tokens = _tokens()
    mask = _padding(tokens, side)
    other = torch.where(mask.bool(), tokens, WORDS - tokens)
    assert not torch.equal(other, tokens)
    assert torch.equal(_output(model, tokens, mask), _output(model, other, mask))
    assert not torch.equal(_output(model, tokens, None), _output(model, other, None))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_generation(family, side, cache):
    model = _model(family).eval()
    tokens = _tokens(2, 12)
    mask = _padding(tokens, side)

    def generate(implementation):
        model.set_attn_implementation(implementation)
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=15, min_new_tokens=15, do_sample=False,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip

    plain = "sdpa" if family in ("llama", "mistral") else "eager"
    ours = generate("udlkernels")
    assert ours.shape == (2, 27)
    assert torch.equal(ours, generate(plain))


@pytest.mark.parametrize("family", CAUSAL)
def test_prompt_in_pieces(family):
    model = _model(family, "udlkernels").eval()
    tokens = _tokens(2, 24)
    with torch.no_grad():
        whole = model(tokens).logits
        oracle = _oracle(model)(tokens).logits
        found, cache = [], transformers.DynamicCache(config=model.config)
        for piece in tokens.split([9, 5, 1, 9], dim=1):
            step = model(piece, past_key_values=cache)
            found.append(step.logits)
    testing.check(torch.cat(found, 1), oracle, [whole], reduction=TERMS)


def test_compiled_model():
    model = _model("llama", "udlkernels")
    tokens = _tokens()
    expected = _run(model, tokens, None)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens, use_cache=False)[0].flatten(0, 1)
    testing.check(out, expected.outputs[0].double(), [])
    assert "udlkernels::attention_fwd" in _ops(lambda: compiled(tokens, use_cache=False))


def test_dropout_follows_the_generator():
    config = transformers.LlamaConfig(**GROUPED, **PLAIN, attention_dropout=0.5)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="udlkernels")

    def draw(seed):
        torch.manual_seed(seed)
        return _output(model, _tokens(), None)

    model.train()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    model.eval()
    assert torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("queries", [1, 9])
def test_window_without_a_mask(queries):
    q, k, v = (testing.make((2, 2, n, 16), seed=n) for n in (queries, 9, 9))
    module = torch.nn.Module()
    out, weights = transformers_socket.attention_forward(module, q, k, v, None, sliding_window=3)
    assert weights is None and out.is_contiguous()
    i, j = torch.arange(9 - queries, 9)[:, None], torch.arange(9)
    expected, _ = transformers_socket.attention_forward(module, q, k, v, (j <= i) & (j > i - 3))
    testing.check(out, expected.double(), [])


@pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
def test_mask_beside_a_position_bias(boolean):
    q, k, v = (testing.make((2, 2, 9, 16), seed=seed) for seed in range(3))
    bias, seen = testing.make((1, 2, 9, 9), seed=3), testing.make((2, 1, 9, 9), seed=4) > -1
    mask = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    module = torch.nn.Module()
    out, _ = transformers_socket.attention_forward(module, q, k, v, mask, position_bias=bias)
    merged = bias.masked_fill(~seen, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), merged.double()
    )
    testing.check(out.transpose(1, 2), expected, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("sinks", torch.zeros(1, 2, 9, 1)),
        ("block_indices", torch.zeros(1)),
        ("block_table", torch.zeros(1)),
        ("read_index", [1]),
    ],
)
def test_what_we_cannot_serve_is_refused(name, value):
    q = torch.zeros(1, 2, 9, 16)
    module = torch.nn.Module()
    with pytest.raises(ArgumentError, match=rf"\[udlkernels\] {name}: expected"):
        transformers_socket.attention_forward(module, q, q, q, None, **{name: value})
    unset = {name: False if value is True else None, "position_ids": value}
    transformers_socket.attention_forward(module, q, q, q, None, **unset)


def test_missing_and_old_packages_are_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.masking_utils", None)
        with pytest.raises(ArgumentError, match="a version with AttentionMaskInterface"):
            udlkernels.attention.register_transformers()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"transformers.*udlkernels\[interop\]"):
        udlkernels.attention.register_transformers()


def test_register_does_not_import_transformers():
    code = (
        "import sys, udlkernels.attention as a; a.register();"
        "assert 'transformers' not in sys.modules;"
        "a.register_transformers(); from transformers import AttentionInterface as names;"
        "assert 'udlkernels' in names._global_mapping"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(udlkernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
