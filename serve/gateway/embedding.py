"""POST /v1/embeddings, by the workspace's embedder: the same vectors that the index is made of."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

from serve.gateway.errors import Refused
from serve.gateway.requests import EmbeddingRequest
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.embed import Embedder


class SharedEmbedder:
    """The workspace's embedder, loaded when it is first asked for, used by one request at a time: it takes every core already."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._embedder: Embedder | None = None
        self._loading, self._using = asyncio.Lock(), asyncio.Lock()

    async def get(self) -> Embedder:
        """The embedder. Raises NotFoundError where its weights are missing."""
        from rag.reindex import open_embedder

        async with self._loading:
            if self._embedder is None:
                self._embedder = await asyncio.to_thread(open_embedder, self._workspace)
            return self._embedder

    async def embed(self, request: EmbeddingRequest) -> dict[str, Any]:
        """OpenAI's reply. Raises Refused where a text is longer than the embedder reads: it would be cut off silently."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        if not all(text.strip() for text in texts):
            raise Refused(400, "empty_input", "there is an empty text in `input`", "input")
        embedder = await self.get()
        async with self._using:
            counts = await asyncio.to_thread(embedder.count_tokens, texts)
            if (longest := max(counts)) > embedder.window:
                raise Refused(
                    400, "context_length_exceeded", f"a text has {longest} tokens, and {request.model} reads {embedder.window}; cut it in parts", "input"
                )
            vectors = await asyncio.to_thread(embedder.encode, texts)
        if request.dimensions not in (None, vectors.shape[1]):
            raise Refused(400, "unsupported_parameter", f"{request.model} gives {vectors.shape[1]} dimensions", "dimensions")
        as_text = request.encoding_format == "base64"  # little-endian float32, as the SDKs ask for it
        rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist() for vector in vectors]
        total = sum(counts)
        listed = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return {"object": "list", "data": listed, "model": request.model, "usage": {"prompt_tokens": total, "total_tokens": total}}
