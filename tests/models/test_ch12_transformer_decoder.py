"""The transformer decoder of chapter 12: its form, its sizes, and that caches change nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests.support import assert_compiles
from udlkernels import functional, models, testing
from udlkernels.models import ch12_transformer_decoder as chapter
from udlkernels.models import runner
from udlkernels.models.generation import generate
from udlkernels.models.ops import IMPLEMENTATIONS, set_implementation
from udlkernels.models.runner import Options
from udlkernels.models.task import Data, Plan
from udlkernels.models.trainer import Computing, Trainer

pytest.importorskip("tokenizers")

SMALL = replace(
    chapter.Config(), width=32, layers=2, context=16, vocabulary=50, batch_size=4, examples=None
)
FORMS = {
    "learned": SMALL,
    "pre_norm": replace(SMALL, norm="pre"),
    "rotary": replace(SMALL, positions="rotary"),
    "alibi": replace(SMALL, positions="alibi"),
    "grouped": replace(SMALL, kv_heads=2, positions="rotary"),
    "one_kv_head": replace(SMALL, kv_heads=1, positions="alibi", norm="pre"),
}


@pytest.fixture(scope="module")
def data() -> Data:
    return chapter.data()


def network(form: str, ops: Any = "udlkernels") -> chapter.Decoder:
    torch.manual_seed(0)
    made = chapter.Decoder(FORMS[form]).eval()
    with torch.no_grad():
        made.tokens.weight *= 10  # far from uniform predictions
        for layer in made.layers:  # and not of the same token again
            layer.mlp[-1].weight *= 10
            layer.attention.out.weight *= 10
    set_implementation(made, ops)
    return made


def windows(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(SMALL.vocabulary, (rows, SMALL.context + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def test_task_is_found_under_its_name() -> None:
    assert models.load("ch12_transformer_decoder") is chapter.TASK
    assert {*chapter.TASK.quick.variants, *chapter.TASK.full.variants} == {*chapter.VARIANTS}
    assert {*chapter.TASK.expected} <= {*chapter.VARIANTS}
    assert {*chapter.TASK.ops} <= {*functional.__all__}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt2", 124_439_808),  # as published
        ("gpt3", 174_604_259_328),
    ],
)
def test_published_sizes(name: str, weights: int) -> None:
    with torch.device("meta"):
        made = chapter.Decoder(chapter.SIZES[name])
    assert sum(parameter.numel() for parameter in made.parameters()) == weights


def test_gpt3_is_the_books() -> None:
    config = chapter.SIZES["gpt3"]
    assert (config.layers, config.width, config.heads, config.context) == (96, 12288, 96, 2048)
    assert config.width // config.heads == 128


def test_number_of_weights() -> None:
    made = chapter.Decoder(chapter.Config())
    width, hidden = 128, 512
    attention = 4 * (width * width + width)
    mlp = width * hidden + hidden + hidden * width + width
    norms = 2 * 2 * width
    embeddings = (1024 + 128) * width
    weights = sum(parameter.numel() for parameter in made.parameters())
    assert weights == embeddings + 4 * (attention + mlp + norms)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_no_position_sees_what_comes_after_it(form: str, ops: Any) -> None:
    made = network(form, ops)
    x, _ = windows()
    before = made(x)
    for at in (1, 7, 15):
        other = x.clone()
        other[:, at] = (other[:, at] + 1) % SMALL.vocabulary
        after = made(other)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at], after[:, at])
        assert at == 15 or not torch.equal(before[:, at + 1], after[:, at + 1])


@pytest.mark.parametrize("form", FORMS)
def test_positions_count(form: str) -> None:
    """Tokens in another order give the last position another prediction."""
    made = network(form)
    x = torch.tensor([[3, 4, 5, 6], [4, 3, 5, 6]])
    first, second = made(x)[:, -1]
    assert not torch.equal(first, second)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    config = replace(chapter.Config(), positions="rotary")
    cos, sin = (table.double() for table in chapter.rotary_tables(config))
    q, k = (testing.make((1, 1, 1, 32), torch.float64, seed=seed) for seed in (0, 1))

    def score(i: int, j: int) -> torch.Tensor:
        turned = (
            chapter.rotate(t, cos[at : at + 1], sin[at : at + 1], "torch")
            for t, at in ((q, i), (k, j))
        )
        return (next(turned) * next(turned)).sum()

    oracle = score(9, 4)
    testing.check(score(105, 100).float(), oracle, [], reduction=32)  # the tables are float32
    assert not torch.isclose(score(10, 4), oracle)


def test_slopes_are_alibis() -> None:
    slopes = chapter.alibi_slopes(replace(chapter.Config(), heads=8, width=64))
    assert slopes.tolist() == [2.0**-power for power in range(1, 9)]


def gradient(form: str, computing: Computing) -> torch.Tensor:
    """The loss and all weights' gradients, as one vector."""
    torch.manual_seed(0)
    task = replace(chapter.TASK, build=lambda config: network(form))
    made = computing.build(task, FORMS[form])
    loss = chapter.loss(made, *windows(), torch.ones(()))
    loss.backward()
    parts = [weight.grad.flatten() for weight in made.parameters()]
    return torch.cat([loss.detach()[None], *parts])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_as_near_the_true_one_as_with_torch_ops(form: str) -> None:
    oracle = gradient(form, Computing("reference", dtype="fp64"))
    peer = gradient(form, Computing("torch"))
    testing.check(gradient(form, Computing("udlkernels")), oracle, [peer])
    # And PyTorch's ops are the same network.
    testing.check(gradient(form, Computing("torch", dtype="fp64")).float(), oracle, [])


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_ops_reach_attention_and_norms(ops: Any) -> None:
    made = chapter.Decoder(FORMS["pre_norm"])
    assert set_implementation(made, ops) == 3 * SMALL.layers + 1
    for layer in made.layers:
        modules = (layer.attention, layer.norm1, layer.norm2)
        assert {module.implementation for module in modules} == {IMPLEMENTATIONS[ops]}


def test_dropout_only_in_training() -> None:
    made = chapter.Decoder(replace(SMALL, dropout=0.5))
    x, _ = windows()
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def greedy(made: chapter.Decoder, prompt: list[int], tokens: int) -> list[int]:
    """Without a cache: everything anew for every token."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(made(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_cached_generation_gives_the_tokens_of_uncached(form: str, ops: Any) -> None:
    made = network(form, ops)
    seen: set[int] = set()
    for prompt in ([7], [8, 9], [3, 1, 4, 1, 5], [9, 8, 7, 6, 5, 4]):
        count = SMALL.context - len(prompt)
        found = list(generate(made, prompt, count, temperature=0.0))
        assert found == greedy(made, prompt, count)
        assert list(generate(made, prompt, count, beams=1)) == found
        seen |= {*found}
    assert len(seen) > 4


@pytest.mark.parametrize("form", FORMS)
def test_cached_logits_are_those_of_the_whole_text(form: str) -> None:
    made = network(form)
    x, _ = windows()
    wide = network(form, "reference").double()
    with torch.no_grad():
        oracle, peer = wide(x), made(x)
        cache = made.cache(len(x))
        steps = [made(x[:, :5], cache)]
        steps += [made(x[:, at : at + 1], cache) for at in range(5, SMALL.context)]
    assert cache.length == SMALL.context
    testing.check(torch.stack(steps, 1), oracle[:, 4:], [peer[:, 4:]])


@pytest.mark.parametrize("form", ["learned", "grouped"])
def test_beams_are_worth_what_the_network_says(form: str) -> None:
    made = network(form)
    prompt = [3, 1, 4]

    def score(tokens: list[int]) -> float:
        text = torch.tensor([[*prompt, *tokens]])
        p = made(text).double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        return float(p[torch.arange(len(tokens)), tokens].sum())

    with torch.no_grad():
        assert score(list(generate(made, prompt, 2, beams=50))) == max(
            score([a, b]) for a in range(50) for b in range(50)
        )


def test_text_longer_than_the_context() -> None:
    found = list(generate(network("rotary"), [3, 1, 4], 50, seed=1))
    assert len(found) == 50 and {*found} <= {*range(SMALL.vocabulary)}


def test_compiles_into_one_graph() -> None:
    made = network("pre_norm")
    names = [name for name, _ in made.named_parameters()]
    x, y = windows()

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        logits = functional_call(made, dict(zip(names, weights, strict=True)), (x,))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    weights = [weight.detach() for weight in made.parameters()]
    assert_compiles(loss, [weights], ("attention_fwd", "attention_bwd"))
    assert_compiles(loss, [weights], ("add_layer_norm_fwd", "add_layer_norm_bwd"))


def test_held_out_text_is_predicted_once(data: Data) -> None:
    x, y, length = data.test
    there = y != chapter.NOTHING
    assert int(length.sum()) == len(chapter.python_topics()[1].encode())
    assert torch.equal(x.flatten()[1 : there.sum()], y.flatten()[: there.sum() - 1])
    assert bool((length[there] > 0).all()) and not bool(length[~there].any())
    train_x, train_y, _ = data.train
    assert torch.equal(train_x[:, 1:], train_y[:, :-1])
    assert torch.equal(train_x[1:, :64], train_x[:-1, 64:])


def test_uniform_predictions_cost_their_logarithm(data: Data) -> None:
    made = chapter.Decoder(chapter.Config(layers=1))
    torch.nn.init.zeros_(made.tokens.weight)
    part = tuple(tensor[-20:] for tensor in data.test)
    with torch.no_grad():
        found = chapter.evaluate(made, *part)["nats"]
    tokens = int((part[1] != chapter.NOTHING).sum())
    oracle = torch.tensor(math.log(1024) * tokens / int(part[2].sum()), dtype=torch.float64)
    testing.check(found.float(), oracle, [])


def few(data: Data) -> Data:
    return Data(tuple(t[:64] for t in data.train), tuple(t[:8] for t in data.test))


SHORT: dict[str, Any] = dict(
    epochs=3, examples=32, width=32, layers=2, warmup=4, evaluated=8, dropout=0.1, threads=1
)


def test_short_run_learns_and_draws(data: Data, tmp_path: Path) -> None:
    task = replace(chapter.TASK, data=lambda: few(data))
    plan = Plan(("learned", "pre_norm"), changes=SHORT | {"epochs": 6})
    results = runner.train(task, plan, Options(tmp_path, compare=True))
    assert [run.ops for run in results.runs] == ["udlkernels", "torch"] * 2
    for run in results.runs:
        assert run.history["loss"][-1] < run.history["loss"][0]
        assert run.history["test_nats"][-1] < run.history["test_nats"][0]
    used = {"add_layer_norm: kernel", "attention: kernel"}
    assert used <= {*results.runs[0].implementations}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads((tmp_path / "results.json").read_text())["runs"][0]["shown"]
    assert shown["text"].startswith(chapter.PROMPT)
    weights = torch.tensor(shown["attention"])
    assert weights.shape == (2, 4, chapter.SHOWN, chapter.SHOWN)
    assert torch.equal(weights, weights.tril())


def test_attention_shown_is_what_the_layers_use() -> None:
    made = network("rotary")
    x, _ = windows(1)
    for weights in chapter.attention_weights(made, x):
        testing.check(weights.sum(-1), torch.ones(weights.shape[:-1]).double(), [])
        assert bool((weights.tril() == weights).all())


class Stop(Exception):
    pass


def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    task = replace(chapter.TASK, data=lambda: few(data), experiment=None)
    plan = Plan(("learned",), changes=SHORT)

    def stop(trainer: Trainer) -> None:
        if trainer.epoch > 1:
            raise Stop

    expected = runner.train(task, plan, Options(tmp_path / "whole")).runs[0]
    with pytest.raises(Stop):
        runner.train(task, plan, Options(tmp_path / "parts"), stop)
    seen: list[int] = []
    found = runner.train(
        task, plan, Options(tmp_path / "parts", resume=True), lambda t: seen.append(t.epoch)
    ).runs[0]
    assert seen == [2, 3]
    assert found.shown == expected.shown
    for name in ("loss", "train_nats", "test_nats"):
        assert found.history[name] == expected.history[name]


def test_rate_warms_up_and_falls(data: Data) -> None:
    config = replace(chapter.Config(), epochs=2, examples=400, warmup=10)  # 100 steps
    adam, schedule = chapter.optimizer(chapter.Decoder(SMALL), config)
    rates = []
    for _ in range(100):
        rates.append(adam.param_groups[0]["lr"] / config.learning_rate)
        adam.step()
        schedule.step()
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10] == 1 and rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isclose(adam.param_groups[0]["lr"], 0.1 * config.learning_rate)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_other_element_types(data: Data, dtype: Any) -> None:
    computing = Computing(dtype=dtype)
    config = replace(chapter.Config(), **{**SHORT, "epochs": 2})
    trainer = Trainer(chapter.TASK, "learned", config, 0, computing, computing.place(few(data)))
    trainer.run_epoch()
    trainer.run_epoch()
    assert trainer.history["loss"][1] < trainer.history["loss"][0]
