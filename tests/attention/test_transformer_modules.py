"""MultiheadAttention and the transformer's modules: torch.nn's, on our kernels."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import udlkernels
from tests.support import assert_compiles
from udlkernels import nn, testing

BATCH, LENGTH, MEMORY, WIDTH, HEADS, HIDDEN = 3, 6, 8, 16, 4, 24
OPS = ("attention_fwd", "attention_bwd")
NATIVE = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}


@contextlib.contextmanager
def _slow_path():
    """PyTorch's modules as in training: what ours are compared with."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def _pair(name, *args, **options):
    """Our module and torch's, with the same parameters, none of them a zero or a one."""
    torch.manual_seed(1)
    ours = getattr(nn, name)(*args, **options)
    theirs = getattr(torch.nn, name)(*args, **options)
    for seed, parameter in enumerate(ours.parameters()):
        noise = testing.make(parameter.shape, parameter.dtype, seed=seed)
        parameter.data += 0.1 * noise
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _compare(ours, theirs, inputs, **options):
    """Results and gradients, of inputs and parameters, against torch's module in float64."""
    names = [name for name, _ in ours.named_parameters()]
    count = len(inputs)

    def call(module):
        def run(*tensors):
            parameters = dict(zip(names, tensors[count:], strict=True))
            return functional_call(module, parameters, tensors[:count], options)

        return run

    depth = sum(isinstance(m, torch.nn.MultiheadAttention) for m in ours.modules())
    with _slow_path(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        return testing.compare(
            call(ours),
            call(theirs),
            [call(theirs)],
            [*inputs, *(p.detach() for p in ours.parameters())],
            reduction=8 * (WIDTH + HIDDEN + MEMORY) * depth,
        )


def _rows(length, batch_first=True, seed=0, dtype=torch.float32):
    x = testing.make((BATCH, length, WIDTH), dtype, seed=seed)
    return x if batch_first else x.transpose(0, 1).contiguous()


def _padding(length, kind="bool"):
    hidden = torch.arange(length) >= torch.tensor([length, length - 2, length - 3])[:, None]
    return hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


def _causal(length, kind="bool"):
    mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
    return mask == -math.inf if kind == "bool" else mask


def _layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True, **options)


def _decoder_layer():
    return nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)


# MultiheadAttention


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=False),
        dict(add_bias_kv=True),
        dict(add_zero_attn=True),
        dict(kdim=10, vdim=12),
        dict(kdim=10, vdim=10, bias=False, add_bias_kv=True, add_zero_attn=True),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_multihead_attention(options, training, batch_first):
    ours, theirs = _pair("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first, **options)
    ours.train(training), theirs.train(training)
    sizes = (LENGTH, WIDTH), (MEMORY, ours.kdim), (MEMORY, ours.vdim)
    inputs = []
    for seed, size in enumerate(sizes):
        x = testing.make((BATCH, *size), seed=seed)
        inputs.append(x if batch_first else x.transpose(0, 1).contiguous())
    masks = dict(key_padding_mask=_padding(MEMORY), attn_mask=_causal(MEMORY)[:LENGTH])
    for given, need_weights in itertools.product(({}, masks), (False, True)):
        _compare(ours, theirs, inputs, need_weights=need_weights, **given)
    _compare(ours, theirs, inputs, average_attn_weights=False)
    _compare(ours, theirs, [x[:, 0] if not batch_first else x[0] for x in inputs])


def test_one_tensor_is_projected_once():
    ours, theirs = _pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x = _rows(LENGTH)

    class Self(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    _compare(Self(ours), Self(theirs), [x])
    with _Called() as called, torch.profiler.profile() as profiler:
        ours(x, x, x, need_weights=False)
    assert "attention_fwd" in called.names
    assert sum(event.key == "aten::linear" for event in profiler.events()) == 2


def test_dropout_of_multihead_attention():
    ours, theirs = _pair("MultiheadAttention", WIDTH, HEADS, dropout=0.5)
    x = _rows(LENGTH, False)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        found.append(module(x, x, x))
    for one, other in zip(*found, strict=True):
        testing.check(one, other.double(), [other], reduction=WIDTH)
    torch.manual_seed(2)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


# Layers


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=False, layer_norm_eps=1e-3),
        dict(activation="gelu"),
        dict(activation=torch.nn.functional.silu),
    ],
    ids=["plain", "bias", "gelu", "silu"],
)
def test_layers(options, batch_first, norm_first, kind):
    options = options | dict(batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    src, memory = _rows(LENGTH, batch_first), _rows(MEMORY, batch_first, 1)
    ours, theirs = _pair("TransformerEncoderLayer", WIDTH, HEADS, HIDDEN, **options)
    masks = dict(src_mask=_causal(LENGTH, kind), src_key_padding_mask=_padding(LENGTH, kind))
    for given in ({}, masks, dict(src_mask=masks["src_mask"], is_causal=True)):
        _compare(ours, theirs, [src], **given)
    _compare(ours.eval(), theirs.eval(), [src[:, 0]])
    ours, theirs = _pair("TransformerDecoderLayer", WIDTH, HEADS, HIDDEN, **options)
    masks = dict(
        tgt_mask=_causal(LENGTH, kind), tgt_key_padding_mask=_padding(LENGTH, kind),
        memory_key_padding_mask=_padding(MEMORY, kind),
        memory_mask=_causal(MEMORY, kind)[:LENGTH],
    )  # fmt: skip
    for given in ({}, masks, dict(tgt_mask=masks["tgt_mask"], tgt_is_causal=True)):
        _compare(ours, theirs, [src, memory], **given)


# Stacks


@pytest.mark.parametrize("hint", [None, True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("training", [False, True])
def test_stacks(training, masks, hint):
    src, tgt = _rows(MEMORY), _rows(LENGTH, seed=1)
    options = dict(num_layers=2, norm=torch.nn.LayerNorm(WIDTH))
    layers = [
        getattr(torch.nn, f"Transformer{kind}Layer")(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
        for kind in ("Encoder", "Decoder")
    ]
    causal, padded = masks in ("causal", "both"), masks in ("padding", "both")
    for kind, layer in zip(("Encoder", "Decoder"), layers, strict=True):
        ours, theirs = _pair(f"Transformer{kind}", layer, **options)
        udlkernels.accelerate(ours)
        ours.train(training), theirs.train(training)
        if kind == "Encoder":
            given = dict(
                mask=_causal(MEMORY) if causal else None,
                src_key_padding_mask=_padding(MEMORY) if padded else None,
                is_causal=hint if causal else None,
            )
            _compare(ours, theirs, [src], **given)
        else:
            given = dict(
                tgt_mask=_causal(LENGTH) if causal else None,
                memory_key_padding_mask=_padding(MEMORY) if padded else None,
                tgt_is_causal=hint if causal else None,
            )
            _compare(ours, theirs, [tgt, src], **given)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer(batch_first, norm_first):
    options = dict(batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    ours, theirs = _pair("Transformer", WIDTH, HEADS, 2, 2, HIDDEN, **options)
    src, tgt = _rows(MEMORY, batch_first), _rows(LENGTH, batch_first, 1)
    masks = dict(
        tgt_mask=_causal(LENGTH), src_key_padding_mask=_padding(MEMORY),
        memory_key_padding_mask=_padding(MEMORY), tgt_key_padding_mask=_padding(LENGTH),
    )  # fmt: skip
    _compare(ours, theirs, [src, tgt])
    _compare(ours.eval(), theirs.eval(), [src, tgt], **masks)
    with pytest.raises(RuntimeError, match="batch number"):
        ours(src[:, :2] if not batch_first else src[:2], tgt)


def test_built_of_our_modules_with_torchs_first_values():
    torch.manual_seed(4)
    ours = nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, batch_first=True)
    torch.manual_seed(4)
    theirs = torch.nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, batch_first=True)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name
    for module in ours.modules():
        form = getattr(nn, type(module).__name__, None)
        assert form is None or type(module) is form
        assert type(module).__name__ not in nn.__all__ or isinstance(
            module, getattr(torch.nn, type(module).__name__)
        )
    assert type(ours.encoder.layers[1].self_attn.out_proj).__name__.startswith("NonDynamically")


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS), 1)
        encoder.eval()(_rows(LENGTH, False), None, _padding(LENGTH))
        encoder(_rows(LENGTH, False), _causal(LENGTH, "float"), _padding(LENGTH))
    assert encoder.enable_nested_tensor


def test_custom_parts_stay_what_they_are():
    class Layer(torch.nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_mask.dtype == src_key_padding_mask.dtype == torch.float32 and not is_causal
            return 2 * src

    encoder = nn.TransformerEncoder(Layer(WIDTH, HEADS, batch_first=True), 2)
    x = _rows(LENGTH)
    masks = _causal(LENGTH).roll(1, 0), _padding(LENGTH)
    assert torch.equal(encoder.eval()(x, *masks), 4 * x)
    plain = torch.nn.TransformerEncoder(_layer(), 1, enable_nested_tensor=False)
    model = nn.Transformer(WIDTH, HEADS, custom_encoder=plain, num_decoder_layers=1)
    assert model.encoder is plain and type(plain) is torch.nn.TransformerEncoder
    assert type(model.decoder) is nn.TransformerDecoder


# The fast path


@pytest.mark.parametrize("padded", [False, True])
def test_our_kernels_run_in_evaluation(padded):
    options = dict(src_key_padding_mask=_padding(LENGTH) if padded else None)
    encoder = nn.TransformerEncoder(_layer(), 2).eval()
    x = _rows(LENGTH)
    with torch.no_grad(), _Called() as called:
        found = encoder(x, **options)
    assert {"attention_fwd", "layer_norm_fwd"} <= called.names and not NATIVE & called.names
    attention = encoder.layers[0].self_attn
    with torch.inference_mode(), _Called() as called:
        attention(x, x, x)
    assert "attention_fwd" in called.names and not NATIVE & called.names
    theirs = torch.nn.TransformerEncoder(_layer(), 2).eval()
    udlkernels.restore(theirs)
    theirs.load_state_dict(encoder.state_dict())
    with torch.no_grad(), _Called() as called:
        wanted = theirs(x, **options)
    assert called.names & NATIVE
    seen = ~_padding(LENGTH) if padded else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    testing.check(found[seen], wanted[seen].double(), [wanted[seen]], reduction=8 * HIDDEN)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_take_torchs_way():
    ours, theirs = _pair("TransformerEncoderLayer", WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
    nested = torch.nested.nested_tensor([_rows(LENGTH)[0], _rows(LENGTH)[1, :4]])
    with torch.no_grad():
        for one, other in ((ours, theirs), (ours.self_attn, theirs.self_attn)):
            given = [nested] if one is ours else [nested] * 3
            results = [m.eval()(*given) for m in (one, other)]
            found, wanted = (r if torch.is_tensor(r) else r[0] for r in results)
            assert torch.equal(found.to_padded_tensor(0.0), wanted.to_padded_tensor(0.0))
        stack = nn.TransformerEncoder(ours, 1).eval()
        assert stack(nested).is_nested


# State


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_state_goes_both_ways():
    for name, args in (
        ("MultiheadAttention", (WIDTH, HEADS)),
        ("TransformerEncoderLayer", (WIDTH, HEADS, HIDDEN)),
        ("TransformerDecoderLayer", (WIDTH, HEADS, HIDDEN)),
        ("Transformer", (WIDTH, HEADS, 1, 2, HIDDEN)),
    ):
        ours, theirs = getattr(nn, name)(*args), getattr(torch.nn, name)(*args)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            ours.load_state_dict({}, strict=True)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied) is type(ours)
            assert [type(m) for m in copied.modules()] == [type(m) for m in ours.modules()]
            for one, other in zip(copied.parameters(), ours.parameters(), strict=True):
                assert torch.equal(one, other) and one is not other


def test_accelerate_and_restore():
    torch.manual_seed(3)

    class Mine(torch.nn.MultiheadAttention):
        pass

    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(WIDTH))
    model = torch.nn.ModuleDict(dict(encoder=encoder, mine=Mine(WIDTH, HEADS)))
    before = [type(m) for m in model.modules()]
    keys, x, padding = list(model.state_dict()), _rows(LENGTH), _padding(LENGTH)
    with _slow_path():
        wanted = encoder.eval()(x, None, padding)
    exact = copy.deepcopy(encoder).double()(x.double(), None, padding)
    with udlkernels.accelerated(model):
        assert type(encoder) is nn.TransformerEncoder
    assert [type(m) for m in model.modules()] == before
    udlkernels.accelerate(model)
    kinds = {type(m) for m in encoder.modules()}
    assert {nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention} <= kinds
    assert nn.LayerNorm in kinds and torch.nn.LayerNorm not in kinds
    assert type(encoder.layers[0].self_attn.out_proj) in before and type(model["mine"]) is Mine
    assert list(model.state_dict()) == keys
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad, _Called() as called:
            found = encoder(x, None, padding)
        assert not NATIVE & called.names and "attention_fwd" in called.names
        testing.check(found, exact, [wanted], reduction=16 * HIDDEN)
    udlkernels.restore(model)
    assert [type(m) for m in model.modules()] == before
    with torch.no_grad(), _Called() as called:
        encoder(x, None, padding)
    assert called.names & NATIVE


def _note(seen, module, args, options):
    seen.append(options["is_causal"])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_only_the_causal_mask_counts_as_one(kind):
    """Without a hint the encoder and the decoder look at the mask."""
    causal = _causal(LENGTH, kind)
    others = causal.roll(1, 1), causal.T.contiguous(), causal[None].expand(BATCH * HEADS, -1, -1)
    for mask in (causal, *others):
        seen = []
        for model, x in (
            (nn.TransformerEncoder(_layer(), 1), (_rows(LENGTH),)),
            (nn.TransformerDecoder(_decoder_layer(), 1), (_rows(LENGTH), _rows(MEMORY))),
        ):
            attention = model.layers[0].self_attn
            attention.register_forward_pre_hook(functools.partial(_note, seen), with_kwargs=True)
            model(*x, mask)
        assert seen == [mask is causal] * 2


def test_implementation_reaches_the_modules_inside():
    model = nn.TransformerEncoder(_layer(), 2, nn.LayerNorm(WIDTH)).eval()
    x = _rows(LENGTH)

    def chosen():
        return {(c.op, c.implementation) for c in udlkernels.explain(model, x).choices}

    op = "multi_head_attention_forward"
    kernels = {(op, "kernel"), ("attention", "kernel"), ("layer_norm", "kernel")}
    assert chosen() == kernels
    model.implementation = "torch"
    assert chosen() == {(op, "torch"), ("layer_norm", "torch")}
    model.layers[0].implementation = "kernel"
    assert chosen() == kernels | {(op, "torch"), ("layer_norm", "torch")}
    assert pickle.loads(pickle.dumps(model)).layers[0].self_attn.implementation == "kernel"
    assert nn.TransformerEncoder.implementation == "auto"


# What PyTorch does with modules


@pytest.mark.parametrize("masks", ["none", "causal"])
def test_compiled(masks):
    model = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, 0.0, batch_first=True)
    mask = _causal(LENGTH) if masks == "causal" else None

    def call(src, tgt):
        return model(src, tgt, tgt_mask=mask, src_key_padding_mask=_padding(MEMORY))

    inputs = [_rows(MEMORY), _rows(LENGTH, seed=1)]
    assert_compiles(call, [inputs], OPS)
    assert_compiles(call, [inputs], ("layer_norm_fwd", "layer_norm_bwd"))


def test_exported():
    model = nn.TransformerEncoder(_layer(), 1).eval()
    args = _rows(LENGTH), _causal(LENGTH, "float"), _padding(LENGTH)
    program = torch.export.export(model, args)
    assert "udlkernels.attention_fwd" in str(program.graph)
    assert torch.equal(program.module()(*args), model(*args))


def test_checkpointed():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.3, batch_first=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        x = _rows(LENGTH).requires_grad_()
        out = call(x)
        found = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
        results.append((out, *found))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_autocast():
    ours, theirs = _pair("TransformerDecoderLayer", WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
    args = _rows(LENGTH), _rows(MEMORY, seed=1)
    masks = dict(tgt_mask=_causal(LENGTH), memory_key_padding_mask=_padding(MEMORY))
    exact = copy.deepcopy(theirs).double()(*(x.double() for x in args), **masks)
    with torch.autocast("cpu", dtype=torch.bfloat16), _Called() as called:
        found, peer = ours(*args, **masks), theirs(*args, **masks)
    assert found.dtype == peer.dtype and "attention_fwd" in called.names
    testing.check(found.bfloat16(), exact, [peer.bfloat16()], reduction=8 * HIDDEN)


def test_padded_memory_leaves_no_trace():
    """NaN in the memory's padding: neither in the results nor in any gradient."""
    model = nn.TransformerDecoder(_decoder_layer(), 2, nn.LayerNorm(WIDTH))
    padding, results = _padding(MEMORY), []
    for filler in (0.0, math.nan):
        memory = _rows(MEMORY, seed=1).masked_fill(padding[..., None], filler).requires_grad_()
        out = model(_rows(LENGTH), memory, memory_key_padding_mask=padding)
        found = torch.autograd.grad(out.square().sum(), [memory, *model.parameters()])
        results.append((out, *found))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()
