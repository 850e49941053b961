"""The layout table: which ranks train which model on which data, and how far from one process they may end.

A row is a layout in an engine; its yardstick is the same model, data and optimizer in one process, by plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile

from ernie5.data.synthetic import TASKS

DEGREES = (
    "pp", "vpp", "stage_layers", "tp", "cp", "ep", "etp", "sequence", "context", "context_chunk", "dispatcher",
    "node_size", "overlap",
)
STEPS, LONG_STEPS = 2, 20
# two large steps show a wrong gradient best. Twenty such steps amplify rounding until routers see it: with etp 2 the
# first other choice had a gap of 6e-6, at step 19. Configurations take 1e-4 to 2e-3.
LEARNING_RATES = {STEPS: 1e-2, LONG_STEPS: 1e-3}
_BALANCE = {"switch_loss": True, "sequence_loss": True, "z_loss": True}
# two key heads, a dense layer, a shared expert, an untied head, bits, classes and columns that two ranks cannot share
# evenly, and every loss of balance
_RICH = {
    "query_heads": 4, "kv_heads": 2, "dense_layers": 1, "tie_embeddings": False, "dense_width": 47,
    "moe": {"shared_experts": 1, "balance": _BALANCE},
}
# what differs from the model of tests/engine/tiny_run.py: three layers, two query heads, one key head, eight experts
MODELS: dict[str, dict] = {
    "tiny": {},
    "grouped": {"moe": {"num_groups": 2, "shared_experts": 1}},
    "rich": _RICH,
    "tied": {"query_heads": 4, "kv_heads": 2},
    "wide": {"query_heads": 4, "kv_heads": 4},
    # two ranks cannot share the smallest parameters (norms) evenly, and all of them are an odd number of elements
    "odd": {"qk_norm": False, "width": 33, "dense_width": 47, "visual": {"vit_width": 40}},
    "threes": {"query_heads": 3, "kv_heads": 3, "moe": {"num_experts": 9, "expert_width": 18}},
    # no two, three or four equal stages; multi-token prediction reads the embedding on the last stage, levels of audio
    # are read on several ones
    "deep": {**_RICH, "layers": 5},
    "deep-tied": {"query_heads": 4, "kv_heads": 2, "layers": 4},
}
OBJECTIVES = {name: {"switch_weight": 0.1, "sequence_weight": 0.1, "z_weight": 0.01} for name in ("rich", "deep")}


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Largest differences from the yardstick: losses and norms relative; gradients of step 1 relative to a tensor's
    largest; movement: of a tensor from start to end, relative to its norm; hidden: absolute, normed states of order one
    """

    losses: float
    norms: float
    gradients: float
    movement: float
    hidden: float
    evaluated: float


# Sums of fp32 numbers in another order. AdamW divides by sqrt(v): rounding of a tiny gradient moves a weight by a part
# of the step, and what differs in weights differs in hidden states.
FP32 = Tolerances(losses=1e-5, norms=1e-5, gradients=1e-5, movement=1e-3, hidden=1e-3, evaluated=1e-5)
# What bf16 rounds away: one process in bf16 differs from itself in fp32, choices alike, by 5.4e-2 of a gradient's
# largest (a norm and the queries of the vision encoder). AdamW makes a whole step out of a gradient's sign.
BF16 = Tolerances(losses=1e-2, norms=2e-2, gradients=5e-2, movement=math.inf, hidden=math.inf, evaluated=1e-2)
# the same sums in double precision: what fp32 shows is rounding
FP64 = Tolerances(losses=1e-10, norms=1e-10, gradients=1e-10, movement=1e-10, hidden=1e-10, evaluated=1e-10)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout.

    parallel: degrees; stage: of ZeRO under DeepSpeed, None for the grid engine; case: what the routers are driven to;
    rows: of a step, each a micro-batch of `tokens`; tasks: of the even ones, and `others` of the odd ones; settings: of
    the engine; sub_group: elements that ZeRO 3 steps at a time; poison: fresh memory holds NaN; third: also save, load
    and go on; dropped: a step is accumulated and dropped between the two; is_local: the yardstick itself.
    """

    name: str
    ranks: int = 1
    model: str = ""
    parallel: dict = dataclasses.field(default_factory=dict)
    stage: int | None = None
    slow: bool = False
    case: str = "usual"
    rows: int = 4
    tokens: int = 157
    documents: int | None = None
    tasks: tuple[str, ...] = TASKS
    others: tuple[str, ...] = ("text",)
    optimizer: str = "adamw"
    precision: str = "fp32"
    settings: dict = dataclasses.field(default_factory=dict)
    sub_group: int = 1_000_000_000
    poison: bool = False
    third: bool = False
    dropped: bool = False
    count_bytes: bool = False
    measure: bool = False
    is_local: bool = False

    @property
    def tolerances(self) -> Tolerances:
        """How far this row may be from its yardstick."""
        return {"fp32": FP32, "bf16": BF16, "fp64": FP64}[self.precision]

    @property
    def dp(self) -> int:
        """Ranks that read other data."""
        return self.ranks // math.prod(self.parallel.get(axis, 1) for axis in ("pp", "cp", "tp"))

    def yardstick(self) -> Row:
        """The same training in one process; rows that train alike share it."""
        kept = ("model", "case", "rows", "tokens", "documents", "tasks", "others", "optimizer", "precision")
        values = {name: vars(self)[name] for name in kept}
        words = ("+".join(value) if isinstance(value, tuple) else str(value) for value in values.values())
        name = "local-" + "-".join("all" if word == "+".join(TASKS) else word for word in words)
        return Row(name=name, **values, third=self.precision != "fp64", is_local=True)


def row(name: str, **fields: object) -> Row:
    """A row whose degrees stand beside its other fields."""
    parallel = {key: fields.pop(key) for key in DEGREES if key in fields}
    return Row(name=name, parallel=parallel, **fields)


def group(model: str, ranks: int, *rows: Row, slow: bool = False) -> list[Row]:
    """Rows of so many processes and, unless they say otherwise, of one model."""
    return [dataclasses.replace(made, model=made.model or model, ranks=ranks, slow=slow) for made in rows]


FULL, OPERATORS, HOST = {"recompute": "full"}, {"recompute": "selective"}, {"offload_optimizer": "cpu"}
NVME = {"offload_optimizer": "nvme", "nvme_path": tempfile.gettempdir()}  # the files have no name
NODES = {"dispatcher": "hierarchical", "node_size": 2}
UNEVEN = {"dispatcher": "hierarchical", "node_size": 3}

QUICK = [
    *group(
        "tiny", 2,
        row("dp2"),
        row("ep2", ep=2, count_bytes=True, third=True),
        row("ep2-again", ep=2),
        row("ep2-all-tokens-to-one-rank", ep=2, case="one_rank"),
        row("ep2-expert-without-token", ep=2, case="idle_expert"),
        row("ep2-allgather", ep=2, dispatcher="allgather"),
        row("etp2", etp=2),
        row("ep2-zero0", ep=2, stage=0),
        row("ep2-zero1", ep=2, stage=1, third=True),
        row("ep2-zero2", ep=2, stage=2),
        row("ep2-zero3", ep=2, stage=3, third=True),
        row("ep2-one-rank", ep=2, case="one_rank"),
        row("ep2-one-rank-full", ep=2, case="one_rank", settings=FULL),
        row("zero1-odd-dropped", stage=1, model="odd", dropped=True),
        row("zero3-odd-dropped", stage=3, model="odd", dropped=True),
        row("ep2-zero3-full", ep=2, stage=3, settings=FULL),
        row("ep2-zero1-host", ep=2, stage=1, settings=HOST),
        row("ep2-halves", ep=2, overlap="halves", case="one_rank"),
        row("etp2-muon", etp=2, optimizer="muon"),
    ),
    *group(
        "tiny", 4,
        row("ep2-dp4", ep=2),
        row("ep2-etp2", ep=2, etp=2),
        row("ep2-dp4-zero1", ep=2, stage=1),
        row("ep4-nodes-groups-beside", ep=4, model="grouped", overlap="shared", **NODES),
    ),
    *group(
        "rich", 2,
        row("tp2", tp=2),
        row("tp2-etp2-sequence", tp=2, etp=2, sequence=True),
        row("cp2-ep2", cp=2, ep=2),
        row("cp2-rounds", cp=2, context_chunk=8),
        row("cp2-ulysses-tied", cp=2, context="ulysses", model="tied"),
        row("cp2-muon", cp=2, model="tied", optimizer="muon"),
        row("cp2-zero1", cp=2, stage=1),
        row("tp2-zero1", tp=2, stage=1, third=True),
        row("tp2-one-key-head", tp=2, model="tiny"),
        row("tp2-muon", tp=2, model="tied", optimizer="muon", third=True),
    ),
    *group("rich", 4, row("tp2-cp2-ep4-sequence", tp=2, cp=2, ep=4, sequence=True),
           row("tp4-two-key-heads", tp=4, third=True)),
    *group(
        "deep", 2,
        row("pp2", pp=2, third=True),
        row("pp2-vpp2-tied", pp=2, vpp=2, model="deep-tied"),
        row("tp2-ep2-zero2", tp=2, ep=2, stage=2),
        row("pp2-zero1", pp=2, stage=1, third=True),
        row("tp2-ep2-zero1-muon", tp=2, ep=2, stage=1, optimizer="muon", model="tied", third=True),
    ),
]
EXPERTS = [
    *group(
        "tiny", 2,
        row("ep2-one-rank-operators", ep=2, case="one_rank", settings=OPERATORS),
        row("ep2-zero2-full", ep=2, stage=2, settings=FULL),
        row("ep2-zero1-one-rank-full", ep=2, stage=1, case="one_rank", settings=FULL),
        row("cp2-ep2-full", cp=2, ep=2, settings=FULL),
        row("ep2-zero2-host", ep=2, stage=2, settings=HOST),
        row("ep2-zero3-host", ep=2, stage=3, settings={**HOST, **FULL}),
        row("ep2-zero3-nvme", ep=2, stage=3, settings=NVME),
        row("ep2-all-tokens-to-one-expert", ep=2, case="one_expert"),
        row("ep2-forty-documents", ep=2, documents=40, tokens=400),
        row("ep2-poison", ep=2, case="one_rank", poison=True),
        row("ep2-zero2-poison", ep=2, stage=2, poison=True),
        row("ep2-halves-usual", ep=2, overlap="halves"),
        row("ep2-halves-poison", ep=2, overlap="halves", case="one_rank", poison=True),
        row("ep2-halves-operators", ep=2, overlap="halves", settings=OPERATORS),
        row("ep2-zero3-halves-full", ep=2, stage=3, overlap="halves", settings=FULL),
        row("ep2-rank-without-image", ep=2, others=("text", "audio_to_text", "text_to_audio")),
        row("ep2-rank-without-text", ep=2, others=("speech",)),
        row("ep2-zero2-rank-without-text", ep=2, stage=2, others=("speech",)),
        slow=True,
    ),
    *group("threes", 3, row("dp3", rows=3), row("ep3", ep=3, rows=3), row("etp3", etp=3, rows=3),
           row("dp3-zero1", stage=1, rows=3), row("dp3-zero2", stage=2, rows=3), row("dp3-zero3", stage=3, rows=3),
           row("ep3-zero1", ep=3, stage=1, rows=3), slow=True),
    *group(
        "tiny", 4,
        row("dp4"),
        row("ep4", ep=4, case="one_rank"),
        row("ep4-usual", ep=4),
        row("etp4", etp=4),
        row("etp2-dp4", etp=2),
        row("ep2-etp2-allgather", ep=2, etp=2, dispatcher="allgather"),
        row("ep2-dp4-zero0", ep=2, stage=0),
        row("ep2-dp4-zero2", ep=2, stage=2),
        row("ep2-dp4-zero3", ep=2, stage=3),
        row("ep2-etp2-zero1", ep=2, etp=2, stage=1),
        row("ep2-etp2-zero3", ep=2, etp=2, stage=3),
        row("ep4-zero3", ep=4, stage=3, case="one_rank"),
        row("ep4-uneven-nodes-one-rank", ep=4, case="one_rank", **UNEVEN),
        row("ep4-uneven-nodes", ep=4, **UNEVEN),
        row("ep4-uneven-nodes-zero2", ep=4, stage=2, **UNEVEN),
        row("ep2-etp2-nodes", ep=2, etp=2, **NODES),
        row("ep4-nodes-zero3-full", ep=4, stage=3, settings=FULL, **NODES),
        row("ep2-dp4-zero2-host", ep=2, stage=2, settings=HOST),
        row("pp2-ep2-full", pp=2, ep=2, settings=FULL),
        row("ep4-nodes-groups-halves", ep=4, model="grouped", overlap="halves", **NODES),
        row("ep2-etp2-halves", ep=2, etp=2, overlap="halves"),
        slow=True,
    ),
]
TENSOR = [
    *group(
        "rich", 2,
        row("dp2-zero0-muon", model="tied", optimizer="muon", stage=0),
        row("dp2-zero1-muon", model="tied", optimizer="muon", stage=1),
        row("cp2-ep2-zero2-muon", cp=2, ep=2, model="tied", optimizer="muon", stage=2),
        row("tp2-tied", tp=2, model="tied"),
        row("tp2-sequence", tp=2, sequence=True),
        row("tp2-ep2-one-rank", tp=2, ep=2, case="one_rank"),
        row("tp2-ep2", tp=2, ep=2),
        row("cp2", cp=2),
        row("cp2-zero0", cp=2, stage=0),
        row("cp2-ep2-zero2", cp=2, ep=2, stage=2),
        row("cp2-ep2-zero3", cp=2, ep=2, stage=3),
        slow=True,
    ),
    *group("rich", 3, row("cp3", cp=3), row("cp3-tied", cp=3, model="tied"), row("tp3", tp=3, model="threes"),
           slow=True),
    *group(
        "rich", 4,
        row("tp2-dp2", tp=2),
        row("tp2-dp2-zero0", tp=2, stage=0),
        row("tp2-dp2-zero2", tp=2, stage=2),
        row("tp2-dp2-zero3-sequence", tp=2, sequence=True, stage=3),
        row("tp2-cp2-zero1-sequence", tp=2, cp=2, sequence=True, stage=1),
        row("tp2-dp2-ep2", tp=2, ep=2),
        row("tp2-dp2-ep4-sequence", tp=2, ep=4, sequence=True),
        row("tp2-dp2-ep2-etp2", tp=2, ep=2, etp=2),
        row("tp2-cp2", tp=2, cp=2),
        row("tp2-cp2-ep2", tp=2, cp=2, ep=2),
        row("tp2-cp2-ulysses-tied", tp=2, cp=2, context="ulysses", model="tied"),
        row("tp2-cp2-ep2-etp2-sequence", tp=2, cp=2, ep=2, etp=2, sequence=True),
        row("tp2-cp2-ep2-allgather", tp=2, cp=2, ep=2, dispatcher="allgather"),
        row("cp2-ep2-dp2", cp=2, ep=2),
        row("cp4", cp=4),
        row("cp4-rounds", cp=4, context_chunk=5),
        row("cp4-ulysses-rounds", cp=4, context="ulysses", context_chunk=8),
        row("tp2-cp2-ep2-rounds-zero2", tp=2, cp=2, ep=2, context_chunk=8, stage=2),
        row("pp2-cp2-rounds-forty-documents", pp=2, cp=2, context_chunk=8, model="deep", documents=40, tokens=400),
        row("cp4-ep2", cp=4, ep=2),
        row("cp2-dp2-ep4-one-rank", cp=2, ep=4, case="one_rank"),
        row("cp4-ulysses", cp=4, context="ulysses"),
        row("tp4", tp=4, model="wide"),
        row("tp4-ep4-two-key-heads-sequence", tp=4, ep=4, sequence=True),
        row("tp2-cp2-one-key-head", tp=2, cp=2, model="tiny"),
        row("tp2-dp2-ep2-one-key-head", tp=2, ep=2, model="tiny"),
        row("tp2-dp2-ep4-sequence-halves", tp=2, ep=4, sequence=True, overlap="halves"),
        row("tp2-cp2-ep2-halves", tp=2, cp=2, ep=2, overlap="halves"),
        row("tp4-ep4-one-token-per-rank", tp=4, ep=4, model="wide", tokens=4),
        row("tp4-ep4-one-token-per-rank-halves", tp=4, ep=4, model="wide", tokens=4, overlap="halves"),
        row("cp4-one-token-per-rank", cp=4, tokens=4),
        slow=True,
    ),
]
STAGES = [
    *group(
        "deep", 2,
        row("pp2-again", pp=2),
        row("pp2-tied", pp=2, model="deep-tied"),
        row("pp2-one-micro-batch", pp=2, model="deep-tied", rows=1),
        row("pp2-four-and-one-layers", pp=2, stage_layers=(4, 1)),
        row("pp2-one-and-four-layers", pp=2, stage_layers=(1, 4)),
        row("pp2-text-alone", pp=2, tasks=("text",)),
        row("pp2-muon", pp=2, optimizer="muon", model="deep-tied"),
        row("pp2-vpp2", pp=2, vpp=2),
        row("pp2-vpp2-again", pp=2, vpp=2),
        row("pp2-vpp2-three-micro-batches", pp=2, vpp=2, rows=3),
        row("pp2-vpp2-one-micro-batch", pp=2, vpp=2, model="deep-tied", rows=1),
        row("pp2-vpp2-recompute", pp=2, vpp=2, settings=FULL),
        slow=True,
    ),
    *group("deep", 3, row("pp3", pp=3), row("pp3-three-micro-batches", pp=3, rows=3), slow=True),
    *group(
        "deep", 4,
        row("pp2-dp2", pp=2),
        row("pp2-ep2", pp=2, ep=2),
        row("pp2-tp2", pp=2, tp=2),
        row("pp2-tp2-sequence", pp=2, tp=2, sequence=True),
        row("pp2-tp2-ep2", pp=2, tp=2, ep=2),
        row("pp2-etp2", pp=2, etp=2),
        row("pp2-cp2", pp=2, cp=2),
        row("pp4-tied", pp=4, model="deep-tied"),
        row("pp2-vpp2-ep2", pp=2, vpp=2, ep=2),
        row("pp2-vpp2-ep2-halves", pp=2, vpp=2, ep=2, overlap="halves"),
        row("pp2-vpp2-tp2-sequence-tied", pp=2, vpp=2, tp=2, sequence=True, model="deep-tied"),
        slow=True,
    ),
]
ZERO = [
    *group(
        "deep", 2,
        row("tp2-ep2-zero0", tp=2, ep=2, stage=0),
        row("tp2-ep2-zero1", tp=2, ep=2, stage=1),
        row("tp2-ep2-zero3-sequence", tp=2, ep=2, sequence=True, stage=3),
        row("tp2-etp2-zero1", tp=2, etp=2, stage=1),
        row("tp2-etp2-zero3", tp=2, etp=2, stage=3),
        row("tp2-ep2-zero1-one-rank", tp=2, ep=2, stage=1, case="one_rank"),
        row("tp2-ep2-zero2-host", tp=2, ep=2, stage=2, settings=HOST),
        row("pp2-zero1-tied", pp=2, stage=1, model="deep-tied"),
        row("pp2-vpp2-zero1", pp=2, vpp=2, stage=1),
        row("pp2-zero1-one-micro-batch", pp=2, stage=1, model="deep-tied", rows=1),
        row("pp2-zero1-recompute", pp=2, stage=1, settings=FULL),
        row("pp2-zero1-host", pp=2, stage=1, settings=HOST),
        row("pp2-zero1-muon", pp=2, stage=1, optimizer="muon", model="deep-tied"),
        slow=True,
    ),
    *group(
        "deep", 4,
        row("tp2-dp2-ep2-zero1", tp=2, ep=2, stage=1),
        row("tp2-dp2-ep2-zero2", tp=2, ep=2, stage=2),
        row("tp2-dp2-ep2-zero3", tp=2, ep=2, stage=3, third=True),
        row("tp2-dp2-ep4-zero2-sequence", tp=2, ep=4, sequence=True, stage=2),
        row("tp2-dp2-ep2-etp2-zero3", tp=2, ep=2, etp=2, stage=3),
        row("tp2-dp2-etp2-zero2", tp=2, etp=2, stage=2),
        row("tp2-cp2-ep2-zero2", tp=2, cp=2, ep=2, stage=2),
        row("tp2-dp2-ep2-zero3-host", tp=2, ep=2, stage=3, settings=HOST),
        row("pp2-dp2-zero1", pp=2, stage=1, third=True),
        row("pp2-ep2-zero1", pp=2, ep=2, stage=1),
        row("pp2-ep2-zero1-stage-without-experts", pp=2, ep=2, stage=1, stage_layers=(1, 4)),
        row("pp2-tp2-zero1", pp=2, tp=2, stage=1),
        row("pp2-tp2-ep2-zero1-sequence", pp=2, tp=2, ep=2, stage=1, sequence=True),
        row("pp2-etp2-zero1", pp=2, etp=2, stage=1),
        row("pp2-cp2-zero1", pp=2, cp=2, stage=1),
        row("pp2-vpp2-ep2-zero1-tied", pp=2, vpp=2, ep=2, stage=1, model="deep-tied"),
        row("tp4-etp2-zero2-two-key-heads", tp=4, etp=2, stage=2, third=True),
        row("tp4-ep2-zero3-two-key-heads", tp=4, ep=2, stage=3),
        row("tp2-dp2-zero1-one-key-head", tp=2, stage=1, model="tiny", third=True),
        slow=True,
    ),
    *group("deep", 6, row("pp2-dp3-zero1", pp=2, stage=1, rows=6), slow=True),
]
EIGHT = group(
    "deep", 8,
    row("pp2-vpp2-ep2-tp2", pp=2, vpp=2, ep=2, tp=2),
    row("pp2-tp2-ep4-sequence", pp=2, tp=2, ep=4, sequence=True),
    row("pp2-cp2-tp2-ep2-etp2", pp=2, cp=2, tp=2, ep=2, etp=2),
    # a picture that a cut divides makes a part longer, not every micro-batch has one, and layers run again
    row("pp2-cp2-tp2-sequence-full", pp=2, cp=2, tp=2, ep=2, sequence=True, settings=FULL),
    row("pp2-cp2-ep4", pp=2, cp=2, ep=4),
    row("pp4-ep2", pp=4, ep=2),
    row("cp2-tp2-dp2-ep4", cp=2, tp=2, ep=4, model="rich"),
    row("cp4-tp2-ep2-sequence", cp=4, tp=2, ep=2, sequence=True, model="rich"),
    row("tp2-dp4-ep2-etp2", tp=2, ep=2, etp=2, model="rich"),
    # parts of tp ranks have uneven sizes, and a ring over four ranks sums an element in an order that follows from its
    # place: copies of an expert drifted apart while both kinds shared a buffer
    *(row(f"tp2-cp2-dp2-zero{stage}", tp=2, cp=2, stage=stage, model="rich") for stage in range(4)),
    row("pp2-tp2-dp2-ep2-zero1", pp=2, tp=2, ep=2, stage=1, third=True),
    row("pp2-tp4-ep2-zero1-two-key-heads", pp=2, tp=4, ep=2, stage=1),
    row("ep4-etp2", ep=4, etp=2, model="tiny", rows=8),
    row("ep8", ep=8, model="tiny", rows=8),
    row("ep8-nodes-of-five-and-three", ep=8, model="tiny", rows=8, dispatcher="hierarchical", node_size=5),
    row("ep4-etp2-zero1", ep=4, etp=2, stage=1, model="tiny", rows=8),
    row("ep4-dp8-zero2", ep=4, stage=2, model="tiny", rows=8),
    row("cp2-ep4-zero3", cp=2, ep=4, stage=3, model="rich"),
    slow=True,
)
MATRICES = [
    *group(
        "deep", 2,
        row("tp2-muon-rich", tp=2, model="rich"),
        row("tp2-sequence-muon", tp=2, sequence=True, model="rich"),
        row("tp2-ep2-muon", tp=2, ep=2, model="rich"),
        row("tp2-muon-one-key-head", tp=2, model="tiny"),
        row("etp2-zero0-muon", etp=2, stage=0, model="tiny", third=True),
        row("tp2-zero0-muon", tp=2, stage=0, model="rich", third=True),
        row("tp2-zero1-muon", tp=2, stage=1),
        row("tp2-ep2-zero2-muon", tp=2, ep=2, stage=2, third=True),
        row("tp2-etp2-zero1-muon", tp=2, etp=2, stage=1),
        row("ep2-zero3-muon", ep=2, stage=3, model="tiny", third=True),
        row("etp2-zero3-muon", etp=2, stage=3, model="tiny"),
        row("tp2-ep2-zero3-muon", tp=2, ep=2, stage=3, third=True),
        row("ep2-zero1-muon-host", ep=2, stage=1, model="tiny", settings=HOST, third=True),
        row("tp2-ep2-zero2-muon-host", tp=2, ep=2, stage=2, settings=HOST),
        row("tp2-ep2-zero3-muon-host", tp=2, ep=2, stage=3, settings=HOST),
        row("tp2-ep2-zero3-muon-nvme", tp=2, ep=2, stage=3, settings=NVME, third=True),
        row("tp2-ep2-zero3-muon-sub-groups", tp=2, ep=2, stage=3, model="rich", sub_group=1500),
    ),
    *group("threes", 3, row("tp3-muon", tp=3), row("etp3-muon", etp=3, rows=3),
           row("dp3-zero3-muon", stage=3, rows=3), row("etp3-zero2-muon", etp=3, stage=2, rows=3)),
    *group(
        "deep", 4,
        row("tp2-dp2-ep2-etp2-muon", tp=2, ep=2, etp=2, model="rich", third=True),
        row("tp2-cp2-ep2-muon", tp=2, cp=2, ep=2, model="rich"),
        row("tp4-muon-two-key-heads", tp=4, model="rich", third=True),
        row("pp2-tp2-ep2-muon", pp=2, tp=2, ep=2),
        row("tp2-dp2-ep2-zero0-muon", tp=2, ep=2, stage=0),
        row("tp2-dp2-ep2-zero1-muon", tp=2, ep=2, stage=1, third=True),
        row("tp2-dp2-ep2-zero2-muon", tp=2, ep=2, stage=2),
        row("tp2-dp2-etp2-zero2-muon", tp=2, etp=2, stage=2, third=True),
        row("tp4-etp2-zero2-muon-two-key-heads", tp=4, etp=2, stage=2),
        row("tp2-dp2-ep2-etp2-zero3-muon", tp=2, ep=2, etp=2, stage=3, third=True),
        row("tp4-ep2-zero3-muon-two-key-heads", tp=4, ep=2, stage=3),
        row("tp2-dp2-zero3-muon-sub-groups", tp=2, stage=3, model="rich", sub_group=750, third=True),
        row("pp2-tp2-ep2-zero1-muon", pp=2, tp=2, ep=2, stage=1, third=True),
        row("pp2-etp2-zero1-muon", pp=2, etp=2, stage=1),
    ),
    *group("deep", 8, row("tp2-cp2-dp2-zero2-muon", tp=2, cp=2, stage=2, model="rich"),
           row("pp2-tp2-dp2-ep2-zero1-muon", pp=2, tp=2, ep=2, stage=1, third=True)),
]
MATRICES = [dataclasses.replace(made, optimizer="muon", slow=True) for made in MATRICES]
HALF = [  # fp32 masters under bf16 weights; choices are replayed, because bf16 rounding decides many of them otherwise
    *group("tiny", 2, *(row(f"ep2-zero{stage}-bf16", ep=2, stage=stage) for stage in range(4)),
           row("ep2-bf16", ep=2), row("etp2-bf16", etp=2), row("ep2-one-rank-bf16", ep=2, case="one_rank"),
           row("ep2-zero3-muon-bf16", ep=2, stage=3, optimizer="muon"), slow=True),
    *group("tiny", 4, row("ep2-etp2-bf16", ep=2, etp=2), row("ep2-dp4-zero2-bf16", ep=2, stage=2), slow=True),
    *group("rich", 2, row("tp2-ep2-bf16", tp=2, ep=2), row("cp2-ep2-bf16", cp=2, ep=2),
           row("tp2-ep2-zero1-bf16", tp=2, ep=2, stage=1), row("tp2-ep2-zero2-bf16", tp=2, ep=2, stage=2),
           row("tp2-ep2-muon-bf16", tp=2, ep=2, optimizer="muon"),
           row("tp2-ep2-zero1-muon-bf16", tp=2, ep=2, stage=1, optimizer="muon"), slow=True),
    *group("deep", 2, row("pp2-vpp2-bf16", pp=2, vpp=2), row("pp2-zero1-bf16", pp=2, stage=1),
           slow=True),
    *group("rich", 8, *(row(f"tp2-cp2-dp2-zero{stage}-bf16", tp=2, cp=2, stage=stage) for stage in range(3)),
           slow=True),
]
HALF = [dataclasses.replace(made, precision="bf16") for made in HALF]
SINGLE = [*QUICK, *EXPERTS, *TENSOR, *STAGES, *ZERO, *EIGHT, *MATRICES]
DOUBLE = [  # whatever does not pass through DeepSpeed, which knows no fp64
    dataclasses.replace(made, name=f"{made.name}-fp64", precision="fp64", slow=True, third=False, count_bytes=False)
    for made in SINGLE
    if made.stage is None and not made.name.endswith("again")
]
ROWS = {made.name: made for made in (*SINGLE, *HALF, *DOUBLE)}
# twenty steps in the slow tests; tools/layout_table runs all rows so far
LONG = (
    "ep2", "etp2", "ep2-zero1", "ep2-zero2", "ep2-zero3", "tp2", "cp2", "pp2", "dp2", "ep2-etp2", "ep2-dp4-zero2",
    "ep2-dp4-zero3", "tp2-cp2-ep2", "pp2-vpp2-ep2", "pp2-tp2-ep2", "tp2-cp2-ep4-sequence", "ep4-uneven-nodes",
    "pp2-zero1", "tp2-ep2-zero2", "ep2-bf16", "ep2-zero2-bf16", "tp2-muon", "tp2-ep2-zero2-muon", "tp2-ep2-zero3-muon",
    "ep2-rank-without-text", "pp2-vpp2-recompute",
)
# stages of three and two layers; how much they keep depends on micro-batches under way alone
MEASURED = group(
    "deep", 2,
    *(row(f"pp2-{rows}-text-rows", pp=2, rows=rows, tasks=("text",), stage_layers=(3, 2), measure=True)
      for rows in (1, 4, 8)),
    slow=True,
)
assert len(ROWS) == len(SINGLE) + len(HALF) + len(DOUBLE), "two rows have one name"


def find_row(name: str) -> Row:
    """The row of the table, of `MEASURED` or among the yardsticks that has this name."""
    everything = (*ROWS.values(), *MEASURED)
    return next(made for made in (*everything, *(one.yardstick() for one in everything)) if made.name == name)
