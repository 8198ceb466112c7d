"""How langchain-cache.jsonl and langchain-semantic-cache.jsonl were made: by LangChain's own MongoDB caches, on a server of the real protocol.

A scripted OpenAI-compatible server answers three chains as notebooks have them (plan, answer, validate); LangChain keeps the calls through
langchain-mongodb in SecantusDB; the collections are written out as extended JSON. Not part of CI: it needs an environment of its own with
langchain-mongodb==0.12.1 langchain-openai==1.7.3 SecantusDB==0.7.0b3. Run: python make_langchain_cache.py
"""

import json
import socket
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bson import json_util
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.globals import set_llm_cache
from langchain_core.prompts import ChatPromptTemplate
from langchain_mongodb import MongoDBAtlasSemanticCache, MongoDBCache
from langchain_openai import ChatOpenAI
from pymongo import MongoClient

NOTES = {  # as tests/rag/test_foreign.py has them
    "kiln.txt": "The kiln is fired on Tuesdays at seven in the morning. The glaze cools for nine hours.",
    "barn.txt": "The barn doors are painted green every third summer by the village school.",
    "pond.txt": "The pond is stocked with forty carp in April, never later than the tenth.",
}
PLAN = ChatPromptTemplate.from_messages([("system", "You plan searches."), ("human", "Rewrite the question as a search query.\nQuestion: {question}")])
ANSWER = ChatPromptTemplate.from_messages([("system", "Answer from the context only."), ("human", "Context:\n{context}\n\nQuestion: {question}\nAnswer:")])
VALIDATE = ChatPromptTemplate.from_messages(
    [("human", "Context:\n{context}\n\nQuestion: {question}\nProposed answer: {answer}\nIs it right? Reply as Score: x with x from 0 to 1.")]
)
BARE = ChatPromptTemplate.from_messages([("human", "{question}")])
ASKED = {  # question: (search query, answer, score)
    "When is the kiln fired?": ("kiln firing time", "The kiln is fired on Tuesdays at seven in the morning.", "Score: 0.9"),
    "Who paints the barn doors?": ("barn doors painter", 'The village school: "painted green every third summer by the village school".', "Score: 1.0"),
    "Who owns the kiln?": ("kiln owner", "The provided context does not say who owns the kiln.", "Score: 0.8"),
    "How many carp are put in the pond?": ("pond carp", "About ninety trout and some eels were counted there.", "Score: 0.1"),
}
UNASKED = ("What is the capital of France?", "Paris is the capital of France.")


def reply_to(prompt: str) -> str:
    """The scripted model."""
    for question, (query, answer, score) in ASKED.items():
        if question in prompt:
            return score if "Proposed answer" in prompt else answer if "Context:" in prompt else query
    return UNASKED[1]


class Handler(BaseHTTPRequestHandler):
    """Chat completions."""

    def do_POST(self) -> None:
        """One completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": reply_to(body["messages"][-1]["content"])}
        usage = {"prompt_tokens": 80, "completion_tokens": 12, "total_tokens": 92}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        content = json.dumps({"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def run_chains(model: ChatOpenAI) -> None:
    """What an agentic notebook asks, in its order."""
    context = "\n\n".join(f"Source: {name}\n{text}" for name, text in NOTES.items())
    for question, (_, answer, _) in ASKED.items():
        (PLAN | model).invoke({"question": question})
        (ANSWER | model).invoke({"question": question, "context": context})
        (VALIDATE | model).invoke({"question": question, "context": context, "answer": answer})
    (BARE | model).invoke({"question": UNASKED[0]})


class UnsearchedSemanticCache(MongoDBAtlasSemanticCache):
    """SecantusDB has no $vectorSearch: only what the cache writes is wanted here."""

    def lookup(self, prompt: str, llm_string: str) -> None:
        """Never a hit."""


def main() -> None:
    """Record both caches."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"mongodb://127.0.0.1:{port}"
    api = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(["secantusd-py", "--host", "127.0.0.1", "--port", str(port), "--storage-path", folder])
        try:
            time.sleep(3)
            model = ChatOpenAI(model="gpt-teacher", base_url=f"http://127.0.0.1:{api.server_port}/v1", api_key="none", temperature=0)
            set_llm_cache(MongoDBCache(uri, "cache", "agenticrag"))
            run_chains(model)
            semantic = UnsearchedSemanticCache(uri, DeterministicFakeEmbedding(size=4), "semantic", "agenticrag", auto_create_index=False)
            set_llm_cache(semantic)
            run_chains(model)
            for name, file in (("cache", "langchain-cache.jsonl"), ("semantic", "langchain-semantic-cache.jsonl")):
                rows = MongoClient(uri)["agenticrag"][name].find()
                text = "".join(json_util.dumps(row) + "\n" for row in rows)
                (Path(__file__).parent / file).write_text(text.replace(f"127.0.0.1:{api.server_port}", "127.0.0.1:8000"))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
