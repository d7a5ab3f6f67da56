import pytest
import torch

from mmformer.checkpoints import build, save_model
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.objectives import Cache, SoftClasses, TaughtOutput, Teacher, WithoutSome
from mmformer.run.teachers import open_teachers
from tests.checkpoints.configs import run_config
from tests.helpers import scramble


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("teachers"), run_config()
    objectives = {name: build(part) for name, part in config["objectives"].items()}
    save_model(folder / "model", scramble(build(config["model"])), config, ByteTokenizer(), objectives)
    return folder


def plain(**data) -> dict:
    """The config of a run that learns, as far as it is compared."""
    config = run_config()
    return {"seed": 3, "data": {"features": config["features"], "augment": None, **data}, "facts": config["facts"]}


def test_a_teacher_is_opened_wherever_it_stands(run):
    teacher = Teacher([str(run), str(run / "model")])
    (first, second) = list(open_teachers([TaughtOutput("label", SoftClasses(1.0)), teacher], plain(), ByteTokenizer()))
    assert "reads text, image, audio" in first
    assert str(run / "model") in second
    assert len(teacher.models) == 2
    assert not any(p.requires_grad for p in teacher.models[0].parameters())
    assert not list(open_teachers([WithoutSome(TaughtOutput("label", SoftClasses(1.0)))], plain()))


def test_what_does_not_fit_is_named(run):
    def opened(config, **options):
        return list(open_teachers([Teacher([str(run)], **options)], config, ByteTokenizer()))

    config = plain()
    image = dict(config["data"]["features"]["image"])
    config["data"]["features"] = config["data"]["features"] | {"image": image | {"longest": 999}}
    with pytest.raises(
        ValueError, match=r"does not fit this run: data\.features\.image\.longest is 999, it learned with"
    ):
        opened(config)
    config = plain()
    config["facts"] = {"targets": {"label": {"kind": "Classes", "names": ["no", "yes"]}}}
    with pytest.raises(ValueError, match=r"the classes of label are \['no', 'yes'\], its own"):
        opened(config)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(open_teachers([Teacher([str(run / "nowhere")])], plain()))


def test_modalities_that_only_one_of_them_has_need_no_agreement(run):
    config = plain()
    features = config["data"]["features"]
    config["data"]["features"] = {"text": features["text"], "depth": {"_target_": "torch.nn.Identity"}}
    assert list(open_teachers([Teacher([str(run)])], config, ByteTokenizer()))


def test_answers_about_samples_that_change_are_kept_only_where_it_is_asked_for(run, tmp_path):
    augmented = plain(augment={"_target_": "mmformer.datasets.augment.Augment"})
    with pytest.raises(ValueError, match="would keep what teachers say of samples that augmentation changes"):
        list(open_teachers([Teacher([str(run)], Cache(str(tmp_path)))], augmented))
    with pytest.raises(ValueError, match="the cache's seed is 4, but samples are augmented by seed=3"):
        list(open_teachers([Teacher([str(run)], Cache(str(tmp_path), 4))], augmented))
    assert list(open_teachers([Teacher([str(run)], Cache(str(tmp_path), 3))], augmented))
    assert list(open_teachers([Teacher([str(run)], Cache(str(tmp_path)))], plain()))


def test_a_mark_changes_with_the_weights(run, tmp_path):
    marks = []
    for folder, factor in ((run, 1.0), (tmp_path, 2.0)):
        if factor != 1.0:
            config = run_config()
            model = scramble(build(config["model"]))
            with torch.no_grad():
                next(model.parameters()).mul_(factor)
            objectives = {name: build(part) for name, part in config["objectives"].items()}
            save_model(folder / "model", model, config, ByteTokenizer(), objectives)
        teacher = Teacher([str(folder)])
        list(open_teachers([teacher], plain(), ByteTokenizer()))
        marks.append(teacher._pairs()[0][1])
    assert marks[0] != marks[1]
