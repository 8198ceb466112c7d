"""A cycle's stages up to the adapter, for real in small: killed after and inside every one, due or not, warm started with replay.

The stages that need an engine run in test_cycle_live.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rag.traces import import_traces
from tests.conftest import MODELS, copy_of
from tests.rag.test_simulate import Teacher, teacher  # noqa: F401 - fixture
from tests.train.conftest import tiny_base, tokenizer  # noqa: F401 - fixture
from train.dataset import read_ledger
from understudy.adapters import find_adapter
from understudy.cli import main
from understudy.cycle import look, run_cycle
from understudy.cycle_stages import Turn
from understudy.cycles import Cycle, Done, Seen, cycles, new_cycle
from understudy.errors import StorageError, UsageError
from understudy.files import locked, read_json, write_jsonl
from understudy.progress import show_progress
from understudy.releases import Release, add_release, decide, promoted, standing
from understudy.workspace import Workspace, create_workspace, open_workspace

SETTINGS = """models: {base: tiny}
releases: {default: notes-act}
cycle: {documents: ../inbox, regression: regression.jsonl, recipe: small.yaml, fewest_traces: 3}
"""
RECIPE = "{name: small, quantisation: none, rank: 4, alpha: 8, tokens_per_batch: 512, max_steps: 2}\n"
NOTES = {
    "kiln.txt": "The kiln in the east yard is fired on Tuesdays at seven in the morning.",
    "barn.txt": "The barn doors are painted green every third summer by the village school.",
    "pond.txt": "The pond is stocked with forty carp in April, never later than the tenth.",
}
ASKED = {"When is the kiln fired?": "kiln.txt", "What colour are the barn doors?": "barn.txt", "Who paints the barn?": "barn.txt"}
MADE = ("ingest", "traces", "dataset", "train")  # stages without an engine


class Killed(BaseException):
    """The process is gone."""


def teach(workspace: Workspace, asked: dict[str, str]) -> None:
    """People answer: each by the one sentence of a note."""
    rows = [{"question": question, "answer": NOTES[note], "quotes": [NOTES[note]], "documents": [note]} for question, note in asked.items()]
    write_jsonl(workspace.root / "answers.jsonl", rows)
    import_traces(workspace, workspace.root / "answers.jsonl", "train", show_progress)


def cycle(workspace: Workspace, **changes: Any) -> Cycle | None:
    given = {"documents": None, "anew": False, "refreeze": False} | changes
    return run_cycle(workspace, [], given["documents"], given["anew"], given["refreeze"], lambda _: None, show_progress)[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Workspace:  # noqa: F811
    """Notes that are ingested and asked about, a base of two layers, and nothing trained yet."""
    from rag.ingest import ingest

    root = tmp_path_factory.mktemp("cycle")
    made = create_workspace(str(root / "workspace"), SETTINGS)
    made.models.mkdir()
    (made.models / "all-minilm-l6-v2").symlink_to((MODELS / "all-minilm-l6-v2").resolve())
    tiny_base().save_pretrained(made.models / "tiny")
    tokenizer.save_pretrained(made.models / "tiny")
    (made.root / "small.yaml").write_text(RECIPE)
    write_jsonl(made.root / "regression.jsonl", [{"id": "r", "question": "How many carp are there?", "answer": "forty", "documents": ["pond.txt"]}])
    (root / "inbox").mkdir()
    for name, text in NOTES.items():
        (root / "inbox" / name).write_text(text)
    ingest(made, [root / "inbox"], show_progress)
    teach(made, ASKED | {"When is the pond stocked?": "pond.txt"})
    return made


@pytest.fixture
def workspace(prepared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A test's own; its cycles stop before the engine."""
    shutil.copytree(prepared.root.parent / "inbox", tmp_path / "inbox")
    whole = Turn.stages.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Turn, "stages", property(lambda turn: {name: stage for name, stage in whole(turn).items() if name in MADE}))
    return copy_of(prepared, tmp_path)


def come_to(made: Cycle | None) -> dict[str, Any]:
    """What a cycle came to, without times."""
    assert made is not None
    found = made.outcomes
    counts = {key: found["ingest"]["documents"][key] for key in ("added", "updated", "unchanged")}
    return {**{name: found[name] for name in ("traces", "dataset")}, "ingest": counts, "train": found["train"]["digest"]}


@pytest.mark.slow
def test_killed_after_and_inside_every_stage_it_comes_to_the_same_and_repeats_none(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = come_to(cycle(copy_of(workspace, tmp_path / "whole"), documents=str(tmp_path / "inbox")))
    enter, calls, ran = Cycle.enter, iter(range(100)), []

    def killed(made: Cycle, stage: str, done: Done, seconds: float) -> Cycle:
        ran.append(stage)
        number = next(calls)
        if number % 3 == 0:
            raise Killed  # it was done, and its line is not there
        after = enter(made, stage, done, seconds)
        if number % 3 == 1:
            raise Killed  # right after its line
        return after

    monkeypatch.setattr(Cycle, "enter", killed)
    for _ in range(20):
        try:
            made = cycle(workspace)
            break
        except Killed:
            assert workspace.cycles.exists()
    assert come_to(made) == whole
    [only] = cycles(workspace)
    assert [line.stage for line in only.lines] == ["begin", *MADE] and 2 * len(MADE) >= len(ran) > len(MADE) + 1
    assert len(list(workspace.adapters.glob("small/*/manifest.json"))) == len(list(workspace.datasets.glob("*/dataset.json"))) == 1


@pytest.mark.slow
def test_the_next_cycle_goes_on_from_the_live_adapter_and_repeats_a_part_of_what_it_learnt(workspace: Workspace) -> None:
    first = cycle(workspace)
    assert first is not None and look(workspace, None).unfinished is not None
    assert first.outcomes["traces"]["new"] == {"people": 4, "all": 4} and first.outcomes["dataset"]["replay"] is None
    rejected = read_ledger(workspace.datasets / first.outcomes["dataset"]["dataset"])
    assert [(row.question, row.reason) for row in rejected] == [("When is the pond stocked?", "rests on a document of the regression set")]
    first.enter("release", Done(verdict="ready"), 0)
    assert not look(workspace, None).is_due and cycle(workspace) is None
    adapter = first.outcomes["train"]["adapter"]
    live = Release(alias="notes-act", tenant="default", generation="g", adapters=dict.fromkeys(("plan", "answer", "validate"), adapter), prompt_version="p")
    add_release(workspace, live)
    decide(workspace, "notes-act", "promoted", lambda before: (live.digest, promoted(before, live.digest)))
    teach(workspace, {"Where is the kiln?": "kiln.txt"})
    assert not look(workspace, None).is_due  # one is too few, and nothing has answered that could have drifted
    teach(workspace, {"Where is the kiln?": "kiln.txt", "When is it hot in the yard?": "kiln.txt", "Whose work is the paint?": "barn.txt"})
    found = look(workspace, None)
    assert found.is_due and found.reasons == ["3 new traces"]
    second = cycle(workspace)
    assert second is not None and second.outcomes["begin"]["warm_start"] == adapter and second.outcomes["begin"]["live"] == live.name
    replay = second.outcomes["dataset"]["replay"]
    assert replay["new"] > 0 and replay["repeated"] > 0 and second.outcomes["traces"]["new"]["all"] == 3
    manifest, _ = find_adapter(workspace, second.outcomes["train"]["adapter"])
    assert manifest.recipe["warm_start"] == adapter and set(find_adapter(workspace, adapter)[0].question_digests) < set(manifest.question_digests)
    again = cycle(workspace, anew=True)
    assert again is not None and again.name == "0003" and cycles(workspace)[1].end == cycles(workspace)[1].lines[-1]


def test_traces_that_may_not_teach_end_a_cycle_and_make_no_dataset(workspace: Workspace) -> None:
    seen = [trace.id for trace in workspace.store.traces("default") if "pond" not in trace.question]
    earlier = new_cycle(workspace, {"tenant": "default"})
    earlier.see(Seen(traces=seen))
    earlier.enter("release", Done(verdict="refused"), 0)
    write_jsonl(
        workspace.root / "regression.jsonl", [{"id": str(n), "question": q, "answer": "x"} for n, q in enumerate([*ASKED, "When is the pond stocked?"])]
    )
    made = cycle(open_workspace(str(workspace.root), ["cycle.fewest_traces=1"]))
    assert made is not None and made.end is not None and made.end.verdict == "nothing" and "no trace may teach" in made.end.reason
    assert not workspace.datasets.exists()


@pytest.mark.slow
def test_the_teacher_is_asked_about_new_documents_alone_and_too_few_traces_wait(
    workspace: Workspace,
    tmp_path: Path,
    teacher: Teacher,  # noqa: F811
) -> None:
    new_cycle(workspace, {"tenant": "default"}).enter("release", Done(verdict="nothing"), 0)
    settings = [f"remotes={{tutor: {{base_url: {teacher.url}, model: m}}}}", "cycle.teacher=tutor", "cycle.teacher_calls=12", "cycle.fewest_traces=50"]
    told = open_workspace(str(workspace.root), settings)
    first = cycle(told)
    assert first is not None and first.end is not None and first.end.verdict == "nothing" and "trains from 50" in first.end.reason
    assert first.outcomes["traces"]["simulated"]["calls"] <= 12
    written = [prompt for prompt in teacher.prompts if "Write one question" in prompt]
    assert written and not any("carp" in prompt for prompt in written)  # the regression set asks about that
    (tmp_path / "inbox" / "well.txt").write_text("The well is cleaned by two brothers who live beyond the northern hedge.")
    teacher.prompts.clear()
    second = cycle(told)
    assert second is not None and second.outcomes["ingest"]["documents"]["added"] == 1
    written = [prompt for prompt in teacher.prompts if "Write one question" in prompt]
    assert written and all("two brothers" in prompt for prompt in written)
    assert cycle(told) is None  # people's few answers wait for more


@pytest.mark.slow
def test_a_file_that_cannot_be_read_keeps_no_cycle_from_what_people_wrote(workspace: Workspace, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "inbox")
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "torn.pdf").write_bytes(b"%PDF-1.4 torn")
    made = cycle(workspace)
    assert made is not None and "torn.pdf" in made.outcomes["ingest"]["error"] and made.outcomes["train"]["digest"]


def test_what_would_stop_it_later_is_refused_before_it_begins(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    def typed(*words: str) -> tuple[dict[str, Any], int]:
        capsys.readouterr()
        code = main(["--workspace", str(workspace.root), "cycle", "--json", *words])
        return json.loads(capsys.readouterr().out), code

    for setting, message in {
        "releases.default=''": "no alias answers here",
        "cycle.regression=''": "a fixed set of questions",
        "cycle.teacher=nobody": "no configured remote",
    }.items():
        refused, code = typed("--set", setting)
        assert code in (1, 2) and message in refused["error"]["message"]
    assert not cycles(workspace)
    (workspace.root / "ia3.yaml").write_text("{method: ia3}\n")
    assert "cannot be served" in typed("--set", "cycle.recipe=ia3.yaml")[0]["error"]["message"]
    planned, code = typed("--dry-run")
    assert code == 0 and planned["due"] and planned["steps"][0]["stage"] == "ingest" and planned["drift"] is None and not cycles(workspace)
    with locked(workspace.cycles / ".lock"):
        refused, code = typed()
    assert code == 1 and "another cycle is at work" in refused["error"]["message"]
    assert main(["--workspace", str(workspace.root), "cycle", "--dry-run"]) == 0 and "due: new or changed files" in capsys.readouterr().out
    ended = new_cycle(workspace, {"tenant": "default"})
    ended.enter("release", Done(verdict="nothing"), 0)
    nothing, code = typed("--set", "cycle.fewest_traces=99", "--set", "cycle.documents=''")
    assert (nothing["due"], nothing["verdict"], code) == (False, "nothing", 0) and "trains from 99" in nothing["reason"]


def test_an_empty_folder_is_nothing_new_and_another_tenants_cycles_are_its_own(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    quiet = open_workspace(str(workspace.root), ["cycle.fewest_traces=99"])
    assert not look(quiet, str(tmp_path / "empty")).is_due and look(quiet, str(tmp_path / "inbox")).is_due
    new_cycle(workspace, {"tenant": "other"})
    assert look(quiet, str(tmp_path / "inbox")).unfinished is None


def test_a_cycle_goes_on_only_on_the_regression_set_it_began_with(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(_turn: Turn, _cycle: Cycle) -> Done:
        raise StorageError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(Turn, "ingest", failed)
        with pytest.raises(StorageError):
            cycle(workspace)
    write_jsonl(workspace.root / "regression.jsonl", [{"id": "r", "question": "How many trout are there?", "answer": None}])
    with pytest.raises(UsageError, match="not the one that was frozen"):
        cycle(workspace)
    with pytest.raises(UsageError, match="began on another regression set"):
        cycle(workspace, refreeze=True)


def test_a_trial_under_way_is_not_replaced(workspace: Workspace) -> None:
    from understudy.releases import Canary, on_trial

    adapters = dict.fromkeys(("plan", "answer", "validate"), "base")
    made = [Release(alias="notes-act", tenant="default", generation=g, adapters=adapters, prompt_version="p") for g in ("g1", "g2")]
    for release in made:
        add_release(workspace, release)
    decide(workspace, "notes-act", "promoted", lambda before: (made[0].digest, promoted(before, made[0].digest)))
    canary = Canary(release=made[1].digest, share=0.5, began_at=0.0)
    decide(workspace, "notes-act", "canary", lambda before: (made[1].digest, on_trial(before, canary)))
    found = look(workspace, None)
    assert found.reasons and not found.is_due and "is on trial" in found.waits[0] and cycle(workspace) is None
    assert standing(workspace, "notes-act").canary == canary


@pytest.mark.slow
def test_a_live_release_that_knows_the_regression_set_is_found_before_training(workspace: Workspace) -> None:
    made = cycle(workspace)
    assert made is not None
    manifest, folder = find_adapter(workspace, made.outcomes["train"]["adapter"])
    write = read_json(folder / "manifest.json")
    write["group_ids"] = [d.id for d in workspace.store.documents("default") if d.source == "pond.txt"]
    (folder / "manifest.json").write_text(json.dumps(write))
    live = Release(
        alias="notes-act", tenant="default", generation="g", adapters=dict.fromkeys(("plan", "answer", "validate"), manifest.served_name), prompt_version="p"
    )
    add_release(workspace, live)
    decide(workspace, "notes-act", "promoted", lambda before: (live.digest, promoted(before, live.digest)))
    with pytest.raises(UsageError, match="about a document it learnt from"):
        cycle(workspace, anew=True)
    assert "train" not in cycles(workspace)[-1].outcomes
