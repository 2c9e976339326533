"""The architecture step: exact measurements, what it leaves alone, when it is due, its state.
Not here: what the measurements come to (alpha/test_values.py), the loop (test_search.py)."""

import copy
import itertools
import math
from unittest import mock

import pytest
import torch
from torch import nn

from darts_lora import Architect, DivergedError, InputError, SearchConfig, Supernet
from darts_lora.architect import LAST, search_passes
from darts_lora.lora.relaxation import distribution
from small_models import randomise, residual

RANKS = (0, 1, 2, 4)


def make(dtype=torch.float64, steps=4, model=None, **options):
    options = {"ranks": RANKS, "budget_rank": 2, "arch_every": 1} | options
    supernet = Supernet(residual() if model is None else model, SearchConfig(**options))
    supernet.model.to(dtype)
    supernet._place_alpha(supernet.alpha.device, dtype)
    randomise(supernet)
    return supernet, Architect(supernet, steps)


def batch(dtype=torch.float64, rows=8):
    return torch.randn(rows, 16, dtype=dtype), torch.randn(rows, 16, dtype=dtype)


def batches(dtype=torch.float64, count=50):
    return iter([batch(dtype) for _ in range(count)])


def loss_of(supernet):
    return lambda batch: (supernet.model(batch[0]) - batch[1]).pow(2).mean()


def change(layer, gates):
    """B diag(g) A, the layer's adapter."""
    return layer.lora_B.detach() * gates @ layer.lora_A.detach()


def by_hand(supernet, batch, changes):
    """The loss of each row, (rows,), where `changes` are added to the weights: one of each layer,
    (out, in), or one of each of its rows, (rows, out, in)."""
    x, y = batch
    for layer, delta in zip(supernet.layers.values(), changes, strict=True):
        base = layer.base_layer
        delta = delta.expand(len(x), -1, -1)
        x = x + torch.tanh(base(x) + torch.einsum("boi,bi->bo", delta, x))
    return (x - y).pow(2).mean(-1)


def mean_changes(supernet):
    gates = supernet.mean_gates()
    return [change(layer, g) for layer, g in zip(supernet.layers.values(), gates, strict=True)]


def test_the_gains_are_the_exact_gradients_on_the_way_to_the_adapter():
    supernet, architect = make()
    rows = batch()
    with mock.patch("torch.rand", lambda *_, **__: torch.tensor(0.3, dtype=torch.float64)):
        loss, (gains,) = architect.path(loss_of(supernet), rows)
    places = (torch.arange(8, dtype=torch.float64) / 8 + 0.3) % 1
    places = places.expand(4, -1).clone().requires_grad_()
    each = [p[:, None, None] * d for p, d in zip(places, mean_changes(supernet), strict=True)]
    expected = by_hand(supernet, rows, each).mean()
    (gradient,) = torch.autograd.grad(expected, places)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gains, -gradient.sum(-1), rtol=1e-10, atol=1e-13)


def test_the_sum_of_the_gains_is_what_the_adapter_takes_off_the_loss():
    supernet, architect = make()
    x, y = batch()
    many = x.repeat(500, 1), y.repeat(500, 1)  # each row at 500 places
    found = [architect.path(loss_of(supernet), many)[1][0] for _ in range(4)]
    adapted = mean_changes(supernet)
    without, with_it = (
        by_hand(supernet, (x, y), [part * d for d in adapted]).mean() for part in (0, 1)
    )
    gain = float(torch.stack(found).mean(0).sum())
    assert gain == pytest.approx(float(without - with_it), rel=1e-3)
    few = [float(architect.path(loss_of(supernet), (x, y))[1][0].sum()) for _ in range(300)]
    few = torch.tensor(few)  # without a bias also of a batch by itself
    assert abs(float(few.mean()) - gain) < 4 * float(few.std()) / 300**0.5 + 1e-6


def test_a_layer_that_does_nothing_gains_nothing():
    supernet, architect = make()
    supernet.layers["blocks.2"].lora_B.data.zero_()
    _, (gains,) = architect.path(loss_of(supernet), batch())
    assert gains[2] == 0 and (gains[[0, 1, 3]] != 0).all()


def test_energies_are_those_of_single_rows_and_gates():
    supernet, architect = make()
    x, y = batch(rows=5)
    _, energies = architect.directions(loss_of(supernet), (x, y))
    scaling, columns = supernet.config.scaling, supernet.mean_gates().shape[1]
    for n in range(len(supernet.layers)):
        for r in range(columns):
            squares = []
            for row in range(5):
                gates = torch.ones(4, columns, dtype=torch.float64, requires_grad=True)
                changes = [
                    other.lora_B.detach() * (scaling * g) @ other.lora_A.detach()
                    for other, g in zip(supernet.layers.values(), gates, strict=True)
                ]
                loss = by_hand(supernet, (x[row : row + 1], y[row : row + 1]), changes).sum()
                squares.append(float(torch.autograd.grad(loss, gates)[0][n, r] ** 2))
            assert float(energies[n, r]) == pytest.approx(sum(squares) / 5, rel=1e-9, abs=1e-18)


def test_growth_and_cut_are_those_measured_by_hand():
    """Also of an odd number of steps: the half is what was before the last doubling."""
    steps = 5
    supernet, architect = make(steps=steps)
    loss_fn, val, seen, means = loss_of(supernet), batches(), [], []

    def recording(rows):
        seen.append(rows)
        return loss_fn(rows)

    for _ in range(steps):
        for layer in supernet.layers.values():
            layer.lora_B.data += 0.1 * torch.randn_like(layer.lora_B)
        architect.step(recording, val)
        with architect.mean.in_place():
            means.append(mean_changes(supernet))
    last = seen[-LAST:]
    whole, half = means[-1], means[steps // 2 - 1]

    def cut(delta, rank):
        left, values, right = torch.linalg.svd(delta)
        return left[:, :rank] * values[:rank] @ right[:rank]

    losses, before, uniform = (
        torch.stack([by_hand(supernet, rows, changes).mean() for rows in last])
        for changes in (whole, half, [cut(delta, 2) for delta in whole])
    )
    found = architect.measured
    close = {"rtol": 1e-5, "atol": 1e-6}  # losses are float32
    torch.testing.assert_close(found.losses.double(), losses, **close)
    torch.testing.assert_close(found.cut.double(), uniform - losses, **close)
    growth = (before - losses) / math.log2(steps / (steps // 2))
    torch.testing.assert_close(found.growth.double(), growth, **close)
    assert found.energies.shape[:2] == (LAST, 4) and found.gains.shape == (3, 4)


def test_without_a_budget_the_cut_to_each_candidate_and_the_base_model_are_measured():
    supernet, architect = make(budget_rank=None, steps=2)
    assert supernet.sizes == (0, 1, 2, 4) and supernet.budget == 2 * 4 * 32
    loss_fn, val = loss_of(supernet), list(batches(count=1 + LAST))
    given = iter(val)
    for _ in range(2):
        architect.step(loss_fn, given)
    assert next(given, None) is None, "on the same rows"
    changes = mean_changes(supernet)

    def cut(delta, rank):
        left, values, right = torch.linalg.svd(delta)
        return left[:, :rank] * values[:rank] @ right[:rank]

    def losses(cuts):
        return torch.stack([by_hand(supernet, rows, cuts).mean() for rows in val[1:]])

    whole, found = losses(changes), architect.measured
    close = {"rtol": 1e-5, "atol": 1e-6}  # losses are float32
    for place, rank in enumerate((1, 2, 4)):
        expected = losses([cut(delta, rank) for delta in changes]) - whole
        torch.testing.assert_close(found.cuts[:, place].double(), expected, **close)
    base = losses([torch.zeros_like(delta) for delta in changes])
    torch.testing.assert_close(found.base.double(), base, **close)
    counted = search_passes(2, 1, cuts=3)
    assert counted == pytest.approx(search_passes(2, 1) + LAST * 4 / 3)


def test_with_a_budget_sizes_are_not_measured():
    supernet, architect = make(steps=2)
    for _ in range(2):
        architect.step(loss_of(supernet), batches())
    assert supernet.sizes == () and not len(architect.measured.base)
    assert not len(architect.measured.cuts)


def test_energies_at_the_end_are_of_the_singular_directions():
    supernet, architect = make(steps=1)
    loss_fn, val = loss_of(supernet), list(batches(count=1 + LAST))
    architect.step(loss_fn, iter(val))
    with architect.mean.in_place(), supernet.in_directions():
        expected = [architect.directions(loss_fn, rows)[1] for rows in val[1:]]
    torch.testing.assert_close(architect.measured.energies, torch.stack(expected))


def test_alpha_follows_from_the_values_of_all_that_was_measured():
    supernet, architect = make(steps=6)
    loss_fn, val, start = loss_of(supernet), batches(), supernet.alpha.detach().clone()
    for step in range(1, 7):
        metrics = architect.step(loss_fn, val)
        if step <= 3:
            assert metrics is None and torch.equal(supernet.alpha, start)
            continue
        values = architect.values.table(architect.measured)
        alpha, price = distribution(values, supernet.costs, supernet.budget)
        assert len(architect.measured.gains) == step - 3
        torch.testing.assert_close(supernet.alpha.data, alpha)
        assert supernet.price == price
        assert float(metrics["expected_parameters"]) == pytest.approx(supernet.budget, rel=1e-9)
        assert float(metrics["gain"]) == pytest.approx(float(architect.measured.gains[-1].sum()))


@pytest.mark.parametrize("every", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("steps", [1, 2, 7, 12])
def test_steps_are_due_in_the_second_half_and_behind_the_last(steps, every):
    supernet, architect = make(steps=steps, arch_every=every)
    taken, due = [], []
    val = (taken.append(i) or batch() for i in itertools.count())
    for step in range(1, steps + 1):
        if architect.step(loss_of(supernet), val) is not None:
            due.append(step)
    assert due == [s for s in range(1, steps + 1) if s > steps // 2 and (steps - s) % every == 0]
    assert due[-1] == steps and len(architect.measured.gains) == len(due)
    assert len(taken) == len(due) + LAST
    passes = len(due) + LAST * (1 + (2 if steps > 1 else 1) / 3)
    assert search_passes(steps, every) == pytest.approx(passes, abs=LAST / 3 * (steps == 1))


def test_it_is_measured_at_the_mean_of_the_weights():
    supernet, architect = make(steps=2)
    val = [batch() for _ in range(1 + LAST)]
    for _ in range(2):
        for weight in supernet.weight_parameters():
            weight.data += torch.randn_like(weight)
        architect.step(loss_of(supernet), iter(val))
    still, reference = make(steps=1)
    still.model.load_state_dict(supernet.model.state_dict())
    for weight, mean in zip(still.weight_parameters(), architect.mean.values, strict=True):
        weight.data.copy_(mean)
    torch.manual_seed(0)
    _, (expected,) = reference.path(loss_of(still), val[0])
    torch.manual_seed(0)
    with architect.mean.in_place():
        _, (found,) = architect.path(loss_of(supernet), val[0])
    torch.testing.assert_close(found, expected)
    reference.step(loss_of(still), iter(val))
    torch.testing.assert_close(architect.measured.energies, reference.measured.energies)


def test_small_gradients_in_float16_are_scaled_as_the_weights_are():
    supernet, exact = make(torch.float32)
    rows, small = batch(torch.float32), 2.0**-18

    def loss_fn(batch):
        with torch.autocast("cpu", torch.float16):
            return loss_of(supernet)(batch) * small

    def gains(architect, loss_fn):
        torch.manual_seed(0)
        loss, (gains,) = architect.path(loss_fn, rows)
        return architect._reduced(gains, loss)

    wanted = gains(exact, lambda batch: loss_of(supernet)(batch) * small)
    found = {}
    for scale in (None, 2.0**14, 2.0**60):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        found[scale] = gains(Architect(supernet, 4, scaler=scaler), loss_fn)
    error = {s: float((g - wanted).norm() / wanted.norm()) for s, g in found.items()}
    assert error[None] > 0.3 > 0.05 > error[2.0**14]
    assert not found[2.0**60].any(), "what overflows counts as 0"


@pytest.mark.parametrize("steps", [1, 4])
def test_touches_nothing_but_alpha(steps):
    supernet, architect = make(torch.float32, steps=steps)
    loss_fn, weights = loss_of(supernet), supernet.weight_parameters()
    optimizer = torch.optim.AdamW(weights)
    val = batches(torch.float32)
    for _ in range(steps):
        loss_fn(batch(torch.float32)).backward()
        optimizer.step()
        before = [w.detach().clone() for w in weights], [w.grad.clone() for w in weights]
        state = copy.deepcopy(optimizer.state_dict())
        alphas = supernet.alpha.detach().clone()
        due = architect.step(loss_fn, val) is not None
        assert all(torch.equal(w, b) for w, b in zip(weights, before[0], strict=True))
        assert all(torch.equal(w.grad, b) for w, b in zip(weights, before[1], strict=True))
        for new, old in zip(optimizer.state.values(), state["state"].values(), strict=True):
            assert all(torch.equal(new[key], old[key]) for key in old)
        assert torch.equal(supernet.alpha, alphas) != due
        assert supernet.alpha.grad is None
    assert architect.measured.gains.any()


def test_weight_steps_leave_alpha_and_what_was_measured_alone():
    supernet, architect = make(torch.float32, steps=4)
    loss_fn, val = loss_of(supernet), batches(torch.float32)
    for _ in range(3):
        architect.step(loss_fn, val)
    alphas, gains = supernet.alpha.detach().clone(), architect.measured.gains.clone()
    optimizer = torch.optim.AdamW(supernet.weight_parameters(), weight_decay=0.1)
    for _ in range(3):
        loss_fn(batch(torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(supernet.alpha, alphas) and supernet.alpha.grad is None
    assert torch.equal(architect.measured.gains, gains)


def other_model(supernet, batch):
    return residual(seed=1).double()(batch[0]).pow(2).mean()


def other_trained_model(supernet, batch):
    return other_model(supernet, batch) + supernet.model.extra.sum()


LOSSES = {
    "another model": other_model,
    "another model that learns": other_trained_model,
    "detached": lambda supernet, batch: loss_of(supernet)(batch).detach(),
    "a number": lambda supernet, batch: torch.tensor(loss_of(supernet)(batch).item()),
    "past the call": lambda supernet, batch: supernet.model.forward(batch[0]).pow(2).mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_does_not_depend_on_alpha_is_refused(loss):
    supernet, architect = make(steps=1)
    supernet.model.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match="loss_fn: its loss does not depend on alpha"):
        architect.step(lambda batch: loss(supernet, batch), batches())
    assert not len(architect.measured.gains)


class Skipping(nn.Module):
    """Rows of negative sum reach no layer, as text reaches no vision tower."""

    def __init__(self):
        super().__init__()
        self.inner, self.own = residual(), nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x * self.own


def test_rows_that_reach_no_layer_count_as_a_gain_of_0():
    supernet, architect = make(steps=2, model=Skipping(), modules_to_save=["inner.blocks.3"])
    supernet.model.own.requires_grad_()
    x, y = batch()
    loss, (gains,) = architect.path(loss_of(supernet), (-x.abs(), y))
    assert loss > 0 and gains.shape == (3,) and not gains.any()
    assert architect.path(loss_of(supernet), (x.abs(), y))[1][0].all()


@pytest.mark.parametrize("what", ["rows", "infinite"])
def test_a_measurement_that_is_not_finite_leaves_alpha_alone(what):
    supernet, architect = make(steps=4)
    loss_fn, good = loss_of(supernet), batch()
    for _ in range(3):
        architect.step(loss_fn, iter([good]))
    before, gains = supernet.alpha.detach().clone(), architect.measured.gains.clone()
    bad = batch(rows=0) if what == "rows" else (good[0] * torch.inf, good[1])
    weights = [w.detach().clone() for w in supernet.weight_parameters()]
    for val in ([bad], [good, good, bad, *[good] * LAST]):
        with pytest.raises(DivergedError, match=r"validation loss nan\): alpha was left as it was"):
            architect.step(loss_fn, iter(val))
        assert torch.equal(supernet.alpha, before) and torch.equal(architect.measured.gains, gains)
        assert all(map(torch.equal, supernet.weight_parameters(), weights))
        architect.taken -= 1


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8])
def test_state_round_trip(at):
    """Before half of the search, in its second half, and behind its last step."""
    steps, rows = 8, list(batches(torch.float32))
    supernet, architect = make(torch.float32, steps=steps)
    twin, other = make(torch.float32, steps=steps)
    for step in range(1, steps + 1):
        for weight in supernet.weight_parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        random = torch.get_rng_state()
        architect.step(loss_of(supernet), iter(rows))
        if step > at:
            twin.load_state_dict(supernet.state_dict() | alphas(twin))
            torch.set_rng_state(random)
            other.step(loss_of(twin), iter(rows))
        elif step == at:
            twin.load_state_dict(supernet.state_dict())
            state = copy.deepcopy(architect.state_dict())
            assert bool(state["half"]) == (at >= steps // 2)
            other.load_state_dict(state)
    assert torch.equal(supernet.alpha, twin.alpha) and supernet.price == twin.price
    for name, value in vars(architect.measured).items():
        assert torch.equal(value, getattr(other.measured, name)), name


def alphas(supernet):
    return {name: v for name, v in supernet.state_dict().items() if name.endswith(".alpha")}


class Twice(nn.Module):
    """A loss over two calls of the model, as those of preferences are: unlike numbers of rows."""

    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x):
        return self.inner(x)


def test_all_calls_of_one_loss_have_the_same_gates():
    supernet, architect = make(model=Twice())
    seen, rows = [], batch()

    def loss_fn(batch):
        outputs = []
        for _ in range(2):
            outputs.append(supernet.model(batch[0]))
            seen.append(next(iter(supernet.layers.values())).gates)
        assert torch.equal(*outputs)
        return (outputs[0] - batch[1]).pow(2).mean() + outputs[1].pow(2).mean()

    _, (twice,) = architect.path(loss_fn, rows)
    assert torch.equal(*seen)
    places = seen[0][:, 0] / supernet.mean_gates()[0, 0]
    with mock.patch("torch.rand", lambda *_, **__: places[0].detach()):
        parts = [
            architect.path(part, rows)[1][0]
            for part in (
                lambda b: (supernet.model(b[0]) - b[1]).pow(2).mean(),
                lambda b: supernet.model(b[0]).pow(2).mean(),
            )
        ]
    torch.testing.assert_close(twice, parts[0] + parts[1])


def test_calls_of_unlike_rows_in_one_loss_all_count():
    supernet, architect = make(model=Twice())
    x, y = batch()

    def loss_fn(batch):
        whole = (supernet.model(x) - y).pow(2).mean()
        return whole + (supernet.model(x[:3]) - y[:3]).pow(2).mean()

    found = torch.stack([architect.path(loss_fn, None)[1][0] for _ in range(400)])
    adapted = mean_changes(supernet)
    both = [
        by_hand(supernet, (x, y), [part * d for d in adapted]).mean()
        + by_hand(supernet, (x[:3], y[:3]), [part * d for d in adapted]).mean()
        for part in (0, 1)
    ]
    gain, sums = float(both[0] - both[1]), found.sum(-1)
    assert abs(float(sums.mean()) - gain) < 4 * float(sums.std()) / 20 + 1e-6
