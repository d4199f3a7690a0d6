"""Block `ask`: queries that are generated from the prompt itself (`task.queries: generate`)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pi_ray.config.block import Block, Count, Positive, Rate, doc, refuse

AskKind = Literal["direct", "reworded", "two", "edge"]
ADAPTER_KINDS: tuple[AskKind, ...] = ("direct", "two")  # that an adapter can learn to write from labelled rows


class AskConfig(Block):
    """Queries about every unit of the template (a line, a rule, an example), for a teacher to answer."""

    queries: Positive = doc(480, "queries that are kept at most")
    writer: Literal["auto", "adapter", "prompt", "endpoint"] = doc("auto", "adapter: the base with a small adapter "
        "that learns from labelled rows to write queries; prompt: the base as it is, told what to write, or a small "
        "one shown examples; endpoint: the model of the block 'closed', told what to write; auto: prompt for bases of "
        "3 billion weights or more, else adapter")
    kinds: tuple[AskKind, ...] = doc(("direct", "reworded", "two", "edge"), "direct: in the unit's words; reworded: in "
        "others; two: needs two units; edge: at a rule's border. An adapter writes direct and two alone")
    rounds: Positive = doc(3, "times that what is missing is asked for again")
    temperature: Annotated[float, Field(gt=0, le=2)] = doc(1.0, "of the writer: lower ones repeat themselves")
    top_p: Annotated[float, Field(gt=0, le=1)] = doc(0.95, "share of the probability that the writer draws from")
    near: Rate = doc(0.85, "a query is too near to another about the same units from this Jaccard similarity of their "
        "one- and two-word sequences on")
    updates: Positive = doc(60, "of the adapter that writes, 16 rows each")
    lr: Annotated[float, Field(gt=0)] = doc(1e-3, "of the adapter that writes")
    seed: Count = doc(0, "another one writes other queries")

    def model_post_init(self, context: Any) -> None:
        refuse(not self.kinds, "ask.kinds: name at least one kind of query")
        refuse(len(set(self.kinds)) < len(self.kinds), "ask.kinds names a kind twice")
        refuse(self.writer == "adapter" and not set(self.kinds) & set(ADAPTER_KINDS),
            "ask.kinds: an adapter writes the kinds direct and two alone; take one of them, or ask.writer prompt")
