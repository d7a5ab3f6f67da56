"""A small part of the fault campaign; all of it is `python -m tests.campaign --budget 600 --report campaign.html`."""

from __future__ import annotations

import importlib

import pytest

from tests.campaign.__main__ import BLOCKS
from tests.campaign.mutations import MUTATIONS, ROOT
from tests.campaign.trials import Note

SHARES = {
    "K2": 0.02,
    "K3": 0.1,
    "C1": 0.03,
    "C2": 0.25,
    "D1": 0.03,
    "D2": 0.1,
    "D3": 0.1,
    "D4": 0.1,
    "S1": 0.12,
    "N1": 0.08,
    "W1": 0.17,
}
"""K1 has its own test, tests/test_resume.py."""


@pytest.mark.parametrize("block", SHARES)
@pytest.mark.filterwarnings("ignore")  # as the campaign runs: what is damaged may be warned of
def test_a_part_of_the_block_is_as_promised(block):
    found = importlib.import_module(f"tests.campaign.{BLOCKS[block][0]}").trials(SHARES[block], 0)
    outcomes = [outcome for outcome in found if not isinstance(outcome, Note)]
    assert outcomes
    failed = [f"{trial.name}: {trial.detail}" for trial in outcomes if not trial.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutations_still_meet_the_code(mutation):
    assert mutation.before in (ROOT / mutation.file).read_text()


def test_the_page_holds_every_trial(tmp_path):
    from tests.campaign.__main__ import Result
    from tests.campaign.page import write_page
    from tests.campaign.trials import Trial

    results = [
        Result("K1", 3.0, [Trial(name="good"), Trial(name="bad <b>", passed=False, detail="lost")], ["a rate"]),
        Result("D4", 0.0, [Trial(name="atheris", skipped=True, detail="absent")]),
    ]
    page = write_page(tmp_path / "a.html", results, {"K1": "kills", "D4": "bytes"}, {"seed": 0}).read_text()
    for piece in ("1 of 2", "bad &lt;b&gt;", "lost", "a rate", "absent"):
        assert piece in page, piece
