"""What a run learns from: rows, template compression, example retrieval."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pi_ray.config.block import PLAIN_URL, Block, Count, Positive, Rate, added

INPUTS = ("train", "dev", "test", "queries", "template", "folder", "docs")  # keys of `task` that name files or folders
COMPRESS_MODELS = {"llmlingua2": "microsoft/llmlingua-2-xlm-roberta-large-meetingbank", "generation": "gpt-4"}  # compressors with a model of their own


class RowsConfig(Block):
    """How many rows of each split to use; 0, or more than there are, means all.

    opsql takes the first n of its seeded order; tasks that read files take the n rows whose ids hash lowest, in file order.
    """

    train: Count = 0
    dev: Count = 0
    test: Count = 0
    unlabelled: Count = Field(0, description="queries without an answer, for distillation")


class TaskConfig(Block):
    """The data, the template and the metric."""

    name: str = Field("jsonl", description="jsonl (your own rows), opsql (bundled), nl2bash, mbpp, nl2f, nl2f-w")
    train: str = Field("train.jsonl", description="training rows, relative to run.yaml")
    dev: str = Field("dev.jsonl", description="rows for choosing; may be missing")
    test: str = Field("test.jsonl", description="held-out rows; only evaluated")
    queries: str = Field("queries.jsonl", description="queries without an answer, such as a request log, for train.objective distill and mixed; may be missing")
    template: str = Field("template.md", description="instruction and documents")
    folder: str = Field("", description="data folder of a named task such as nl2bash; empty: from the hub, for tasks that are there")
    docs: str = Field("", description="folder or file of API documents that become the template's documents; empty: those that ship with the task")
    docs_count: Positive = Field(6, description="documents taken, most used in the training answers first")
    docs_examples: Count = Field(2, description="examples kept of each document")
    unseen: tuple[str, ...] = added((), "names, such as a function's, that no labelled row's answer may use, so that only the template tells of them (data sets that are tasks of their own)")
    allow_code_execution: bool = Field(False, description="run generated programs, in a sandbox, to score them by their tests (mbpp)")
    unsafe_local_execution: bool = Field(False, description="also where there can be no sandbox: with your own rights, on your own files")
    rows: RowsConfig = RowsConfig()
    max_bad_rows: Count = Field(0, description="stop when more rows than this are rejected")
    overlap: Literal["error", "drop"] = Field("error", description="a training query that also stands in dev or test: stop, or drop it from training")

    @model_validator(mode="after")
    def _unseen_where_it_holds(self) -> TaskConfig:
        if self.unseen and self.name in ("jsonl", "opsql"):
            raise ValueError("task.unseen: leave such rows out of train.jsonl yourself" if self.name == "jsonl" else "task.unseen: opsql has such rows already, its group 'template only'")
        return self


class DocumentsConfig(Block):
    """The template's documents, where they are not compressed as its instruction is (paper 4.1)."""

    name: str = Field("", description="a compressor; empty: the instruction's")
    model: str = Field("", description="empty: the instruction's, or the compressor's own where it is another")
    rate: Rate | dict[Rate, Rate] | None = Field(None, description="what stays of them: one share, or {template rate: share}; default: the template rate. A template rate of 0 or 1 always holds for both")

    def at(self, rate: float) -> float:
        """The documents' rate where the template's is `rate`."""
        if self.rate is None or rate in (0, 1):
            return rate
        return self.rate.get(rate, rate) if isinstance(self.rate, dict) else self.rate


class CompressConfig(Block):
    """Template compression C(x, rate), paper equation 2."""

    name: str = Field("llmlingua", description="llmlingua, longllmlingua, llmlingua2, selective, generation or none")
    model: str = Field("smollm2-135m", description="what scores tokens: a small language model; for llmlingua2 a token classifier, default LLMLingua-2's own; for generation a chat model, default gpt-4")
    protect: tuple[str, ...] = Field((), description="terms that survive byte for byte, besides placeholders, code, JSON, URLs and numbers")
    protect_numbers: bool = Field(True, description="numbers survive while they leave room for words, and are never cut")
    tolerance: Annotated[float, Field(gt=0, le=0.5)] = Field(0.05, description="accepted distance between asked and achieved rate")
    documents: DocumentsConfig | None = added(None, "compressor and rate of the documents; default: the instruction's")
    question: str = added("", "longllmlingua: the question that text is weighed by, such as a typical query; empty: what must be known for the task")
    base_url: str = added("", "generation: the chat model's API; empty: OpenAI's own")
    api_key_env: str = added("OPENAI_API_KEY", "generation: environment variable with its key")

    @model_validator(mode="before")
    @classmethod
    def _own_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and "model" not in data and data.get("name") in COMPRESS_MODELS:
            return {**data, "model": COMPRESS_MODELS[data["name"]]}
        return data

    @model_validator(mode="after")
    def _no_secret(self) -> CompressConfig:
        if self.base_url and not re.fullmatch(PLAIN_URL, self.base_url):
            raise ValueError("compress.base_url must be an http or https URL without user, password or query; the key belongs in the environment")
        return self

    @property
    def label(self) -> str:
        """The compressors in words."""
        return self.name if self.documents is None else f"{self.name}, documents {self.of_documents.name}"

    @property
    def of_instruction(self) -> CompressConfig:
        return self.model_copy(update={"documents": None})

    @property
    def of_documents(self) -> CompressConfig:
        """The documents' compressor as a config of its own."""
        own = self.documents or DocumentsConfig()
        name = own.name or self.name
        model = own.model or (self.model if name == self.name else COMPRESS_MODELS.get(name, type(self).model_fields["model"].default))
        return self.model_copy(update={"documents": None, "name": name, "model": model})


class RetrieveConfig(Block):
    """Example retrieval, paper equation 3: exact sentence BLEU on the answers, in a very large bank among candidates of FAISS."""

    encoder: str = Field("ngram", description="vectors by which FAISS proposes, and for score embedding: ngram (hashed n-grams) or sentence-transformers; not used where every pair is scored by bleu or rouge-l")
    encoder_model: str = Field("all-minilm-l6-v2", description="for sentence-transformers: packaged name, hub id or folder")
    candidates: Positive = Field(64, description="rows that FAISS proposes for each row")
    method: Literal["auto", "exact", "faiss"] = added("auto", "exact: every pair is scored; faiss: those that FAISS proposes; auto: exact up to 100,000 rows")
    score: Literal["bleu", "rouge-l", "embedding"] = added("bleu", "what says how near two rows are: sentence BLEU (the paper), ROUGE-L, or the cosine of the encoder's vectors")
    diversity: Annotated[float, Field(ge=0, lt=1)] = added(0.0, "above 0: an example this near to a better one is left out, such as 0.1: a score above 90 between the two")
    by: Literal["answer", "query"] = Field("answer", description="what training rows are compared by; dev and test rows have no answer yet, so always by query")
    bank_fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the training rows that may serve as examples (paper 5.5)")
