"""The stages of a cycle: each is a command, or the module behind one, that takes up what it was interrupted in."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.command_table import COMMANDS
from understudy.commands.wiring import remote_of
from understudy.cycle_inputs import drift_of, files_digest, learnt_by, live_release, new_traces, recipe_of
from understudy.cycles import BEGIN, Cycle, Done, Seen, Stage
from understudy.digests import digest_of
from understudy.errors import DocumentError
from understudy.files import write_jsonl
from understudy.progress import Progress
from understudy.records import Question
from understudy.releases import standing
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.retrieve import Retriever

UNANSWERABLE = 0.2  # share of the teacher's questions that are meant to find no answer


def arguments(words: str, **given: object) -> Namespace:
    """What the parser would make of a command: its defaults, and what is given."""
    [command] = [each for each in COMMANDS if each.words == words]
    defaults = {
        flags[-1].lstrip("-").replace("-", "_"): options.get("default", False if options.get("action") == "store_true" else None)
        for flags, options in command.arguments
    }
    return Namespace(**{"json": True, **defaults, **given})


@dataclass
class Turn:
    """What the stages of one cycle work with."""

    workspace: Workspace
    overrides: list[str]  # of the configuration, as typed
    documents: Path | None  # the folder to ingest from
    regression: Path  # the frozen set's own copy
    seen: Seen
    report: Callable[[str], None]
    progress: Callable[[str, int], Progress]
    held: ExitStack  # lets the engine go
    has_engine: bool = False

    @property
    def alias(self) -> str:
        """Whose releases these are."""
        return self.workspace.config.releases.alias_of(self.workspace.config.tenant)

    @property
    def stages(self) -> dict[str, Stage]:
        """By name, in order."""
        return {
            "ingest": self.ingest,
            "traces": self.traces,
            "dataset": self.dataset,
            "train": self.train,
            "prove": self.prove,
            "calibrate": self.calibrate,
            "evaluate": self.evaluate,
            "release": self.release,
        }

    @cached_property
    def questions(self) -> list[Question]:
        """The frozen regression set."""
        from rag.eval.questions import read_questions

        return read_questions(self.regression)

    def ingest(self, _: Cycle) -> Done:
        """Bring in the folder's files, where any is new or changed."""
        from rag.ingest import ingest

        files = files_digest(self.workspace, self.documents)
        if self.documents is None or files in ("", self.seen.files):
            return Done(outcome={"files": files, "documents": None})
        try:
            return Done(outcome={"files": files, **ingest(self.workspace, [self.documents], self.progress)})
        except DocumentError as error:  # every file of it was quarantined; what people wrote may still teach
            self.report(error.message)
            return Done(outcome={"files": files, "documents": None, "error": error.message})

    def traces(self, cycle: Cycle) -> Done:
        """Let the teacher ask and answer about documents that are new, and count what may teach since the last cycle."""
        documents = self.workspace.store.document_ids(self.workspace.config.tenant)
        simulated = self._simulate(set(documents) - set(self.seen.documents))
        begin = cycle.outcomes[BEGIN]
        new = new_traces(self.workspace, self.seen, learnt_by(self.workspace, begin["warm_start"]))
        counts = {"people": sum(trace.source == "expert" for trace in new), "all": len(new)}
        outcome = {"simulated": simulated, "new": counts}
        is_enough, reason = self.is_enough(len(new), begin["anew"])
        traces = [*self.seen.traces, *(trace.id for trace in new)] if is_enough else self.seen.traces
        cycle.see(Seen(files=cycle.outcomes["ingest"]["files"], documents=documents, traces=traces))
        return Done(outcome=outcome, verdict=None if is_enough else "nothing", reason="" if is_enough else reason)

    def is_enough(self, count: int, anyway: bool) -> tuple[bool, str]:
        """(whether so many new traces are worth training on, why); with `anyway` a single one is."""
        fewest = self.workspace.config.cycle.fewest_traces
        if count >= fewest or (count and anyway):
            return True, f"{count} new traces"
        if count and "retrain" in (drift_of(self.workspace, self.alias) or {}).get("due", []):
            return True, f"{count} new traces, and drift says that answers got worse"
        return False, f"{count} new traces, and a cycle trains from {fewest} on (cycle.fewest_traces)"

    def _simulate(self, documents: set[str]) -> dict[str, Any] | None:
        """The teacher's simulation on these documents, less those that the regression set asks about."""
        from rag.recorded import Budget
        from rag.retrieve import open_retriever
        from rag.simulate import Plan, simulate
        from train.reserved import asked_documents

        settings = self.workspace.config.cycle
        if not settings.teacher or not documents:
            return None
        retriever = open_retriever(self.workspace)
        documents -= asked_documents(self.questions, retriever.chunks)
        if not documents:
            return None
        budget = Budget(settings.teacher_calls, settings.teacher_tokens)
        plan = Plan(settings.teacher_questions, UNANSWERABLE, budget, documents=frozenset(documents))
        return simulate(self.workspace, remote_of(self.workspace, settings.teacher), retriever, plan, self.progress)

    def dataset(self, cycle: Cycle) -> Done:
        """Build the dataset: what is new, and a part of what the warm start learnt; nothing that the regression set asks."""
        from rag.retrieve import open_retriever
        from train.dataset import NothingToLearn, build_dataset
        from train.replay import Replay
        from train.reserved import reserved

        workspace, config, retriever = self.workspace, self.workspace.config, open_retriever(self.workspace)
        self.refuse_leaks(retriever, cycle.outcomes[BEGIN]["live"])
        traces = list(workspace.store.traces(config.tenant))
        kept_out = reserved(traces, self.questions, retriever.chunks, retriever.embed, config.evaluate.leaks != "allow-documents")
        start = cycle.outcomes[BEGIN]["warm_start"]
        replay = Replay(learnt_by(workspace, start), config.cycle.replay) if start else None
        try:
            built = build_dataset(workspace, held_out=0.0, barred=lambda trace: kept_out.get(trace.id), replay=replay)
        except NothingToLearn as error:
            return Done(verdict="nothing", reason=error.message)
        return Done(outcome={key: built.get(key) for key in ("dataset", "path", "examples", "by_step", "traces", "rejected", "replay")})

    def refuse_leaks(self, retriever: Retriever, live: str | None) -> None:
        """Raise UsageError where the live release knows the regression set, which would stop the evaluation after hours of training."""
        from understudy.commands.evaluating import guard

        guard(self.workspace, [question for question in self.questions if question.has_answer_key], [live or "base"], retriever)

    def train(self, cycle: Cycle) -> Done:
        """Train on that dataset, from the live release's adapter where it is to be a warm start."""
        from train.sft import train

        begin = cycle.outcomes[BEGIN]
        changes = {"dataset": cycle.outcomes["dataset"]["dataset"], "warm_start": begin["warm_start"]}
        with self.lent_memory():
            return Done(outcome=train(self.workspace, recipe_of(self.workspace).model_copy(update=changes), self.report, self.progress))

    def lent_memory(self) -> AbstractContextManager[None]:
        """Training takes the GPU's memory from a served engine, and gives it back; on a CPU both run side by side."""
        import torch

        from serve.pausing import borrowed

        return borrowed(self.workspace, self.report) if torch.cuda.is_available() else nullcontext()

    def prove(self, cycle: Cycle) -> Done:
        """Prove the candidate; one that is not proven is refused."""
        from understudy.commands.serving import prove

        self.hold_engine()
        found = prove(self.typed("prove", adapter=cycle.outcomes["train"]["adapter"]))
        failed = [check["name"] for check in found.result["checks"] if not check["passed"]]
        outcome = {"adapter": found.result["adapter"], "passed": not found.exit_code, "failed": failed}
        return Done(outcome=outcome, verdict="refused" if found.exit_code else None, reason=f"its proof failed: {', '.join(failed)}" if failed else "")

    def calibrate(self, cycle: Cycle) -> Done:
        """Calibrate the candidate on the dataset's calibration side."""
        from understudy.commands.serving import calibrate

        rows, path = self.calibration_rows(cycle), cycle.folder / "calibration.jsonl"
        if not rows:
            return Done(outcome={"questions": 0, "note": "no traces of the calibration side: the candidate's score is uncalibrated"})
        write_jsonl(path, rows)
        self.hold_engine()
        found = calibrate(self.typed("calibrate", model=cycle.outcomes["train"]["adapter"], questions=str(path)))
        return Done(outcome={key: found.result[key] for key in ("questions", "auroc", "abstention_accuracy")})

    def calibration_rows(self, cycle: Cycle) -> list[dict[str, Any]]:
        """The questions of the traces that the dataset keeps for calibration, but for those that an earlier adapter trained on."""
        from train.dataset import question_row, read_dataset
        from understudy.adapters import find_adapter

        examples, _, _ = read_dataset(self.workspace.datasets / cycle.outcomes["dataset"]["dataset"])
        trained = set(find_adapter(self.workspace, cycle.outcomes["train"]["adapter"])[0].question_digests)
        ids = dict.fromkeys(example.trace_id for example in examples if example.split == "validation")
        kept = [trace for trace_id in ids if (trace := self.workspace.store.trace(trace_id)) and digest_of(trace.question) not in trained]
        return [question_row(trace) for trace in kept]

    def evaluate(self, cycle: Cycle) -> Done:
        """Make a release of the candidate, and measure it against the live one on the frozen regression set."""
        from understudy.commands.evaluating import evaluate
        from understudy.commands.releasing import release_create

        release = release_create(self.typed("release create", alias=self.alias, answer=cycle.outcomes["train"]["adapter"])).result["release"]
        live = live_release(self.workspace, self.alias)
        if live and live.name == release:
            return Done(outcome={"release": release}, verdict="nothing", reason="the candidate is what is live")
        against = [gate.against for gate in self.workspace.config.evaluate.gates.values() if gate.against != "live"]
        models = dict.fromkeys([live.name if live else "base", *against, release])
        self.hold_engine()
        found = evaluate(self.typed("evaluate", questions=str(self.regression), models=",".join(models))).result
        return Done(outcome={"release": release, **{key: found[key] for key in ("gates", "verdict", "report")}})

    def release(self, cycle: Cycle) -> Done:
        """Try the candidate beside the live release, where nothing speaks against it."""
        from serve.release.deciding import begin_trial, find_candidate
        from serve.release.evidence import missing_evidence

        name, settings = cycle.outcomes["evaluate"]["release"], self.workspace.config.cycle
        release = find_candidate(self.workspace, name)
        lacking, _ = missing_evidence(self.workspace, release)
        stands = standing(self.workspace, self.alias)
        if stands.canary and stands.canary.release != release.digest:
            lacking.append("another release is on trial: promote it or roll it back first")
        outcome = {"release": name, "lacking": lacking}
        if lacking:
            return Done(outcome=outcome, verdict="refused", reason="; ".join(lacking))
        if stands.live is None:
            return Done(outcome=outcome, verdict="ready", reason="nothing is live to try it against")
        if not stands.canary:
            begin_trial(self.workspace, release, settings.canary, [], False, f"cycle {cycle.name}")
        return Done(outcome=outcome, verdict="canary", reason=f"it answers {100 * settings.canary:g} % of the conversations")

    def typed(self, words: str, **given: object) -> Namespace:
        """A command's arguments in this workspace."""
        return arguments(words, workspace=str(self.workspace.root), set=self.overrides, **given)

    def hold_engine(self) -> None:
        """Keep one engine for the stages that need one: theirs find it running."""
        from serve.command import engine_for

        if not self.has_engine:
            self.held.enter_context(engine_for(self.workspace, self.report))
            self.has_engine = True
