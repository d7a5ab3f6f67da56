from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmformer.heads import Head, VocabularyHead
from mmformer.losses import distill
from mmformer.model import Model
from mmformer.objectives import (
    Cache,
    Momentum,
    NextToken,
    SoftClasses,
    SoftLabels,
    SoftNumber,
    TaughtAttention,
    TaughtContrastive,
    TaughtEnergy,
    TaughtOutput,
    TaughtRelations,
    TaughtStates,
    TaughtTokens,
    Teacher,
    WithoutSome,
)
from mmformer.objectives.momentum import Taught
from mmformer.objectives.taught_states import Trace
from mmformer.objectives.teacher import Lessons
from mmformer.training.optim import Average
from mmformer.visibility import Visibility
from tests.helpers import random_batch, scramble, small_model
from tests.objectives.alignment import cross_model
from tests.processes import both

ALL = (("text", "image", "audio"),)
LAYER = "fusion.transformer.layers.1"
TEXT = "encoders.text.stages.0.layers.0"


def teacher_of(*models, cache=None, weight=1.0) -> Teacher:
    """A teacher whose runs are these models."""
    teacher = Teacher([str(i) for i in range(len(models))], cache, weight=weight)
    teacher.open(lambda run: (models[int(run)], f"mark {run}"))
    return teacher


def heard(model, batch, *objectives) -> tuple[dict, dict]:
    """The losses of objectives in a row, and what they share."""
    for objective in objectives:
        objective.prepare(model)
    encoded, found = model.encode(batch), {}
    for objective in objectives:
        found |= objective(model, encoded, batch)
    return found, encoded.shared


def said(model, batch, head="answer", source=None):
    return model.output(model.encode(batch), head, source)[0]


def counted(model) -> list:
    """Is filled whenever a model encodes texts."""
    calls: list = []
    model.encoders["text"].register_forward_hook(lambda *_: calls.append(1))
    return calls


def soft(student, teacher, temperature=2.0):
    target = (teacher.detach() / temperature).softmax(1)
    return temperature**2 * F.kl_div((student / temperature).log_softmax(1), target, reduction="batchmean")


def test_a_teacher_sees_all_of_a_batch_of_which_the_student_knows_one_modality():
    teacher, batch = small_model(), random_batch(9, subsets=ALL)
    texts = {"text": small_model().encoders["text"]}
    student = scramble(Model(texts, None, {"answer": Head(24, 7)}), seed=3)
    both = [teacher_of(teacher), TaughtOutput("answer", SoftClasses(2.0), source="text")]
    for objective in both:
        objective.prepare(student)
    # the fused answer of all modalities, which the text alone is to give
    both[1].source = None
    with pytest.raises(ValueError, match="no fusion"):
        both[0](student, encoded := student.encode(batch), batch), both[1](student, encoded, batch)
    fused = small_model(stream=["latent", "text"], context=())
    scramble(student := Model({"text": fused.encoders["text"]}, fused.fusion, dict(fused.heads)), seed=3)
    found, shared = heard(student, batch, *both)
    assert set(shared[Lessons][0].encoded) == {"text", "image", "audio"}
    torch.testing.assert_close(found["loss"], soft(said(student, batch), said(teacher, batch)))
    found["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_several_teachers_are_one_whose_distribution_is_their_mean():
    model, others, batch = small_model(), [scramble(small_model(), seed) for seed in (1, 2)], random_batch(8)
    found, shared = heard(model, batch, teacher_of(*others), TaughtOutput("answer", SoftClasses(1.0)))
    assert Taught not in shared
    found["loss"].backward()
    ours = model.heads["answer"].out.weight.grad.clone()
    model.zero_grad()
    mean = torch.stack([said(other, batch).detach().softmax(1) for other in others]).mean(0)
    distill.soft_cross_entropy(said(model, batch), mean).div(8).backward()
    torch.testing.assert_close(ours, model.heads["answer"].out.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("compare", "wanted"),
    [
        (SoftLabels(3.0), lambda a, b: distill.softened_labels(a, b, 3.0) / a.numel()),
        (SoftNumber(3.0), lambda a, b: ((a - b) / 2.5).square().sum() / len(a)),
    ],
)
def test_labels_and_numbers_are_compared_in_their_own_way(compare, wanted):
    batch, models = random_batch(6), [scramble(small_model(), seed) for seed in (0, 1)]
    for model in models:
        model.heads["answer"].std = 2.5 if isinstance(compare, SoftNumber) else 1.0
    found, _ = heard(models[0], batch, teacher_of(models[1]), TaughtOutput("answer", compare))
    torch.testing.assert_close(found["loss"], wanted(*(said(model, batch) for model in models)))


def test_only_samples_count_of_which_both_have_something_to_read():
    model, other, batch = small_model(), scramble(small_model(), 5), random_batch(14)
    for part in (model, other):
        part.heads["picture"] = scramble(Head(24, 4), 7 if part is model else 8)
    found, _ = heard(model, batch, teacher_of(other), TaughtOutput("picture", SoftClasses(2.0), source="image"))
    rows = sorted(set(batch.inputs["image"].rows))
    one, two = (said(part, batch, "picture", "image")[rows] for part in (model, other))
    torch.testing.assert_close(found["loss"], soft(one, two))
    nothing, _ = heard(
        model, batch.only(["text"]), teacher_of(other), TaughtOutput("picture", SoftClasses(2.0), "image")
    )
    assert float(nothing["loss"]) == 0


def test_the_slow_copy_of_momentum_is_a_teacher_too_and_counts_as_much_as_it_says():
    model, batch = small_model(), random_batch(6)
    momentum = Momentum(0.9, 0.4, 0)
    momentum.prepare(model)
    scramble(momentum.model, 4)
    encoded = model.encode(batch)
    momentum(model, encoded, batch)
    found = TaughtOutput("answer", SoftClasses(2.0))(model, encoded, batch)
    torch.testing.assert_close(found["loss"], 0.4 * soft(said(model, batch), said(momentum.model, batch)))


def test_one_teacher_serves_those_that_mix_it_with_other_targets():
    model, other, batch = cross_model(), cross_model(4), random_batch(6)
    _, shared = heard(model, batch, teacher_of(other, weight=0.3))
    assert shared[Taught].model is other
    assert float(shared[Taught].weight) == pytest.approx(0.3)


def test_a_teacher_is_no_part_of_a_checkpoint_and_shared_by_averages():
    model, other = small_model(), small_model()
    teacher = teacher_of(other.train())
    assert not teacher.state_dict()
    assert not list(teacher.parameters())
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())
    average = Average(torch.nn.ModuleDict({"model": model, "teacher": teacher}), 0.9)
    assert average.module["teacher"].models[0] is other


def test_words_are_compared_by_place():
    causal = Visibility(causal=True)
    models = []
    for seed in (0, 1):
        part = small_model(stream=["text"], num_latents=0, visibility=causal)
        model = Model(dict(part.encoders), part.fusion, {"words": VocabularyHead(24, 50)})
        models.append(scramble(model, seed))
    batch, language = random_batch(8), NextToken("words")
    found, _ = heard(models[0], batch, teacher_of(models[1]), TaughtTokens(language, 2.0))
    one, two = (language.scores(model, model.encode(batch), batch)[0] for model in models)
    torch.testing.assert_close(found["loss"], soft(one, two))
    models[1].heads["words"] = VocabularyHead(24, 40)
    with pytest.raises(ValueError, match=r"tokens of 50 words, the teacher has .* of 40"):
        heard(models[0], batch, teacher_of(models[1]), TaughtTokens(language, 2.0))


def test_states_inside_are_brought_to_the_teacher_s_by_a_learned_map():
    model, other, batch = small_model(), small_model(dim=36), random_batch(9)
    states = TaughtStates({LAYER: "fusion.transformer.layers.0", TEXT: TEXT}, 24, 36)
    found, _ = heard(model, batch, teacher_of(other), states)
    keep: dict = {}
    for part, names in ((model, (LAYER, TEXT)), (other, ("fusion.transformer.layers.0", TEXT))):
        for name in names:
            part.get_submodule(name).register_forward_hook(
                partial(lambda k, m, i, o: keep.update({k: o}), (part, name))
            )
        part.fuse(part.encode(batch))
    losses = []
    for (name, taught), own in zip(states.layers.items(), states.maps, strict=True):
        wanted = F.layer_norm(keep[other, taught].x, (36,))
        losses.append((own(keep[model, name].x) - wanted)[keep[model, name].valid].square().mean())
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean())
    found["loss"].backward()
    assert model.encoders["text"].embedder.table.weight.grad.abs().sum() > 0
    assert states.maps[0].weight.grad.abs().sum() > 0
    assert set(states.exported().state_dict()) == set()


def test_a_copy_of_the_model_is_watched_by_itself_and_nothing_is_kept_behind_a_step():
    model, other, batch = small_model(), small_model(), random_batch(5)
    parts = [teacher_of(other), TaughtEnergy({TEXT: TEXT})]
    first, _ = heard(model, batch, *parts)
    copies = deepcopy(torch.nn.ModuleDict({"model": model, "objectives": torch.nn.ModuleList(parts)}))
    copy, objectives = copies["model"], copies["objectives"]
    assert Trace.on(copy) is not Trace.on(model)
    encoded = copy.encode(batch)
    objectives[0](copy, encoded, batch)
    torch.testing.assert_close(objectives[1](copy, encoded, batch)["loss"], first["loss"])
    assert len(Trace.on(copy)._kept) == 1
    del encoded, first
    assert len(Trace.on(copy)._kept) == 0


def test_energy_and_attention_of_a_model_that_is_its_own_teacher_agree():
    model, batch = small_model(), random_batch(7)
    energy = TaughtEnergy({LAYER: LAYER})
    attention = TaughtAttention({f"{LAYER}.attention": f"{LAYER}.attention"}, heads=2)
    for objective in (energy, attention):
        found, _ = heard(model, batch, teacher_of(deepcopy(model)), objective)
        assert float(found["loss"].detach()) == pytest.approx(0, abs=1e-5)
        found, _ = heard(model, batch, teacher_of(small_model(dim=36)), objective)
        assert float(found["loss"].detach()) > 1e-4
        found["loss"].backward()


def test_sequences_that_are_cut_otherwise_are_refused():
    model, batch = small_model(), random_batch(7)
    other = small_model(stream=["latent", "text"])
    with pytest.raises(ValueError, match=r"works on sequences of .* tokens, the teacher's"):
        heard(model, batch, teacher_of(other), TaughtEnergy({LAYER: LAYER}))
    with pytest.raises(ValueError, match=r"the model has no layer 'fusion\.nowhere'"):
        heard(model, batch, teacher_of(other), TaughtEnergy({"fusion.nowhere": LAYER}))


def test_relations_need_no_equal_width():
    batch, model, other = random_batch(9), small_model(), small_model()
    other.heads["answer"] = scramble(Head(24, 11), 3)
    found, _ = heard(model, batch, teacher_of(other), TaughtRelations("answer", 25.0, 50.0, triples=5))
    rows, wanted = said(model, batch), said(other, batch)
    torch.testing.assert_close(found["distance"], 25 * distill.distances(rows, wanted))
    torch.testing.assert_close(found["angle"], 50 * distill.angles(rows[:5], wanted[:5]))


def test_the_space_of_a_teacher_in_plain_loops():
    model, other, batch = cross_model(), cross_model(4), random_batch(7, subsets=ALL)
    names, scale = ["text", "image", "audio"], 7.0
    space = TaughtContrastive(names, 6, 6, scale, feature=3.0, affinity=2.0, interactive=1.0)
    found, _ = heard(model, batch, teacher_of(other), space)
    one, two = ({name: said(part, batch, name, name) for name in names} for part in (model, other))
    feature = affinity = interactive = torch.zeros(())
    for a, b in (("text", "image"), ("text", "audio"), ("image", "audio")):
        for x, y in ((a, b), (b, a)):
            feature = feature + (one[x] - two[x]).square().mean() / 6
            affinity = affinity + soft(scale * one[x] @ one[y].T, scale * two[x] @ two[y].T, 1.0) / 6
            interactive = interactive + F.cross_entropy(scale * one[x] @ two[y].T, torch.arange(7)) / 6
    torch.testing.assert_close(found["feature"], 3 * feature)
    torch.testing.assert_close(found["affinity"], 2 * affinity, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["interactive"], interactive)
    sum(found.values()).backward()
    assert all(model.heads[name].out.weight.grad.abs().sum() > 0 for name in names)
    assert set(space.state_dict()) == set()
    wider = TaughtContrastive(names, 6, 9, scale, feature=1.0, affinity=1.0, interactive=1.0)
    wider.prepare(model)
    assert set(wider.state_dict()) != set()
    assert set(wider.exported().state_dict()) == set()


def test_a_sample_without_partners_has_no_space_to_learn():
    model, other = cross_model(), cross_model(4)
    batch = random_batch(4, subsets=(("text",),))
    space = TaughtContrastive(["text", "image"], 6, 6, 7.0, feature=3.0, affinity=2.0, interactive=1.0)
    found, _ = heard(model, batch, teacher_of(other), space)
    assert [float(loss.detach()) for loss in found.values()] == [0, 0, 0]


def test_a_student_of_less_hears_what_the_teacher_says_of_all():
    model, other, batch = small_model(), scramble(small_model(), 2), random_batch(9, subsets=ALL)
    listener = WithoutSome(TaughtOutput("answer", SoftClasses(2.0)))
    subsets = [batch.only(names) for names in (["text"], ["image", "audio"], ["text", "image", "audio"])]
    possible = [float(soft(said(model, part), said(other, batch)).detach()) for part in subsets]
    teacher, encoded = teacher_of(other), model.encode(batch)
    teacher(model, encoded, batch)
    seen = [float(listener(model, encoded, batch)["loss"].detach()) for _ in range(30)]
    assert len({round(value, 5) for value in seen}) == 7
    assert all(any(value == pytest.approx(one, rel=1e-4) for value in seen) for one in possible)
    listener.eval()
    assert float(listener(model, encoded, batch)["loss"].detach()) == pytest.approx(possible[2], rel=1e-4)


def test_answers_are_read_from_disk_whoever_asks_again(tmp_path):
    model, other, batch = small_model(), scramble(small_model(), 2), random_batch(14)
    other.heads["picture"] = scramble(Head(24, 7), 3)
    model.heads["picture"] = scramble(Head(24, 7), 4)
    calls = counted(other)
    listener = TaughtOutput("picture", SoftClasses(2.0), source="image")
    plain, _ = heard(model, batch, teacher_of(other), listener)
    assert len(calls) == 1
    for _ in range(2):
        kept, shared = heard(model, batch, teacher_of(other, cache=Cache(str(tmp_path))), listener)
        torch.testing.assert_close(kept["loss"], plain["loss"])
    assert len(calls) == 2
    assert Taught not in shared
    order = [3, 9, 0, 5]  # samples are found by their ids, wherever they stand
    heard(model, batch.select(order), teacher_of(other, cache=Cache(str(tmp_path))), listener)
    assert len(calls) == 2
    again = teacher_of(other, cache=Cache(str(tmp_path)))
    again.open(lambda run: (other, "other weights"))
    heard(model, batch, again, listener)
    assert len(calls) == 3


def test_each_epoch_of_augmented_samples_has_its_own_answers(tmp_path):
    model, other, batch = small_model(), scramble(small_model(), 2), random_batch(5)
    calls, listener = counted(other), TaughtOutput("answer", SoftClasses(2.0))

    def ask(seed, epoch, training=True):
        teacher = teacher_of(other, cache=Cache(str(tmp_path), seed)).train(training)
        heard(model, replace(batch, epoch=epoch), teacher, listener)
        return len(calls)

    assert [ask(0, 0), ask(0, 1), ask(0, 0), ask(0, 1), ask(1, 0), ask(1, 0)] == [1, 2, 2, 2, 3, 3]
    assert [ask(0, 0, False), ask(0, 5, False), ask(7, 2, False)] == [4, 4, 4]


def test_mistakes_are_named():
    model, batch = small_model(), random_batch(4)
    listener = TaughtOutput("answer", SoftClasses(2.0))
    with pytest.raises(ValueError, match="put the objective `teacher` or `momentum` in front"):
        listener(model, model.encode(batch), batch)
    with pytest.raises(ValueError, match="name one"):
        Teacher([])
    with pytest.raises(ValueError, match="were not opened"):
        Teacher(["runs/x"]).prepare(model)
    other = small_model()
    other.heads["answer"] = Head(24, 3)
    with pytest.raises(ValueError, match=r"says 7 numbers of a sample, the teacher's 'answer' 3"):
        heard(model, batch, teacher_of(other), listener)
    with pytest.raises(ValueError, match="at least two"):
        TaughtContrastive(["text"], 6, 6, 7.0, feature=1.0, affinity=1.0, interactive=1.0)
    for objective in (TaughtStates({TEXT: TEXT}, 24, 24),):
        with pytest.raises(ValueError, match="call prepare"):
            objective(model, model.encode(batch), batch)


# ---------------------------------------------------------------------- several processes

CUT = [[0, 2, 3, 6, 7, 9, 10, 13], [1, 4, 5, 8, 11, 12]]
NAMES = ["text", "image", "audio"]


def step(batch) -> dict[str, Any]:
    """The losses and gradients of all listeners on one batch."""
    model = cross_model()
    listeners = {
        "answer": TaughtOutput("match", SoftClasses(2.0), "text"),
        "relations": TaughtRelations("match", 25.0, 50.0, triples=50),
        "space": TaughtContrastive(NAMES, 6, 6, 7.0, feature=3.0, affinity=2.0, interactive=1.0),
        "states": TaughtStates({TEXT: TEXT}, 24, 24),
        "energy": TaughtEnergy({TEXT: TEXT}),
        "attention": TaughtAttention({f"{TEXT}.attention": f"{TEXT}.attention"}, 2),
    }
    torch.manual_seed(0)
    parts = {"teacher": teacher_of(cross_model(4), cross_model(5)), **listeners}
    for part in parts.values():
        part.prepare(model)
    encoded = model.encode(batch)
    losses = {f"{name}_{k}": v for name, part in parts.items() for k, v in part(model, encoded, batch).items()}
    touched = torch.stack([p.flatten()[0] * 0 for p in model.parameters()]).sum()
    (touched + torch.stack(list(losses.values())).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients}


def cases():
    """Batches of which both processes have something, and of which the second has no text."""
    mixed = random_batch(14)
    texts = mixed.inputs["text"].keep({row: row for row in CUT[0]})
    return mixed, replace(mixed, inputs=mixed.inputs | {"text": texts})


def in_a_process() -> list[dict[str, Any]]:
    return [step(batch.select(CUT[dist.get_rank()])) for batch in cases()]


def test_two_processes_learn_what_one_does(tmp_path):
    found = both(in_a_process, tmp_path)
    for case, batch in enumerate(cases()):
        whole, (first, second) = step(batch.select(CUT[0] + CUT[1])), [part[case] for part in found]
        assert set(first["losses"]) == set(second["losses"]) == set(whole["losses"])
        for name, loss in whole["losses"].items():
            mean = (first["losses"][name] + second["losses"][name]) / 2
            torch.testing.assert_close(mean, loss, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for name, gradient in whole["gradients"].items():
            mean = (first["gradients"][name] + second["gradients"][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
