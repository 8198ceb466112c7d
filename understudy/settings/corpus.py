"""How documents become chunks, and chunks the passages shown to a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from understudy.settings.section import Section


class Ingest(Section):
    """How documents become chunks."""

    chunk_tokens: int = Field(96, ge=32, le=2048, description="longest chunk, in the embedder's tokens")
    overlap_tokens: int = Field(16, ge=0, le=512, description="tokens shared by neighbouring chunks")
    parser: Literal["auto", "docling"] = Field("auto", description="docling: the optional extra reads everything but text, Markdown and JSONL")
    parse_seconds: float = Field(120, gt=0, description="time limit for parsing one file, and its limit of processor time")
    parse_memory_gib: float = Field(2, gt=0, description="memory limit for parsing one file")
    parse_processes: int | None = Field(None, ge=1, le=64, description="files parsed at once; unset: the number of cores, at most 8")


class Retrieval(Section):
    """What is shown to the model."""

    k: int = Field(2, ge=1, le=50, description="passages shown to the model")
    candidates: int = Field(20, ge=1, le=1000, description="taken from each ranking before fusion")
    rrf_k: int = Field(60, ge=1, description="the constant of reciprocal rank fusion")
    k_min: int | None = Field(None, ge=1, description="with k_max: fewest passages; the widest gap between scores decides how many, instead of k")
    k_max: int | None = Field(None, ge=1, le=50, description="with k_min: most passages")
    mmr: float | None = Field(None, ge=0, le=1, description="maximal marginal relevance: weight of relevance against novelty; unset: off")
    reranker: str | None = Field(None, description="a cross-encoder in models/ that orders the candidates again; unset: none")
    server_search: bool = Field(True, description="search by MongoDB's search nodes where the store's server has them; false: always by the local index")
    aggregate: Literal["concat", "sequential", "summarise"] = Field(
        "concat", description="all in one prompt; one after another; their sentences that bear on the question"
    )
    stale: Literal["keep", "downrank", "exclude"] = Field("downrank", description="documents before valid_from or from valid_until on")

    @model_validator(mode="after")
    def _bounds(self) -> Retrieval:
        if (self.k_min is None) != (self.k_max is None) or (self.k_min or 0) > (self.k_max or 0):
            raise ValueError("k_min and k_max are set together, k_min being the smaller")
        return self
