import copy
from functools import partial

import pytest
import torch
from torch import nn

from mmformer.checkpoints import SavedModel, build, load_model, save_model
from mmformer.compress.costs import Latency, Operations, Parameters, operations
from mmformer.compress.criteria import Activation, ForEverySubset, Given, Magnitude, Subject, Taylor, gated, samples
from mmformer.compress.plain import node, unrolled
from mmformer.compress.prune import Plan, masked, plan, prune
from mmformer.compress.sites import Channels, Heads, Layers, find_sites, inside
from mmformer.encoders import Encoder, TextEmbedder
from mmformer.model import Model
from mmformer.nn import Attention, Block, Transformer
from tests.compress.models import CONFIG, batch_of, saved_model


def sites_of(saved):
    return list(find_sites(saved.model, unrolled(saved.config["model"])))


def some(site, generator):
    """A random choice of units, at least one."""
    count = int(torch.randint(1, site.count + 1, (), generator=generator))
    return tuple(sorted(torch.randperm(site.count, generator=generator)[:count].tolist()))


def random_plan(saved, seed):
    generator = torch.Generator().manual_seed(seed)
    sites = tuple(sites_of(saved))
    return Plan(sites, tuple(some(site, generator) for site in sites), 1.0, 0.5, "parameters")


def answers(model, batch):
    encoded = model.encode(batch)
    return {"answer": model.output(encoded, "answer")[0], "picture": model.output(encoded, "picture", "image")[0]}


def test_every_place_that_can_be_cut_is_found_by_the_names_that_the_config_has():
    saved = saved_model()
    found = {site.paths[0]: site for site in sites_of(saved)}
    assert {name for name, site in found.items() if isinstance(site, Layers)} == {
        "encoders.image.stages.0", "fusion.transformer",
    }  # fmt: skip
    cross = found["fusion.transformer.layers.0.cross"]
    assert isinstance(cross, Heads)
    assert (cross.count, cross.each, cross.dims) == (2, 1, (12, 12))
    grouped = found["fusion.transformer.layers.0.attention"]
    assert (grouped.count, grouped.each, grouped.dims) == (2, 2, (6, 6))
    assert isinstance(found["encoders.image.stages.0.layers.1.feedforward"], Channels)  # by default, not in the config
    assert found["encoders.text.stages.0.layers.0.feedforward.part"].gated
    assert not any("normed" in name or "linear" in name for name in found)
    assert inside(cross, found["fusion.transformer"], 0)
    assert not inside(cross, found["fusion.transformer"], 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_pruned_model_is_the_model_with_what_is_gone_silenced(seed):
    saved, batch = saved_model(), batch_of(11)
    saved.model.double()
    chosen = random_plan(saved, seed)
    pruned = prune(saved, chosen)
    assert pruned.model is not saved.model
    pruned.model.double()
    pruned.model.load_state_dict({k: v for k, v in pruned.model.state_dict().items()})
    with masked(saved.model, chosen):
        wanted = answers(saved.model, batch)
        torch.stack([x.square().mean() for x in wanted.values()]).sum().backward()
    got = answers(pruned.model, batch)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-7)
    torch.stack([x.square().mean() for x in got.values()]).sum().backward()
    theirs = {name: p.grad for name, p in saved.model.named_parameters()}
    for name, p in pruned.model.named_parameters():
        if name in theirs and theirs[name] is not None and p.shape == theirs[name].shape and ".layers." not in name:
            torch.testing.assert_close(p.grad, theirs[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_what_is_left_are_those_under_the_mask(dtype):
    saved, batch = saved_model(), batch_of(9)
    sites = [site for site in sites_of(saved) if not isinstance(site, Layers)]
    kept = tuple(tuple(range(1, site.count)) for site in sites)
    chosen = Plan(tuple(sites), kept, 1.0, 0.9, "parameters")
    pruned = prune(saved, chosen)
    grads = []
    for model, context in ((saved.model, masked(saved.model, chosen)), (pruned.model, None)):
        with context or torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            answers(model, batch)["answer"].float().square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, mine in grads[1].items():
        theirs = grads[0][name]
        if mine.shape == theirs.shape:
            close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
            torch.testing.assert_close(mine, theirs, **close, msg=lambda m, n=name: f"{n}: {m}")
    heads = next(site for site in sites if site.paths[0].endswith("layers.0.cross"))
    rows = grads[0]["fusion.transformer.layers.0.cross.query.weight"]
    assert not rows[:12].any()  # of the silenced head
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    mine = grads[1]["fusion.transformer.layers.0.cross.query.weight"]
    torch.testing.assert_close(mine, rows[12:], rtol=tolerance, atol=tolerance)
    assert heads.count == 2


def test_a_pruned_model_is_saved_and_opened_like_any_other(tmp_path):
    saved, batch = saved_model(), batch_of(9)
    pruned = prune(saved, random_plan(saved, 3))
    save_model(tmp_path / "model", pruned.model, pruned.config, None, pruned.objectives)
    again = load_model(tmp_path / "model")
    for name, values in answers(again.model, batch).items():
        assert torch.equal(values, answers(pruned.model, batch)[name])
    assert again.config["compressed"]["sites"]
    twice = prune(again, random_plan(again, 4))
    assert sum(p.numel() for p in twice.model.parameters()) < sum(p.numel() for p in saved.model.parameters())


def test_a_part_that_is_shared_is_cut_once_and_stays_shared():
    saved = saved_model(shared={"encoders.audio.stages.0.layers.0": "encoders.text.stages.0.layers.0"})
    sites = sites_of(saved)
    assert not any(isinstance(site, Layers) for site in sites)
    both = [site for site in sites if len(site.paths) == 2]
    assert {len(site.paths) for site in both} == {2}
    pruned = prune(saved, Plan(tuple(both), ((0,), tuple(range(8))), 1.0, 0.5, "parameters"))
    model = pruned.model
    assert model.encoders["audio"].stages[0].layers[0] is model.encoders["text"].stages[0].layers[0]
    batch = batch_of(9)
    with masked(saved.model, Plan(tuple(both), ((0,), tuple(range(8))), 1.0, 0.5, "parameters")):
        wanted = answers(saved.model, batch)["answer"]
    torch.testing.assert_close(answers(model, batch)["answer"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", [Magnitude(), Taylor(), Taylor(squared=True), Activation()])
@pytest.mark.parametrize("cost", [Parameters(), Operations()])
@pytest.mark.parametrize("share", [0.8, 0.55])
def test_the_budget_is_what_the_pruned_model_costs(criterion, cost, share):
    saved, batches = saved_model(), [batch_of(12, seed) for seed in (0, 1)]
    chosen = plan(saved, batches, criterion, cost, share)
    pruned = prune(saved, chosen)
    price = (
        (lambda model: sum(p.numel() for p in model.parameters()))
        if isinstance(cost, Parameters)
        else (lambda model: operations(model, batches[0]))
    )
    assert chosen.after / chosen.before <= share
    assert price(pruned.model) / price(saved.model) == pytest.approx(chosen.after / chosen.before, rel=0.01)


def test_latency_is_a_table_of_measurements():
    saved, batches = saved_model(), [batch_of(12)]
    prices = Latency(rounds=1)(saved.model, sites_of(saved), batches[0])
    assert prices.total > 0
    assert all(len(curve) == site.count + 1 for curve, site in zip(prices.curves, sites_of(saved), strict=True))
    assert all((curve >= 0).all() for curve in prices.curves)
    chosen = plan(saved, batches, Magnitude(), Latency(rounds=1), 0.97)
    assert chosen.unit == "seconds"


def test_what_does_nothing_goes_first():
    """Heads and channels that nobody reads, and a layer that is the identity, score nothing and are cut."""
    saved, batches = saved_model(), [batch_of(12)]
    with torch.no_grad():
        layer = saved.model.get_submodule("encoders.image.stages.0.layers.1")
        for part in (layer.attention.out, layer.feedforward.down):
            part.weight.zero_()
            part.bias.zero_()
        saved.model.get_submodule("fusion.transformer.layers.0.cross.out").weight[:, :12] = 0
    for criterion in (Taylor(), Taylor(squared=True), Activation()):
        sites = sites_of(saved)
        scores = {
            site.paths[0]: score
            for site, score in zip(
                sites, criterion(Subject(saved.model, sites, saved.objectives, batches)), strict=True
            )
        }
        assert scores["fusion.transformer.layers.0.cross"].argmin() == 0
        assert float(scores["fusion.transformer.layers.0.cross"][0]) == pytest.approx(0, abs=1e-6)
        assert float(scores["encoders.image.stages.0"][1]) == pytest.approx(0, abs=1e-6)
        chosen = plan(saved, batches, criterion, Parameters(), 0.9)
        kept = dict(zip([site.paths[0] for site in chosen.sites], chosen.kept, strict=True))
        assert kept["encoders.image.stages.0"] == (0,)
        wanted, got = answers(saved.model, batches[0]), answers(prune(saved, chosen).model, batches[0])
        assert set(wanted) == set(got)


def test_taylor_is_the_slope_of_the_loss_in_the_gate():
    saved, batch = saved_model(), batch_of(12)
    saved.model.double()
    sites = [site for site in sites_of(saved) if isinstance(site, Heads)]
    subject = Subject(saved.model, sites, saved.objectives, [batch])
    scores = Taylor()(subject)
    step = 0.02  # the loss is in single precision
    for i, site in enumerate(sites):
        values = []
        for sign in (1, -1):
            gates = [torch.ones(s.count, dtype=torch.float64) for s in sites]
            gates[i][0] += sign * step
            with gated(saved.model, sites, gates), torch.no_grad():
                values.append(float(subject.loss(batch)))
        assert abs(values[0] - values[1]) / (2 * step) == pytest.approx(float(scores[i][0]), rel=0.02, abs=1e-4), site
    assert all(p.requires_grad for p in saved.model.parameters())


def test_what_one_modality_alone_needs_has_its_highest_score():
    """Of heads that only pictures go through, all other subsets say nothing."""
    saved, batches = saved_model(), [batch_of(24, subsets=(("text", "image", "audio"),))]
    sites = [site for site in sites_of(saved) if isinstance(site, Heads)]
    subject = Subject(saved.model, sites, saved.objectives, batches)
    criterion = ForEverySubset(Taylor())
    by_subset = criterion.by_subset(subject)
    assert set(by_subset) == {"t", "i", "a", "ti", "ta", "ia", "tia"}
    picture = next(i for i, site in enumerate(sites) if site.paths[0].startswith("encoders.image"))
    assert not by_subset["t"][picture].any()
    assert by_subset["i"][picture].all()
    for scores in by_subset.values():
        assert float(torch.cat(scores).sum()) == pytest.approx(1, rel=1e-5)
    best = criterion(subject)
    for i, score in enumerate(best):
        torch.testing.assert_close(score, torch.stack([part[i] for part in by_subset.values()]).amax(0))


def test_errors_name_the_figures():
    saved, batches = saved_model(), [batch_of(12)]
    with pytest.raises(ValueError, match=r"share=1\.5"):
        plan(saved, batches, Magnitude(), Parameters(), 1.5)
    with pytest.raises(ValueError, match=r"no more can be cut than to \d+% of the parameters, and the budget is 1%"):
        plan(saved, batches, Magnitude(), Parameters(), 0.01)
    bare = copy.deepcopy(saved)
    bare.config["model"]["fusion"]["transformer"]["layers"] = []
    with pytest.raises(ValueError, match="there are no scores of"):
        plan(saved, batches, Given({}), Parameters(), 0.5)
    with pytest.raises(ValueError, match="none of the objectives"):
        plan(SavedModel(model=saved.model, objectives={}, config=saved.config), batches, Taylor(), Parameters(), 0.5)


def test_layers_may_be_spared():
    saved, batches = saved_model(), [batch_of(12)]
    chosen = plan(saved, batches, Magnitude(), Parameters(), 0.7, layers=False)
    assert not any(isinstance(site, Layers) for site in chosen.sites)


def test_small_batches_hold_the_same_samples():
    parts = samples([batch_of(10)], 4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert [id for part in parts for id in part.ids] == list(batch_of(10).ids)


def test_an_unrolled_config_makes_the_same_model():
    config = unrolled(CONFIG)
    assert len(config["fusion"]["transformer"]["layers"]) == 2
    one, two = build(copy.deepcopy(CONFIG)), build(config)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in two.state_dict().items()}
    assert node(config, "fusion.transformer", two.fusion.transformer) is config["fusion"]["transformer"]
    assert node(config, "fusion.transformer", two.heads["answer"]) is None


def test_a_kernel_with_weights_of_its_own_is_left_whole():
    class Table(nn.Module):
        def forward(self, q, k, v, sight):
            return v

    attention = partial(Attention, num_heads=2, kernel=Table())
    stack = Transformer(8, 1, [partial(Block, attention=attention)])
    model = Model({"text": Encoder(TextEmbedder(8, 5), [stack])})
    assert not [site for site in find_sites(model, {}) if isinstance(site, Heads)]
