"""Blocks `task`, `compress` and `retrieve`: rows, template compression, example retrieval."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pi_ray.config.block import (
    Block,
    Count,
    Positive,
    Rate,
    check_plain_url,
    check_storage_url,
    doc,
    omit_default,
    refuse,
)
from pi_ray.config.metric import MetricConfig, MetricEntries, as_metrics, check_metrics

INPUTS = ("train", "dev", "test", "queries", "template", "tools", "folder", "docs")  # keys of `task` that name files
GENERATE = "generate"  # in task.queries: queries that a writer makes from the template
OWN_ROWS = ("jsonl", "conversations")  # tasks over a user's own files
COMPRESS_MODELS = {  # compressor -> its default model, where that is not compress.model's
    "llmlingua2": "microsoft/llmlingua-2-xlm-roberta-large-meetingbank",
    "generation": "gpt-4",
}


class RowsConfig(Block):
    """Rows of each split that are used, 0: all. opsql takes the first ones, other tasks those whose ids hash lowest."""

    train: Count = doc(0, "training rows that are taken; 0: all")
    dev: Count = doc(0, "dev rows; 0: all")
    test: Count = doc(0, "test rows; 0: all")
    unlabelled: Count = doc(0, "queries without an answer, for distillation")


class TaskConfig(Block):
    """The data, the template and the metric."""

    name: str = doc("jsonl", "jsonl (your own rows), conversations (your own, of many turns), opsql (bundled), "
        "nl2bash, mbpp, nl2f, nl2f-w, desk")
    train: str = doc("train.jsonl", "training rows, relative to run.yaml; empty (jsonl): none, a teacher that is not "
        "trained here answers the queries")
    dev: str = doc("dev.jsonl", "rows for choosing; may be missing")
    test: str = doc("test.jsonl", "held-out rows; only evaluated")
    queries: str = doc("queries.jsonl", "queries without answers, for train.objective distill, mixed; may be missing. "
        "generate: written from the template (block ask); queries.jsonl+generate: both")
    generate: bool = omit_default(False, "what task.queries sets when it asks for generated queries")
    template: str = doc("template.md", "instruction and documents")
    tools: str = omit_default("", "conversations: the tools that every request sends, a JSON list of OpenAI tool "
        "definitions; empty: none")
    learn: Literal["all", "last"] = omit_default("all", "conversations: which of the assistant's turns are learned and "
        "scored, every one or each conversation's last")
    folder: str = doc("", "data folder of a named task such as nl2bash; empty: from the hub, for tasks that are there")
    docs: str = doc("", "folder or file of API documents for the template; empty: those that ship with the task")
    docs_count: Positive = doc(6, "documents taken, most used in the training answers first")
    docs_examples: Count = doc(2, "examples kept of each document")
    unseen: tuple[str, ...] = omit_default((), "names, such as a function's, that no labelled training answer may use, "
        "so that only the template tells of them (tasks over published data sets)")
    split: Literal["upstream", "paper"] = omit_default("upstream", "mbpp: upstream's 374 training, 90 dev and 500 test "
        "rows, or about the paper's: 842, 30 and 102")
    subjects: Count = omit_default(0, "subjects of a desk (task desk); 0: all of the data set's")
    hidden: Count = omit_default(0, "subjects of a desk whose codes no labelled row has")
    labels: Literal["codes", "names"] = omit_default("codes", "answers of a desk: made-up codes, or subjects' names")
    allow_code_execution: bool = doc(False, "run generated programs, in a sandbox, to score them by their tests (mbpp)")
    unsafe_local_execution: bool = doc(False, "also where no sandbox can be: with your own rights, on your own files")
    metric: tuple[MetricConfig, ...] = omit_default((), "how answers to your own rows are scored: exact_match, "
        "normalized, contains, regex, number, choice, f1, bleu, rouge_l, json, tool_call, python or judge, by name or "
        "with its settings; of several the first decides. Default: exact match, and BLEU beside it")
    published: str = omit_default("", "folder with the template that labels still follow, since the template was "
        "changed after publishing: rows about the change and an anchor are trained on; 'pi-ray refresh' sets it")
    rows: RowsConfig = RowsConfig()
    max_bad_rows: Count = doc(0, "stop when more rows than this are rejected")
    overlap: Literal["error", "drop"] = doc("error", "a training query also in dev or test: stop, or train without it")

    @field_validator("metric", mode="before", json_schema_input_type=MetricEntries)
    @classmethod
    def _list_metrics(cls, value: Any) -> Any:
        return as_metrics(value)

    @model_validator(mode="before")
    @classmethod
    def _split_queries(cls, data: Any) -> Any:
        """`queries: generate` and `queries: FILE+generate` become the file, or none, and `generate: true`."""
        queries = data.get("queries") if isinstance(data, dict) else None
        if isinstance(queries, str) and (queries == GENERATE or queries.endswith(f"+{GENERATE}")):
            return {**data, "queries": queries.removesuffix(GENERATE).removesuffix("+").strip(), "generate": True}
        return data

    def model_post_init(self, context: Any) -> None:
        for key in INPUTS:
            check_storage_url(getattr(self, key), f"task.{key}")
        for metric in self.metric:
            check_storage_url(metric.file, "task.metric.file")
        check_metrics(self.metric)
        refuse(self.metric and self.name not in OWN_ROWS,
            f"task.metric is for rows of your own (task {' or '.join(OWN_ROWS)}); {self.name} brings its own")
        if self.unseen:
            refuse(self.name in OWN_ROWS, "task.unseen: leave such rows out of train.jsonl yourself")
            refuse(self.name == "opsql", "task.unseen: opsql has such rows already, its group 'template only'")
            refuse(self.name == "desk", "task.unseen: a desk hides subjects by task.hidden")
        refuse(self.name in OWN_ROWS and not (self.train or self.queries or self.generate),
            "task.train and task.queries are both empty; a run needs rows, or queries that a teacher answers")
        refuse((self.tools or self.learn != "all") and self.name != "conversations",
            "task.tools and task.learn are for rows with messages; set task.name conversations")
        elsewhere = self.name != "desk"
        refuse((self.subjects or self.hidden or self.labels == "names") and elsewhere,
            "task.subjects, task.hidden and task.labels are for task desk")
        refuse(self.hidden and self.labels == "names",
            "task.hidden: a subject's name is no secret of the template; take task.labels codes")

    @property
    def inputs(self) -> dict[str, str]:
        """Key below `task` -> each file or folder that is named, or may be: those of INPUTS, and of metrics."""
        files = {f"metric.{i}.file": metric.file for i, metric in enumerate(self.metric) if metric.file}
        return {**{key: getattr(self, key) for key in INPUTS}, **files} if self.name != "opsql" else {}


class DocumentsConfig(Block):
    """The template's documents, where they are not compressed as its instruction is (paper 4.1)."""

    name: str = doc("", "a compressor; empty: the instruction's")
    model: str = doc("", "empty: the instruction's, or the compressor's own where it is another")
    rate: Rate | dict[Rate, Rate] | None = doc(None, "what stays of them: one share, or {template rate: share}; "
        "default: the template rate. A template rate of 0 or 1 always holds for both")

    def rate_at(self, rate: float) -> float:
        """The documents' rate in a phase whose template rate is `rate`."""
        if self.rate is None or rate in (0, 1):
            return rate
        return self.rate.get(rate, rate) if isinstance(self.rate, dict) else self.rate


class CompressConfig(Block):
    """Template compression C(x, rate), paper equation 2."""

    name: str = doc("llmlingua", "llmlingua, longllmlingua, llmlingua2, selective, generation or none")
    model: str = doc("smollm2-135m", "what scores tokens: a small language model; for llmlingua2 a token classifier, "
        "default LLMLingua-2's own; for generation a chat model, default gpt-4")
    protect: tuple[str, ...] = doc((), "terms that survive verbatim, as placeholders, code, JSON, URLs, numbers do")
    protect_numbers: bool = doc(True, "numbers survive while they leave room for words, and are never cut")
    tolerance: Annotated[float, Field(gt=0, le=0.5)] = doc(0.05, "accepted distance between asked and achieved rate")
    documents: DocumentsConfig | None = omit_default(None, "the documents' compressor; default: the instruction's")
    question: str = omit_default("", "longllmlingua: the question that text is weighed by, such as a typical query; "
        "empty: what must be known for the task")
    base_url: str = omit_default("", "generation: the chat model's API; empty: OpenAI's own")
    api_key_env: str = omit_default("OPENAI_API_KEY", "generation: environment variable with its key")

    @model_validator(mode="before")
    @classmethod
    def _default_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and "model" not in data and data.get("name") in COMPRESS_MODELS:
            return {**data, "model": COMPRESS_MODELS[data["name"]]}
        return data

    def model_post_init(self, context: Any) -> None:
        check_plain_url(self.base_url, "compress.base_url")

    @property
    def label(self) -> str:
        """The names of the compressors, for people."""
        return self.name if self.documents is None else f"{self.name}, documents {self.for_documents.name}"

    @property
    def for_instruction(self) -> Self:
        """This block as it holds for the template's instruction."""
        return self.model_copy(update={"documents": None})

    @property
    def for_documents(self) -> Self:
        """This block as it holds for the template's documents."""
        documents = self.documents or DocumentsConfig()
        name = documents.name or self.name
        other = COMPRESS_MODELS.get(name, type(self).model_fields["model"].default)
        model = documents.model or (self.model if name == self.name else other)
        return self.model_copy(update={"documents": None, "name": name, "model": model})


class RetrieveConfig(Block):
    """Example retrieval, paper equation 3: sentence BLEU on the answers, in a large bank among FAISS's candidates."""

    encoder: str = doc("ngram", "vectors by which FAISS proposes, and for score embedding: ngram (hashed n-grams) or "
        "sentence-transformers; not used where every pair is scored by bleu or rouge-l")
    encoder_model: str = doc("all-minilm-l6-v2", "for sentence-transformers: packaged name, hub id or folder")
    candidates: Positive = doc(64, "rows that FAISS proposes for each row")
    method: Literal["auto", "exact", "faiss"] = omit_default("auto", "score every pair, or those that FAISS "
        "proposes; auto: exact up to 100,000 rows")
    score: Literal["bleu", "rouge-l", "embedding"] = omit_default("bleu", "what says how near two rows are: sentence "
        "BLEU (the paper), ROUGE-L, or the cosine of the encoder's vectors")
    diversity: Annotated[float, Field(ge=0, lt=1)] = omit_default(0.0, "above 0: an example this near to a better one "
        "is left out, such as 0.1: a score above 90 between the two")
    by: Literal["answer", "query"] = doc("answer", "what training rows are compared by; dev and test rows: the query")
    bank_fraction: Annotated[float, Field(gt=0, le=1)] = doc(1.0, "share of the rows in the example bank (paper 5.5)")
