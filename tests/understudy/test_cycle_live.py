"""A whole cycle on the session's real engine: interrupted, gone on with, and ended in a canary; refused under a stricter gate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from rag.ingest import ingest
from rag.traces import import_traces
from serve.command import engine_for
from tests.conftest import DOCUMENTS, QUESTIONS, copy_of, questions_on
from understudy.adapters import find_adapter
from understudy.cycle import look, run_cycle
from understudy.cycle_stages import Turn
from understudy.cycles import Cycle, Seen, cycles
from understudy.files import write_jsonl
from understudy.progress import show_progress
from understudy.releases import Release, add_release, decide, promoted, rolled_back, standing
from understudy.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.timeout(600), pytest.mark.usefixtures("engine_session")]

ALIAS = "cycle-act"
NOTES = {
    "kiln": ("The kiln in the east yard is fired on Tuesdays at seven in the morning.", "When is the kiln fired?", "on Tuesdays"),
    "barn": ("The barn doors are painted green every third summer by the village school.", "Who paints the barn doors?", "the village school"),
    "pond": ("The pond is stocked with forty carp in April, never later than the tenth.", "How many carp does the pond get?", "forty"),
    "mill": ("The mill grinds barley from noon until the miller has gone home again.", "What does the mill grind?", "barley"),
    "well": ("The well is cleaned by two brothers who live beyond the northern hedge.", "Who cleans the well?", "two brothers"),
}
SETTINGS = [
    f"releases.default={ALIAS}", "cycle.regression=regression.jsonl", "cycle.recipe=next.yaml", "cycle.fewest_traces=6", "cycle.replay=1",
    "cycle.canary=0.2", "agent.max_rounds=1", "evaluate.resamples=200", "evaluate.gates={token_f1: {against: live, max_loss: 1.0}}",
]  # fmt: skip
RECIPE = "{name: next, max_steps: 2, tokens_per_batch: 512, batches_per_step: 1, learning_rate: 1.0e-5}\n"


def rows(*notes: str) -> list[dict[str, object]]:
    """Expert's questions about notes."""
    return [{"id": n, "question": NOTES[n][1], "answer": NOTES[n][2], "quotes": [NOTES[n][0]], "documents": [f"{n}.txt"]} for n in notes]


@pytest.fixture
def workspace(trained_workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy in which `tiny` is live, with five notes more, and answers that it has not learnt."""
    with engine_for(trained_workspace, print) as running:
        live_name = next(name for name in running.models if name.startswith("tiny@"))  # loaded from where the other tests have it
    made = copy_of(trained_workspace, tmp_path)
    for name, (text, _, _) in NOTES.items():
        (tmp_path / f"{name}.txt").write_text(text)
    ingest(made, [tmp_path / f"{name}.txt" for name in NOTES], show_progress)
    (made.root / "next.yaml").write_text(RECIPE)
    write_jsonl(
        made.root / "regression.jsonl",
        [*rows("pond", "mill", "well"), {"id": "u", "question": "Who sold the mill?", "answer": None, "documents": ["mill.txt"]}],
    )
    for split, answers in (("train", questions_on(DOCUMENTS[0])[QUESTIONS : QUESTIONS + 8]), ("calibration", rows("kiln", "barn"))):
        write_jsonl(tmp_path / f"{split}.jsonl", answers)
        import_traces(made, tmp_path / f"{split}.jsonl", split, show_progress)
    release = Release(alias=ALIAS, tenant="default", generation="g", adapters=dict.fromkeys(("plan", "answer", "validate"), live_name), prompt_version="p")
    add_release(made, release)
    decide(made, ALIAS, "promoted", lambda before: (release.digest, promoted(before, release.digest)))
    return open_workspace(str(made.root), SETTINGS)


def test_a_cycle_that_is_interrupted_ends_in_a_canary(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def run() -> Cycle | None:
        return run_cycle(workspace, SETTINGS, None, False, False, said.append, show_progress)[1]

    def interrupted(_turn: Turn, _cycle: Cycle) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Turn, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert "goes on with it" in said[-1] and look(workspace, None).unfinished is not None
    made = run()
    assert made is not None and made.end is not None
    assert [line.stage for line in made.lines] == ["begin", "ingest", "traces", "dataset", "train", "prove", "calibrate", "evaluate", "release"]
    assert (made.end.verdict, made.end.reason) == ("canary", "it answers 20 % of the conversations")
    found, live = made.outcomes, made.outcomes["begin"]["live"]
    manifest, folder = find_adapter(workspace, found["train"]["adapter"])
    assert manifest.recipe["warm_start"] == found["begin"]["warm_start"] and found["dataset"]["replay"]["new"] > 0
    assert found["traces"]["new"] == {"people": 8 + 2, "all": 8 + 2}  # the sixty that tiny learnt are none
    assert found["prove"]["passed"] and found["calibrate"]["questions"] == 2 and (folder / "calibration.json").exists()
    assert [(gate["model"], gate["against"], gate["status"]) for gate in found["evaluate"]["gates"]] == [(found["evaluate"]["release"], live, "pass")]
    canary = standing(workspace, ALIAS).canary
    assert canary is not None and f"{ALIAS}@{canary.release[:12]}" == found["evaluate"]["release"] and canary.share == 0.2
    assert not look(workspace, None).is_due and run() is None and len(cycles(workspace)) == 1
    decide(workspace, ALIAS, "rolled back", rolled_back)
    stricter = open_workspace(str(workspace.root), [*SETTINGS[:-1], "evaluate.gates={token_f1: {against: live, min_gain: 0.9}}"])
    with ExitStack() as held:
        turn = Turn(stricter, [], None, workspace.root / "regression.jsonl", Seen(), print, show_progress, held)
        refused = turn.release(made)
    assert refused.verdict == "refused" and "gate on token_f1" in refused.reason and standing(workspace, ALIAS).canary is None
    capsys.readouterr()
