"""GPTCache over streams of questions whose embeddings are given; run by bench_cache.py in an environment of its own.

Its quick start: init_similar_cache's default evaluation (SearchDistanceEvaluation) over its faiss store; only the embedding is
ours, because its default model has to be downloaded.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gptcache import Cache, Config
from gptcache.adapter.api import get, init_similar_cache, put
from gptcache.manager import manager_factory


class Given:
    """Embeddings that were computed before."""

    def __init__(self, vectors):
        self.vectors, self.dimension = vectors, len(next(iter(vectors.values())))

    def to_embeddings(self, text, **_):
        """The vector of a question."""
        return self.vectors[text]


def main():
    """Replay every order; a hit is the question whose answer came back."""
    folder, threshold = Path(sys.argv[1]), float(sys.argv[2])
    stored = np.load(folder / "vectors.npz")
    given = Given(dict(zip(stored["names"].tolist(), stored["vectors"], strict=True)))
    runs = []
    for number, order in enumerate(json.loads((folder / "orders.json").read_text())):
        cache = Cache()
        manager = manager_factory("sqlite,faiss", data_dir=str(folder / f"cache{number}"), vector_params={"dimension": given.dimension})
        init_similar_cache(cache_obj=cache, embedding=given, data_manager=manager, config=Config(similarity_threshold=threshold))
        hits = []
        for question in order:
            answer = get(question, cache_obj=cache)
            if answer is None:
                put(question, question, cache_obj=cache)
            else:
                hits.append([answer, question])
        runs.append(hits)
    (folder / "hits.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
