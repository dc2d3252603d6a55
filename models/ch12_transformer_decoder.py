"""A transformer decoder, GPT's and GPT-3's model: sections 12.2 to 12.7.

Tokens turn into vectors, layers of masked self-attention and of an MLP refine them, and each
position predicts the token after it. A layer adds what a branch computes and normalizes the sum
(section 12.4: post-norm); GPT-2 and GPT-3 normalize a branch's input instead (pre-norm). Positions
are learned vectors (section 12.3.1), or turn queries and keys (rotary), or lower the scores by
distance (ALiBi).

Task: the help texts of Python's language, which ship with Python, as byte-pair tokens; the last
tenth is held out. Loss: cross-entropy of the next token. Metric: nats per byte of the held-out
text, to compare with n-grams of bytes (the table); knowing nothing costs ln 256 = 5.55.
AdamW with warm-up and a cosine, 800 steps of 1024 tokens; 0.9 million weights.
Picture: nats per byte by epoch, the trained network's attention, and a text that it wrote.
"""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from udlkernels import functional
from udlkernels.nn import LayerNorm

from .generation import Cache, generate
from .picture import COLOURS, curve, panels
from .task import Data, Plan, Results, Table, Task, Training
from .text import Tokenizer, byte_pairs, ngram_losses, python_topics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config(Training):
    vocabulary: int = 1024  # V
    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4  # H; each is width / heads = D wide
    kv_heads: int | None = None  # Hkv, divides heads; None for as many
    positions: Literal["learned", "rotary", "alibi"] = "learned"
    norm: Literal["post", "pre"] = "post"
    dropout: float = 0.0

    epochs: int = 8
    batch_size: int = 8
    examples: int | None = 800  # 100 steps
    evaluated: int | None = 128
    learning_rate: float = 2e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.1


NOTHING = -100  # a target that is not there

# The published sizes; both normalize before the branch, and share the embedding with the output.
SIZES = {
    "gpt2": Config(vocabulary=50257, context=1024, width=768, layers=12, heads=12, norm="pre"),
    "gpt3": Config(vocabulary=50257, context=2048, width=12288, layers=96, heads=96, norm="pre"),
}


class AddNorm(nn.LayerNorm):
    """The residual connection with dropout, and layer normalization of the sum, as one op."""

    implementation: str = "auto"

    def __init__(self, config: Config) -> None:
        super().__init__(config.width)
        self.dropout = config.dropout

    def forward(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized sum and the sum, [B, T, width] all."""
        branch = branch.to(residual.dtype)  # autocast makes it narrower
        p = self.dropout if self.training else 0.0
        affine = self.normalized_shape, self.weight, self.bias
        if self.implementation == "torch":
            total = residual + F.dropout(branch, p)
            return functional.layer_norm(total, *affine, self.eps, implementation="torch"), total
        return functional.add_layer_norm(
            branch, residual, *affine, eps=self.eps, dropout_p=p, implementation=self.implementation
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, dropout: float, implementation: str
) -> Tensor:
    """Masked self-attention: q [B, H, T, D] over k and v [B, Hkv, T, D], each over its past."""
    if implementation != "torch":
        return functional.attention(
            q, k, v, causal="top_left", alibi_slopes=slopes, dropout_p=dropout,
            implementation=implementation,
        )  # fmt: skip
    bias = None
    if slopes is not None:
        i = torch.arange(q.shape[2], device=q.device)
        future = torch.full_like(slopes, -math.inf)[:, None, None]
        bias = torch.where(i <= i[:, None], -slopes[:, None, None] * (i[:, None] - i), future)
        bias = bias.to(q.dtype)
    return functional.scaled_dot_product_attention(
        q, k, v, bias, dropout, bias is None, enable_gqa=q.shape[1] != k.shape[1],
        implementation="torch",
    )  # fmt: skip


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int,
    rotary: tuple[Tensor, Tensor] | None, slopes: Tensor | None, implementation: str,
) -> Tensor:  # fmt: skip
    """One new position: q [B, 1, H, D] over the cache [B, S, Hkv, D], which k and v first join."""
    if implementation != "torch":
        return functional.attention_decode(
            q, keys, values, cache_seqlens=length, k_new=k, v_new=v, rotary=rotary,
            alibi_slopes=slopes, layout="bthd", implementation=implementation,
        )  # fmt: skip
    if rotary is not None:
        cos, sin = (table[length : length + 1] for table in rotary)
        q, k = (rotate(t.transpose(1, 2), cos, sin, "torch").transpose(1, 2) for t in (q, k))
    keys[:, length : length + 1], values[:, length : length + 1] = k, v
    bias = None
    if slopes is not None:
        ago = torch.arange(length, -1, -1, device=q.device)
        bias = (-slopes[:, None, None] * ago).to(q.dtype)  # [H, 1, S]
    q, keys, values = (
        t.transpose(1, 2) for t in (q, keys[:, : length + 1], values[:, : length + 1])
    )
    return functional.scaled_dot_product_attention(
        q, keys, values, bias, enable_gqa=q.shape[1] != keys.shape[1], implementation="torch"
    ).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, implementation: str) -> Tensor:
    """x [B, H, T, D] with its halves as pairs, turned by the angles of each position [T, D / 2]."""
    if implementation != "torch":
        return functional.apply_rotary(x, cos, sin, implementation=implementation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    implementation: str = "auto"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.dropout = config.dropout
        head_width = config.width // config.heads
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * head_width)
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, T, H, D], k and v [B, T, Hkv, D]."""
        heads = self.heads + 2 * self.kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads, -1))
        return qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, slopes: Tensor | None,
        cache: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = self.project(x)
        if cache is not None and cache[2] > 0:
            heads = attend_cached(q, k, v, *cache, rotary, slopes, self.implementation)
            return self.out(heads.flatten(2))
        steps = x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]
        if rotary is not None:
            tables = [table[:steps] for table in rotary]
            q, k = (rotate(t, *tables, self.implementation) for t in (q, k))
        if cache is not None:
            cache[0][:, :steps], cache[1][:, :steps] = k.transpose(1, 2), v.transpose(1, 2)
        p = self.dropout if self.training else 0.0
        heads = attend(q, k, v, slopes, p, self.implementation).transpose(1, 2)
        return self.out(heads.flatten(2))


class Layer(nn.Module):
    """Attention, and an MLP at each position; each followed by the residual sum and its norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.post = config.norm == "post"
        self.attention = Attention(config)
        self.norm1 = AddNorm(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )
        self.norm2 = AddNorm(config)

    def forward(self, h: Tensor, stream: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        """h, which branches read, and the stream that they add to; post-norm they are the same."""
        h, total = self.norm1(self.attention(h, *how), stream)
        h, total = self.norm2(self.mlp(h), h if self.post else total)
        return h, h if self.post else total


def rotary_tables(config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [context, D / 2]; pair i turns 10000^(-2i/D)."""
    width = config.width // config.heads
    speed = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * speed
    return angle.cos().float(), angle.sin().float()


def alibi_slopes(config: Config) -> Tensor:
    """How fast each head's scores fall with the distance, [H]: 2^(-8/H), 2^(-16/H), ..., 2^-8."""
    return 2.0 ** (-8.0 * torch.arange(1, config.heads + 1) / config.heads)


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        # Before the first layer only pre-norm has a norm of its own; a layer's are behind it.
        self.norm = nn.Identity() if config.norm == "post" else LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        cos, sin = rotary_tables(config) if config.positions == "rotary" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        slopes = alibi_slopes(config) if config.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Variance 1 / inputs; the more branches add up, the less each adds (as in GPT-2).

        GPT-2's deviation of 0.02, meant for width 768 and more, learns half as fast at width 128.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for layer in self.layers:
                for last in (layer.attention.out, layer.mlp[-1]):
                    last.weight /= math.sqrt(2 * len(self.layers))

    def cache(self, rows: int) -> Cache:
        config, like = self.config, self.tokens.weight
        heads = config.kv_heads or config.heads
        size = rows, config.context, heads, config.width // config.heads
        return Cache.empty(config.layers, *size, like)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last layer's output [B, T, width]."""
        start, steps = (0 if cache is None else cache.length), tokens.shape[1]
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + steps]
        x = self.dropout(x)
        h = self.norm(x)
        rotary = None if self.cos is None else (self.cos, self.sin)
        for i, layer in enumerate(self.layers):
            rows = None if cache is None else (cache.keys[i], cache.values[i], start)
            h, x = layer(h, x, rotary, self.slopes, rows)
        if cache is not None:
            cache.length += steps
        return h

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; with a cache, which they join, the last's [B, V]."""
        h = self.hidden(tokens, cache)
        return F.linear(h if cache is None else h[:, -1], self.tokens.weight)


def vocabulary() -> str:
    return byte_pairs(python_topics()[0], Config.vocabulary)


def data() -> Data:
    """Windows of tokens, the token after each, and its length in bytes; [N, context] all.

    The windows to train on overlap by half. In those to test on, every token is predicted once.
    """
    tokenizer = Tokenizer(vocabulary())
    train, test = (torch.tensor(tokenizer.encode(text)) for text in python_topics())
    length = torch.tensor([len(piece) for piece in tokenizer.pieces])
    context, half = Config.context, Config.context // 2
    x, y = (t.unfold(0, context, half).contiguous() for t in (train[:-1], train[1:]))
    before = torch.cat((train[-1:], test[:-1]))
    missing = -len(test) % context
    x_test = F.pad(before, (0, missing)).view(-1, context)
    y_test = F.pad(test, (0, missing), value=NOTHING).view(-1, context)
    bytes_test = torch.where(y_test == NOTHING, 0, length[y_test.clamp(min=0)])
    return Data((x, y, length[y]), (x_test, y_test, bytes_test))


def loss(model: nn.Module, x: Tensor, y: Tensor, bytes: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=NOTHING)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, bytes: Tensor) -> dict[str, Tensor]:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, target in zip(x.split(16), y.split(16), strict=True):  # logits are large
        logits = model(part).flatten(0, 1).float()
        total += F.cross_entropy(logits, target.flatten(), ignore_index=NOTHING, reduction="sum")
    return {"nats": total / bytes.sum()}


def optimizer(model: nn.Module, config: Config) -> tuple[AdamW, LambdaLR]:
    """Weight decay on matrices alone; the rate rises over the warm-up and falls to a tenth."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adam = AdamW(groups, config.learning_rate, betas=(0.9, 0.98), fused=True)
    steps = config.epochs * -(-(config.examples or 1) // config.batch_size)

    def rate(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = min((step - config.warmup) / max(steps - config.warmup, 1), 1.0)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return adam, LambdaLR(adam, rate)


def simpler_models(build: Callable[[Config], Decoder], data: Data) -> Table:
    """Nats per byte of the same held-out text under n-grams of its bytes."""
    train, test = (text.encode() for text in python_topics())
    names = ("all bytes alike", "bytes by frequency", "bigram", "trigram", "4-gram", "5-gram")
    rows = [list(row) for row in zip(names, ngram_losses(train, test, 5), strict=True)]
    caption = "Counts of the training text, smoothed by those of shorter contexts."
    return Table("Bytes of the held-out text by n-grams", ("model", "nats per byte"), rows, caption)


PROMPT = "The statement"
SHOWN = 24  # positions of the attention in the picture


@torch.no_grad()
def show(model: Decoder) -> dict[str, Any]:
    """A text that the model writes, and each head's attention over the first tokens of it."""
    tokenizer = Tokenizer(vocabulary())
    prompt = tokenizer.encode(PROMPT)
    tokens = [*prompt, *generate(model, prompt, 160, temperature=0.8, top_p=0.95)]
    some = torch.tensor([tokens[:SHOWN]], device=model.tokens.weight.device)
    weights = [layer.round(decimals=3).tolist() for layer in attention_weights(model, some)]
    return {"text": tokenizer.decode(tokens), "attention": weights}


def attention_weights(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """What the softmax gives in each layer, [H, T, T]: the kernels never hold it in memory."""
    found: list[Tensor] = []

    def look(attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, rotary, slopes = inputs[:3]
        q, k, _ = (t.transpose(1, 2) for t in attention.project(x))
        if rotary is not None:
            q, k = (rotate(t, *(r[: x.shape[1]] for r in rotary), "torch") for t in (q, k))
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        eye = eye.expand(*k.shape[:2], -1, -1)  # values that show the weights
        found.append(attend(q, k, eye, slopes, 0.0, "torch")[0])

    hooks = [layer.attention.register_forward_pre_hook(look) for layer in model.layers]
    try:
        model.eval()(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def sample(
    model: Decoder, vocabulary: str, prompt: str, tokens: int, **options: Any
) -> Iterator[str]:
    tokenizer = Tokenizer(vocabulary)
    return tokenizer.stream(generate(model, tokenizer.encode(prompt), tokens, **options))


def picture(results: Results) -> Figure:
    figure, (losses, attention, text) = panels(
        "Held-out (solid) and training text (dashed)",
        "Attention by layer (down) and head",
        "A text of the model",
    )
    draw_losses(losses, results)
    shown = results.runs[0].shown
    draw_attention(attention, shown["attention"])
    draw_text(text, shown["text"])
    return figure


def draw_losses(ax: Axes, results: Results) -> None:
    twins = [run for run in results.runs if run.ops == "torch" and results.runs[0].ops != "torch"]
    curve(ax, twins, "test_nats", color="#bbbbbb", lw=5, label="PyTorch's ops")
    for colour, variant in zip(COLOURS, VARIANTS, strict=False):
        runs = results.select(variant, results.runs[0].ops)
        if runs:
            curve(ax, runs, "test_nats", band=True, color=colour, label=variant)
            curve(ax, runs, "train_nats", color=colour, ls="--", linewidth=1)
    for row in [] if results.table is None else results.table.rows[2:]:
        ax.axhline(row[1], color="k", lw=0.8, ls=":")
        ax.annotate(
            row[0], (1, row[1]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    ax.set(xlabel="epoch", ylabel="nats per byte")
    ax.legend(frameon=False)


def draw_attention(ax: Axes, layers: list[Any]) -> None:
    """One square a head, query positions down."""
    weights = torch.tensor(layers)  # [layers, H, T, T]
    framed = F.pad(weights, (0, 2, 0, 2), value=math.nan)
    mosaic = framed.transpose(1, 2).flatten(2).flatten(0, 1)
    ax.imshow(mosaic.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    ax.set_axis_off()


def draw_text(ax: Axes, text: str) -> None:
    text = "".join(c if c in string.printable else "?" for c in text)  # what the font has
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 46) or [""]]
    shown = "\n".join(lines[:22]).replace("$", r"\$")
    ax.text(0, 1, shown, family="monospace", fontsize=7.5, va="top", transform=ax.transAxes)
    ax.set_axis_off()


VARIANTS = {
    "learned": Config(),
    "pre_norm": Config(norm="pre"),
    "rotary": Config(positions="rotary"),
    "alibi": Config(positions="alibi"),
    "grouped": Config(kv_heads=1),
}

TASK = Task(
    name="ch12_transformer_decoder",
    section="12.2-12.7",
    title="Transformer decoder on the help texts of Python",
    ops=("add_layer_norm", "apply_rotary", "attention", "attention_decode"),
    metric="nats",
    unit="per byte",
    quick_seconds=150,
    variants=VARIANTS,
    expected=dict.fromkeys(VARIANTS, "< 2.32 (bigram)"),
    quick=Plan(("learned",)),
    full=Plan(tuple(VARIANTS), seeds=3, changes={"epochs": 30, "dropout": 0.1}),
    data=data,
    build=Decoder,
    loss=loss,
    evaluate=evaluate,
    optimizer=optimizer,
    picture=picture,
    experiment=simpler_models,
    schedule="step",
    show=show,
    vocabulary=vocabulary,
    sample=sample,
)
