"""Token-aware recursive chunking with overlap: every chunk is an exact slice of its document's text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rag.citations import page_of
from understudy.records import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter

VERSION = "semantic-text-splitter-1"  # of the algorithm; the settings below are part of a chunker's name


class Chunker:
    """Cuts documents at the largest semantic boundary (paragraph, sentence, word) that fits the token limit."""

    def __init__(self, tokenizer_file: Path, chunk_tokens: int, overlap_tokens: int) -> None:
        self.name = f"{VERSION}/{chunk_tokens}/{overlap_tokens}"
        self._splitter = make_splitter(tokenizer_file, chunk_tokens, overlap_tokens)

    def chunks(self, document: Document) -> list[Chunk]:
        """The document's chunks in order; together they cover every non-blank character of its text."""
        result = []
        for ordinal, (start, text) in enumerate(self._splitter.chunk_indices(document.text)):
            end = start + len(text)
            first, last = page_of(start, document.page_starts), page_of(end - 1, document.page_starts)
            result.append(
                Chunk(
                    id=Chunk.make_id(document.id, self.name, start, end),
                    document_id=document.id,
                    document=document.source,
                    text=text,
                    start=start,
                    end=end,
                    pages=list(range(first, last + 1)),
                    ordinal=ordinal,
                    tenant=document.tenant,
                )
            )
        return result


def make_splitter(tokenizer_file: Path, tokens: int, overlap: int) -> TextSplitter:
    """A splitter that counts in the given tokenizer, without its truncation."""
    from semantic_text_splitter import TextSplitter
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextSplitter.from_huggingface_tokenizer(tokenizer, tokens, overlap=min(overlap, tokens // 2))
