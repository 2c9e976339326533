"""Rivals of quality.py at equal cost: as many passes each, and each does what its paper says.
Not here: how well they do (recipes/benchmark/README.md), the cells of a run (test_quality.py)."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from peft.tuners.adalora import RankAllocator

from darts_lora import Genotype, SearchConfig
from darts_lora.architect import LAST
from darts_lora.config import TrainingConfig

STEPS, ROWS = 16, 8
EQUAL = ("uniform", "one_run", "one_run_scratch", "adalora_run", "gora", "gora_init", "cut_heal")
EQUAL += ("cut_heal_fisher", "autolora")


@pytest.fixture(scope="module")
def task(quality_options):
    import quality

    options, *rest = quality_options
    training = TrainingConfig(max_steps=STEPS, batch_size=ROWS, learning_rate=0.03)
    options = replace(options, exact_match=False, stack=2)
    return quality.Task(options, *rest[:-1], training)


def cell_of(method, seed=0):
    from quality_cells import Cell
    from quality_methods import METHODS

    find_rate = 0.03 if METHODS[METHODS[method].plan_of or method].trains else None
    return Cell("final", method, 2, seed, find_rate, 0.03)


def trained(task, tmp_path, cells):
    """The records of cells, behind those that find their plans."""
    from quality_cells import Store

    store = Store(tmp_path)
    plans = [cell.plan for cell in cells]
    for plan, record in zip(plans, task.compute(plans, store), strict=True):
        store.put(plan, record)
    return [store.get(plan) for plan in plans], task.compute(cells, store)


@pytest.mark.parametrize("method", EQUAL)
def test_every_way_has_as_many_passes(task, tmp_path, method):
    """Rows that go forward to go backward, those of finding ranks among them, in batches."""
    seen = []
    embeddings = task.retrainer.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(
        lambda module, args, y: seen.append(len(args[0]) * torch.is_grad_enabled())
    )
    _, (record,) = trained(task, tmp_path, [cell_of(method)])
    hook.remove()
    part = task.retrainer.training.validation_batch_size
    looks = LAST * part * 2 / 3 if method.startswith("one_run") else 0  # forwards alone, two each
    assert STEPS - 1 <= (sum(seen) + looks) / ROWS <= STEPS
    assert 0 < record["loss"] < 10 and record["parameters"] <= task.setting(cell_of(method)).budget


@pytest.mark.parametrize("method", ["cut_heal_fisher", "autolora"])
def test_plans_that_are_found_at_once_are_those_of_each_alone(task, tmp_path, method):
    import quality

    cells = [cell_of(method, seed) for seed in (0, 1)]
    together, records = trained(task, tmp_path, cells)
    assert quality._together(cells[0].plan, cells[1].plan)
    assert not quality._together(cells[0].plan, cell_of("uniform").plan)
    alone, (record,) = trained(task, tmp_path, cells[1:])
    assert (together[1]["ranks"], together[1]["stack"]) == (alone[0]["ranks"], 2)
    assert records[1]["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert together[0]["ranks"] != together[1]["ranks"]


def logits(model, task):
    from quality_rows import model_inputs

    with torch.no_grad():
        return model.eval()(**model_inputs(task.rows.batch(range(6)))).logits


def test_a_converted_adalora_is_adalora(task):
    from quality_peft import adalora_model, plain_lora, train_adalora
    from quality_setting import parameters

    setting = task.setting(cell_of("adalora_run").plan)
    shapes = setting.retrainer.shapes
    budget = round(0.8 * setting.budget)  # fewer parameters than its singular values would have
    with adalora_model(setting, STEPS) as model:
        train_adalora(model, setting, budget)
        own = logits(model, task)
        weights = plain_lora(model, setting.retrainer.scaling)
        values = [p for n, p in model.named_parameters() if "lora_E" in n]
    ranks = {name: len(a) for name, (a, _) in weights.items()}
    assert sum(ranks.values()) == sum(int((value != 0).sum()) for value in values)
    assert 0.9 * budget < parameters(ranks, shapes) <= budget
    assert len(set(ranks.values())) > 1
    base = setting.retrainer.model
    plain = get_peft_model(base, Genotype(ranks, setting.retrainer.scaling).to_lora_config(base))
    for name, (a, b) in weights.items():
        if len(a):
            layer = plain.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    theirs = logits(plain, task)
    plain.unload()
    base.requires_grad_(False)
    torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-5)
    assert (theirs - logits(base, task)).abs().max() > 1e-2, "nothing was trained"


def test_adaloras_importance_is_pefts(task):
    from quality_peft import adalora_model, importance, update_importance

    setting = task.setting(cell_of("adalora_run").plan)
    with adalora_model(setting, STEPS) as model:
        ours = model.base_model.rankallocator
        theirs = deepcopy(ours)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            update_importance(ours, model.base_model.model)
            RankAllocator.update_ipt(theirs, model.base_model.model)
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        scores = importance(ours, setting.retrainer.shapes)
        kept = theirs.mask_to_budget(model.base_model.model, 20)
    flat = torch.cat(list(scores.values())).sort(descending=True).values
    assert {n: (s > flat[20]).tolist() for n, s in scores.items()} == {
        name.removesuffix(".lora_E.default"): mask for name, mask in kept.items()
    }


def test_a_cut_that_leaves_the_rank_as_it_is_changes_nothing(task, monkeypatch):
    import quality_rivals
    from quality_training import Retraining

    monkeypatch.setattr(quality_rivals, "LARGE", 1)
    setting = task.setting(cell_of("cut_heal").plan)
    (found,) = quality_rivals.cut_heal([setting])
    assert set(found.ranks.values()) == {2}
    assert found.notes == {"taken": 14, "run_steps": STEPS, "read": 14}
    plan = dict.fromkeys(setting.retrainer.shapes, 2)
    job = Retraining(plan, setting.indices, 0, 0.03, until=14)
    setting.retrainer.retrain([job], setting.rows)
    for name, (a, b) in setting.retrainer.trained().items():
        cut_a, cut_b = setting.kept[name]
        torch.testing.assert_close((cut_b @ cut_a).float(), b[:, :2] @ a[:2])


def test_the_order_of_rows_goes_on(task):
    from quality_training import Retraining

    jobs = [Retraining({}, task.all, seed, 0.03) for seed in (0, 1)]
    whole = task.retrainer.order(jobs, task.rows, 9)
    rest = task.retrainer.order([replace(job, read=4) for job in jobs], task.rows, 5)
    assert whole[4:] == rest and whole[:5] != rest


def test_the_columns_of_the_largest_score_over_cost_are_kept():
    from quality_rivals import _keep_best

    shapes = {"wide": (10, 10), "narrow": (2, 3)}
    kept = {}
    retrainer = SimpleNamespace(shapes=shapes)
    setting = SimpleNamespace(retrainer=retrainer, budget=25, kept=kept)
    weights = {name: (torch.arange(4.0)[:, None], torch.arange(4.0)[None]) for name in shapes}
    scores = {"wide": torch.tensor([1.0, 0.0, 9.0]), "narrow": torch.tensor([0.0, 3.0, 0.0])}
    assert _keep_best(setting, weights, scores) == {"wide": 1, "narrow": 1}
    assert kept["wide"][0].tolist() == [[2.0]] and kept["narrow"][1].tolist() == [[1.0]]


def test_the_score_of_a_column_is_what_it_adds_to_the_loss(task):
    from quality_rows import supervised_losses

    retrainer, rows, name = task.retrainer, task.rows, next(iter(task.retrainer.shapes))
    torch.manual_seed(0)
    weights = {n: (torch.randn(1, 2, i) / 8, torch.randn(1, o, 2) / 8)
               for n, (i, o) in retrainer.shapes.items()}  # fmt: skip
    for gates in retrainer.gates.values():
        gates.fill_(retrainer.scaling)
    retrainer.load(weights)
    batches = [rows.batch(range(k, k + ROWS)) for k in (0, ROWS)]
    found = retrainer.column_scores(batches)[name]
    wanted, seen = 0.0, {}
    with retrainer.adapters() as model:
        layer = model.get_submodule(name)
        hook = layer.register_forward_hook(
            lambda module, args, y: seen.update(x=args[0], y=y.requires_grad_())
        )
        for batch in batches:
            loss = supervised_losses(model, batch).sum()
            (g,) = torch.autograd.grad(loss, seen["y"])
            a, b = (w[0] for w in weights[name])
            terms = retrainer.scaling * (seen["x"] @ a.T) * (g @ b)
            wanted = wanted + terms.square().sum((0, 1))
        hook.remove()
    assert wanted.min() > 0
    torch.testing.assert_close(found[0, :2], wanted.detach(), rtol=1e-3, atol=1e-12)


def test_gate_gradients_are_slopes_of_the_loss(task):
    from quality_training import Retraining

    retrainer, rows, name = task.retrainer, task.rows, list(task.retrainer.shapes)[3]
    plan = dict.fromkeys(retrainer.shapes, 2)
    jobs = [Retraining(plan, task.all, seed, 0.03, until=3) for seed in (0, 1)]
    batch = rows.batch(range(ROWS), range(ROWS, 2 * ROWS))
    slopes = []

    def between(step):
        if step == 3:
            _, gradients = retrainer.gate_gradients(batch)
            slopes.append(gradients[list(retrainer.shapes).index(name)][1, 0, 1])
            for change in (1e-2, -2e-2):
                retrainer.gates[name][1, 0, 1] += change
                slopes.append(retrainer.gate_gradients(batch)[0][1])

    retrainer.retrain(jobs, rows, between)
    slope, above, below = map(float, slopes)
    assert slope == pytest.approx((above - below) / 2e-2, rel=0.05) and slope != 0


def test_goras_ranks_and_first_step(task):
    from quality_rivals import GORA_RATE, gora, mean_gradients
    from quality_rows import mean_loss
    from quality_training import Retraining

    setting = task.setting(cell_of("gora_init").plan)
    retrainer, shapes = setting.retrainer, setting.retrainer.shapes
    found = gora(setting, starts=True)
    assert (found.notes["run_steps"], found.notes["read"]) == (STEPS - 4, 4)
    worth = dict(zip(shapes, found.notes["importance"], strict=True))
    order = sorted(worth, key=lambda name: worth[name] / sum(shapes[name]))
    assert found.ranks[order[0]] < found.ranks[order[-1]] <= 8
    name = order[-1]
    mean, weight = mean_gradients(setting, 4)[name], retrainer.originals[name].weight
    assert worth[name] == pytest.approx(float((weight * mean).abs().mean()), rel=1e-4)
    a, b = setting.kept[name]
    step = GORA_RATE * (shapes[name][0] / len(a)) ** 0.5
    projected = mean @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(retrainer.scaling * b @ a, -step * projected, rtol=1e-3, atol=1e-6)
    losses = []
    for first_b in ({}, {n: pair[1] for n, pair in setting.kept.items()}):
        first = {n: pair[0] for n, pair in setting.kept.items()}
        job = Retraining(found.ranks, task.all, 0, 0.03, first, first_b, taken=5, run_steps=5)
        (record,) = retrainer.retrain([job], task.rows)
        assert record["train_loss"] is None, "no step was taken"
        with retrainer.adapters() as model:
            losses.append(mean_loss(model, task.rows, task.all, 48))
    assert losses[1] < losses[0], "the loss falls at once"


def test_autolora_keeps_the_largest_shares_of_all_layers(task, monkeypatch):
    import quality_rivals

    setting = task.setting(cell_of("autolora").plan)
    seen = {}
    monkeypatch.setattr(
        quality_rivals,
        "largest_values",
        lambda values, *rest: seen.update(values) or {n: v > 1 for n, v in values.items()},
    )
    (found,) = quality_rivals.autolora([setting])
    assert found.ranks == {name: int((v > 1).sum()) for name, v in seen.items()}
    assert {len(value) for value in seen.values()} == {4}
    for name, value in seen.items():
        gates = setting.retrainer.gates[name][0, 0]
        assert float(value.sum()) == pytest.approx(4) and value.std() > 1e-3, "alpha has moved"
        assert gates[:4].sum() == pytest.approx(setting.retrainer.scaling, rel=1e-5)
        torch.testing.assert_close(gates[:4], setting.retrainer.scaling * value / 4)
    assert setting.retrainer.gates["lm_head" if "lm_head" in seen else name].shape[-1] == 4


@pytest.mark.parametrize(
    ("ways", "rates", "wanted"),
    [(["one_run"], [0.01], {"one_run"}), (["one_run"], [0.01, 0.03], {"one_run", "uniform"}),
     (["one_run", "uniform"], [0.01], {"one_run", "uniform"})],
)  # fmt: skip
def test_uniform_ranks_where_they_are_wanted(quality_options, tmp_path, ways, rates, wanted):
    from quality_cells import Store, cells

    options = replace(quality_options[0], methods=ways, learning_rates=rates)
    store, done = Store(tmp_path), set()
    while cell := next((c for c in cells(options, store) if not store.get(c)), None):
        done.add(cell.method)
        store.put(cell, {"loss": 1.0, "ranks": []})
    assert done == wanted


@pytest.mark.parametrize("rates", [[0.01], [0.01, 0.03]])
def test_adalora_has_the_uniform_ranks_rate_or_its_own(quality_options, tmp_path, rates):
    from quality_cells import Store, cells

    options = replace(quality_options[0], methods=["adalora_run"], learning_rates=rates)
    store, done = Store(tmp_path), []
    while cell := next((c for c in cells(options, store) if not store.get(c)), None):
        done.append(cell)
        store.put(cell, {"loss": abs(0.03 - (cell.rate or 0)), "ranks": []})
    assert {cell.method for cell in done} == {"adalora_run"}, "uniform ranks say nothing of it"
    assert {(c.find_rate, c.rate) for c in done if c.stage == "tune"} == {
        (rate, rate) for rate in rates if len(rates) > 1
    }
    assert [(c.find_rate, c.rate) for c in done if c.stage == "final"] == [(rates[-1], rates[-1])]


def test_weights_lie_beside_the_cells_until_they_are_trained(quality_options, tmp_path):
    import quality

    options, search, *rest, training = quality_options
    options = replace(
        options, methods=["gora_init"], output_dir=str(tmp_path), learning_rates=[0.01], curve=[2],
        exact_match=False, seeds=[0, 1],
    )  # fmt: skip
    kept, task = tmp_path / "tiny" / ".kept", quality.Task(options, search, *rest, training)
    store = quality.Store(tmp_path / "tiny")
    cell = cell_of("gora_init")
    (record,) = task.compute([cell.plan], store)
    store.put(cell.plan, record)
    assert [path.stem for path in kept.iterdir()] == [cell.plan.name]
    weights = store.kept(cell.plan)
    job = task._job(cell, store)
    assert job.first_b.keys() == weights.keys() == task.retrainer.shapes.keys()
    quality._compute([cell], task, store)
    assert store.get(cell)["loss"] > 0 and not list(kept.iterdir())
    again = task._job(cell, store)  # found anew
    for name, b in job.first_b.items():
        torch.testing.assert_close(again.first_b[name], b)


def test_one_threshold_for_all_layers():
    from quality_setting import largest_values

    shapes = {"wide": (10, 10), "narrow": (2, 3)}
    values = {"wide": torch.tensor([3.0, 9.0, 8.0]), "narrow": torch.tensor([1.0, 2.0])}
    kept = largest_values(values, shapes, 48)
    assert {name: mask.tolist() for name, mask in kept.items()} == {
        "wide": [False, True, True], "narrow": [False, True],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, (71, 18)), ({"search_fraction": 0.25, "arch_every": 1}, (68, 29)),
     ({"arch_every": 4}, (72, 17))],
)  # fmt: skip
def test_the_search_is_paid_for_with_weight_steps(options, wanted):
    from quality_setting import Setting

    retrainer = SimpleNamespace(training=TrainingConfig(max_steps=80))
    stand_in = SimpleNamespace(retrainer=retrainer, search=SearchConfig(**options))
    steps, passes = Setting.steps_with_search(stand_in)
    assert (steps, passes) == wanted


def made_up(folder, method, budget, losses, steps=10, **more):
    return [
        {"stage": "final", "method": method, "budget": budget, "seed": seed, "loss": loss,
         "parameters": 100 * budget, "task": "a", "folder": folder, "steps": steps,
         "workers": 1} | more
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def test_the_table_at_equal_cost(benchmark_imports):
    from quality_cost import equal_cost
    from quality_statistics import table

    records = made_up("r1", "uniform", 1, [1.0, 1.2]) + made_up("r2", "uniform", 2, [0.8, 1.0])
    records += made_up("r2", "uniform", 2, [0.1, 0.1], steps=20)
    records += made_up("r1", "gora", 1, [0.7, 1.1, 0.5]) + made_up("fast", "gora", 1, [1.1, None])
    records += made_up("other", "gora", 1, [0.5], task="b")
    records += [r | {"stage": "find", "expected_ranks": ranks} for r, ranks in zip(
        made_up("r1", "gora", 1, [0, 0]), ([1, 2, 3], [1, 3, 2]), strict=True)]  # fmt: skip
    rows = {(r["folder"], r["method"], r["steps"]): r for r in equal_cost(table(records))}
    row = rows["r1", "gora", 10]
    assert (row["seeds"], row["uniform"]) == (3, pytest.approx(1.1))
    assert row["difference"] == pytest.approx(-0.2), "of the two seeds that both have"
    assert row["interval"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert row["saved"] == pytest.approx(1 - 100 / 200), "at 0.9 uniform needs rank 2"
    assert row["spearman"] == pytest.approx(0.5)
    fast = rows["fast", "gora", 10]
    assert (fast["diverged"], fast["interval"]) == (1, None)
    assert fast["difference"] == pytest.approx(0.1)
    assert rows["other", "gora", 10]["difference"] is None, "of other rows"


def test_the_table_of_a_folder(task, tmp_path, capsys):
    import quality_cost
    from quality_cells import Store

    folder = tmp_path / "task"
    store = Store(folder, "digest")
    for method in ("uniform", "one_run"):
        for seed in (0, 1):
            cell = cell_of(method, seed)
            found = {"ranks": [1, 2], "parameters": 9, "expected_ranks": [1.0, 2.0 + seed]}
            store.put(cell.plan, found | {"workers": 1})
            store.put(cell, {"loss": 1.0 - 0.1 * (method == "one_run"), "parameters": 9,
                             "workers": 1})  # fmt: skip
    (folder / "options.json").write_text(json.dumps({"max_steps": 4}))
    quality_cost.main(quality_cost.CostRun(str(tmp_path)))
    rows = json.loads((tmp_path / "equal_cost.json").read_text())
    assert [row["method"] for row in rows] == ["uniform", "one_run"]
    assert rows[1]["difference"] == pytest.approx(-0.1) and rows[1]["spearman"] > 0.99
    assert "| one_run | 2 |" in (tmp_path / "equal_cost.md").read_text()
    assert "-0.1000" in capsys.readouterr().out


def test_the_published_table_comes_from_the_published_cells(benchmark_imports, tmp_path):
    import quality_cost

    published = Path(quality_cost.__file__).parent / "results" / "equal_cost"
    for path in published.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    quality_cost.main(quality_cost.CostRun(str(tmp_path)))
    assert (tmp_path / "equal_cost.md").read_text() == (published / "equal_cost.md").read_text()
