"""Retrieval over real embeddings: against a plain rendering of its definition, and each setting that moves a passage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rag.aggregate import contexts
from rag.embed import Embedder
from rag.filters import parse_conditions
from rag.generations import warm_file
from rag.load import load_document
from rag.nearest import sentence_spans
from rag.reindex import Reindexed, make_chunker, reindex
from rag.retrieve import Retriever, open_retriever, warm
from tests.conftest import MODELS, SAMPLE
from tests.rag.conftest import FOLDER, configured, loaded
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.progress import show_progress
from understudy.records import Passage
from understudy.settings.corpus import Retrieval
from understudy.workspace import Workspace, create_workspace

Put = Callable[..., Reindexed]
PARAGRAPHS = [" ".join(p.split()) for p in (SAMPLE / "sources" / "07-human-oversight.md").read_text(encoding="utf-8").split("\n\n") if len(p.split()) > 12][:30]
QUERIES = ["who may stop the system", "training of operators", "automation bias", "fallback by hand", "log of overrides"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A real handbook's paragraphs, for tests that change nothing."""
    workspace = create_workspace(str(tmp_path_factory.mktemp("corpus") / "workspace"))
    workspace.models.symlink_to(MODELS)
    file = workspace.root / "oversight.txt"
    file.write_text("\n\n".join(PARAGRAPHS))
    document = load_document(file, "default", workspace.config.ingest)
    embedder = loaded(FOLDER, "auto")
    workspace.store.add_document(document, make_chunker(workspace, embedder).chunks(document))
    reindex(workspace, embedder, show_progress)
    return workspace


def having(retriever: Retriever, **settings: object) -> Retriever:
    """The same retriever, with caches of its own, under other settings."""
    return Retriever(
        retriever.generation, retriever.searcher, retriever.facts, retriever.embedder, retriever.store, Retrieval.model_validate(settings), retriever.tenant
    )


def texts(passages: list[Passage]) -> list[str]:
    return [passage.chunk.text for passage in passages]


def test_search_is_reciprocal_rank_fusion_of_cosine_and_bm25(corpus: Workspace) -> None:
    retriever = open_retriever(corpus)
    ids, vectors = retriever.facts.chunk_ids, retriever.searcher.vectors  # type: ignore[attr-defined]
    scores: dict[str, float] = defaultdict(float)
    for query in QUERIES[:2]:
        near = np.argsort(-(vectors @ retriever.embed([query])[0]), kind="stable")[:20]
        words = [chunk_id for chunk_id, _ in retriever.searcher.search_lexical(query, 20)]
        for ranking in ([ids[row] for row in near], words):
            for rank, chunk_id in enumerate(ranking, 1):
                scores[chunk_id] += 1 / (60 + rank)
    expected = sorted(scores, key=lambda chunk_id: -scores[chunk_id])
    assert [passage.chunk.id for passage in retriever.search(QUERIES[:2], 20)] == expected[:20]
    assert [passage.chunk.id for passage in retriever.search(QUERIES[:2])] == expected[:2]
    assert [passage.chunk.id for passage in retriever.search([*QUERIES[:2], " ", QUERIES[0]], 2, exclude=expected[:1])] == expected[1:3]
    assert retriever.search([" "]) == []


def test_an_explanation_adds_up(corpus: Workspace) -> None:
    retriever = open_retriever(corpus)
    for explained in retriever.explain(QUERIES[:2], 5):
        shares = [finding.share for finding in explained.candidate.findings]
        assert explained.passage.scores.fused == pytest.approx(sum(shares))
        assert all(finding.share == pytest.approx(1 / (60 + finding.rank)) for finding in explained.candidate.findings)
        assert (explained.allowed, explained.candidate.boost, explained.candidate.stale_weight) == (None, 1.0, 1.0)


def test_filters_act_before_the_search(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, {"a.txt": [f"The stop button number {i} is red." for i in range(40)]}, tags=["floor"])
    put(corpus_workspace, {"b.txt": ["Flowers are watered on Fridays."]}, tags=["garden"])
    retriever = open_retriever(corpus_workspace)
    garden = parse_conditions(["tag=garden"])
    assert texts(retriever.search(["red stop button"], 5, where=garden)) == ["Flowers are watered on Fridays."]  # far below the candidates
    assert retriever.explain(["red stop button"], 5, where=garden)[0].allowed == 1
    assert retriever.search(["red stop button"], 5, where=parse_conditions(["tag=garden", "page>1"])) == []


def test_stale_documents_are_kept_downranked_or_excluded_and_the_clock_moves_on(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, {"old.txt": ["The fee is nine euro in the north."]}, valid_until=1_000.0)
    put(corpus_workspace, {"new.txt": ["The fee is twelve euro in the south wing of the house."]}, valid_from=500.0)
    opened, query = open_retriever(corpus_workspace), ["fee nine euro north"]
    now = [900.0]
    kept, downranked, excluded = (replace(having(opened, stale=stale), clock=lambda: now[0]) for stale in ("keep", "downrank", "exclude"))
    assert [r.search(query, 2)[0].chunk.document for r in (kept, downranked, excluded)] == ["old.txt"] * 3
    now[0] = 1_000.0  # the same retrievers, an instant later: no cache holds on
    assert [r.search(query, 2)[0].chunk.document for r in (kept, downranked, excluded)] == ["old.txt", "new.txt", "new.txt"]
    assert (len(downranked.search(query, 2)), len(excluded.search(query, 2))) == (2, 1)
    assert downranked.explain(query, 2)[1].candidate.stale_weight == 0.5
    now[0] = 400.0
    assert [p.chunk.document for p in excluded.search(query, 2)] == ["old.txt"]


def test_a_boost_lifts_a_document(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, {"a.txt": ["Tea is served at four."]})
    put(corpus_workspace, {"b.txt": ["Tea and cake are served at half past four."]}, boost=1.5)
    found = open_retriever(corpus_workspace).explain(["tea is served at four"], 2)
    assert [(e.passage.chunk.document, e.candidate.boost) for e in found] == [("b.txt", 1.5), ("a.txt", 1.0)]


def test_diversity_passes_over_a_near_copy(corpus_workspace: Workspace, put: Put) -> None:
    put(corpus_workspace, {"a.txt": ["The gate opens at nine.", "The gate opens at nine!", "Keys for the gate hang in the porch."]})
    opened = open_retriever(corpus_workspace)
    assert all("opens" in text for text in texts(opened.search(["when does the gate open"], 2)))
    found = having(opened, mmr=0.5).explain(["when does the gate open"], 2)
    assert "Keys" in found[1].passage.chunk.text
    assert found[0].candidate.novelty_penalty == 0.0
    assert 0 < (found[1].candidate.novelty_penalty or 0) < 0.5


def test_the_gap_decides_how_many_only_where_it_is_asked_to(corpus: Workspace) -> None:
    opened = open_retriever(corpus)
    adaptive = having(opened, k_min=1, k_max=6)
    counts = {len(adaptive.search([query])) for query in QUERIES}
    assert counts <= set(range(1, 7)) and len(counts) > 1
    assert len(adaptive.search(QUERIES[:1], 9)) == 9
    with pytest.raises(ValueError, match="k_min"):
        Retrieval(k_min=3)


@pytest.fixture
def reranker(tmp_path: Path, corpus_workspace: Workspace) -> Path:
    """A cross-encoder of real layers with random weights: it shows that re-ranking works, not that it helps."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(5)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1, initializer_range=1.0)
    folder = tmp_path / "cross"
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus_workspace.models / "all-minilm-l6-v2").save_pretrained(folder)
    return folder


def test_a_cross_encoder_orders_the_candidates_again(corpus: Workspace, reranker: Path) -> None:
    plain = {p.chunk.id for p in open_retriever(corpus).search(QUERIES[:1], 20)}
    retriever = open_retriever(configured(corpus, f"retrieval.reranker={reranker}"))
    found = retriever.search(QUERIES[:1], 20)
    scores = [passage.scores.reranked for passage in found]
    assert scores == sorted((score for score in scores if score is not None), reverse=True)
    assert len(set(scores)) > 10 and all(score is not None and 0 <= score <= 1 for score in scores)
    assert len({p.chunk.id for p in found} & plain) > 10
    with pytest.raises(NotFoundError):
        open_retriever(configured(corpus, "retrieval.reranker=missing"))


def test_opening_and_searching_read_only_the_chunks_returned(corpus: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    store = type(corpus.store)
    by_id = store.chunks_by_id
    monkeypatch.setattr(store, "chunks_by_id", lambda self, ids: (read.append(len(list(ids))), by_id(self, ids))[1])
    for name in ("chunks", "documents"):
        monkeypatch.setattr(store, name, lambda *_: pytest.fail("the corpus was read whole"))
    assert len(open_retriever(corpus).search(QUERIES[:1], 3)) == 3
    assert sum(read) <= 4


def test_warm_queries_are_not_embedded_again_until_the_generation_changes(corpus_workspace: Workspace, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_workspace
    put(corpus, {"oversight.txt": PARAGRAPHS[:6]})
    before = texts(open_retriever(corpus).search(QUERIES[:1]))
    assert warm(corpus, [*QUERIES, "", QUERIES[0]]) == len(QUERIES)
    file = warm_file(corpus.index, open_retriever(corpus).generation)
    with monkeypatch.context() as patched:
        patched.setattr(Embedder, "encode", lambda *_: pytest.fail("embedded"))
        assert texts(open_retriever(corpus).search(QUERIES[:1])) == before
    file.write_bytes(b"not an archive")
    with pytest.raises(StorageError, match="damaged"):
        open_retriever(corpus)
    put(corpus, {"more.txt": ["Another document."]})
    assert not file.exists()
    open_retriever(corpus)


def test_contexts_are_verbatim_whatever_the_strategy(corpus: Workspace) -> None:
    retriever = open_retriever(corpus)
    found = retriever.search(QUERIES[:1], 4)
    passages = retriever.in_order(found)
    (whole,) = contexts("concat", QUERIES[0], passages)
    assert whole == texts(sorted(found, key=lambda passage: passage.chunk.start))
    assert contexts("sequential", QUERIES[0], passages) == [[text] for text in texts(found)]
    (summary,) = contexts("summarise", QUERIES[0], passages, max_words=60)
    sentences = [text[start:end].strip() for text in summary for start, end in sentence_spans(text)]
    assert summary and sum(len(text.split()) for text in summary) <= 60
    assert all(any(sentence in text for text in whole) for sentence in sentences)
    assert contexts("summarise", "zebra", passages) == [[]]


def test_search_explains_itself_on_the_command_line(corpus: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from understudy.cli import main

    arguments = ["search", QUERIES[0], "--workspace", str(corpus.root), "--where", "page<=1", "--explain", "-k", "3"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["passages"]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    chunks = len(corpus.store.chunks("default"))
    assert rows[0]["explanation"]["allowed"] == chunks and rows[0]["explanation"]["findings"]
    assert main(arguments) == 0
    assert f"filters let {chunks} chunks through" in capsys.readouterr().out
    assert main(["search", "x", "--workspace", str(corpus.root), "--where", "tag $ne 1"]) == UsageError.exit_code
