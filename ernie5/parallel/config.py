"""Parallel degrees and the rules that a legal layout obeys.

Every rule is checked before a process group exists; a LayoutError names the rule and the nearest degrees that work.
"""

from __future__ import annotations

import math

from ernie5.config.base import Config, config
from ernie5.config.field import field, positive
from ernie5.errors import LayoutError
from ernie5.model.config import ModelConfig
from ernie5.parallel.dims import GridDims, nearest_divisors
from ernie5.parallel.token_split import Splitter

CHUNK_TOKENS = 128  # attention's larger blocks hold as many
DISPATCHERS = ("auto", "alltoall", "hierarchical", "allgather", "deepep", "megablocks")


@config
class ParallelConfig(Config):
    """Number of ranks along each axis of the two grids (attention: pp dp cp tp; experts: pp edp ep etp)."""

    dp: int | None = field(
        None, doc="data-parallel ranks; none: derived from the number of processes", check=positive, kind="derived"
    )
    tp: int = field(1, doc="tensor-parallel ranks", check=positive, kind="performance")
    ep: int = field(1, doc="expert-parallel ranks, taken from dp x cp x tp", check=positive, kind="performance")
    etp: int = field(
        1, doc="tensor-parallel ranks inside an expert, chosen apart from tp", check=positive, kind="performance"
    )
    pp: int = field(1, doc="pipeline stages", check=positive, kind="performance")
    vpp: int = field(1, doc="virtual stages per pipeline rank", check=positive, kind="performance")
    stage_layers: tuple[int, ...] = field(
        (), doc="with pp: layers of each of the pp x vpp sections, in order; empty: balanced by cost",
        kind="performance",
    )
    cp: int = field(1, doc="context-parallel ranks", check=positive, kind="performance")
    sequence: bool = field(
        False, doc="with tp: split the tokens of norms, routers and residuals over the tp ranks", kind="performance"
    )
    context: str = field(
        "ring", doc="with cp: how queries meet the keys of other ranks", choices=("ring", "ulysses"),
        kind="performance",
    )
    context_chunk: int = field(
        CHUNK_TOKENS,
        doc="with cp: rows are dealt to the ranks in chunks of at least so many tokens, for an even load of short "
        "documents",
        unit="tokens", check=positive, kind="performance",
    )
    dispatcher: str = field(
        "auto",
        doc="with ep: how tokens reach experts of other ranks; auto: alltoall; hierarchical: once to each node, then "
        "within it",
        choices=DISPATCHERS, kind="performance",
    )
    node_size: int | None = field(
        None, doc="with ep: ranks per node; none: what the launcher says (LOCAL_WORLD_SIZE)", check=positive,
        kind="performance",
    )
    overlap: str = field(
        "none",
        doc="what runs while tokens travel; shared: the shared experts; halves: the experts of the other half as well",
        choices=("none", "shared", "halves"), kind="performance",
    )

    def validate(self) -> None:
        """Refuse what cannot run or would be ignored."""
        if self.vpp > 1 and self.pp == 1:
            self._refuse(
                "vpp", "virtual stages take turns on the ranks of a pipeline, and parallel.pp = 1 has one. "
                "Set parallel.vpp: 1 or parallel.pp: 2"
            )
        if self.sequence and self.tp == 1:
            self._refuse(
                "sequence", "tokens are split over the tp ranks, and parallel.tp = 1 has one. Set parallel.sequence: "
                "false or parallel.tp: 2"
            )
        if self.context != "ring" and self.cp == 1:
            self._refuse(
                "context", "rows are split over the cp ranks, and parallel.cp = 1 has one. Leave parallel.context out "
                "or set parallel.cp: 2"
            )
        sections = self.pp * self.vpp
        if self.stage_layers and (len(self.stage_layers) != sections or min(self.stage_layers) < 1):
            self._refuse(
                "stage_layers", f"pp x vpp = {self.pp} x {self.vpp} are {sections} sections of at least one layer. "
                f"List {sections} numbers, or none to balance by cost"
            )
        if self.dispatcher in ("hierarchical", "allgather") and self.ep == 1:
            self._refuse(
                "dispatcher", "it carries tokens to experts of other ranks, and parallel.ep = 1 has all of them on "
                "each. Leave parallel.dispatcher out or set parallel.ep: 2"
            )
        if self.node_size is not None and self.ep == 1:
            self._refuse(
                "node_size", "nodes are told apart by tokens on their way to experts, and parallel.ep = 1 sends none. "
                "Leave parallel.node_size out or set parallel.ep: 2"
            )
        if self.overlap != "none" and self.ep == 1:
            self._refuse("overlap", "parallel.ep is 1, so no token travels. Set parallel.overlap: none")
        if self.overlap != "none" and self.dispatcher == "allgather":
            self._refuse("overlap", "allgather does not run beside other work. Set parallel.dispatcher: alltoall")
        if self.dispatcher == "megablocks":
            self._refuse(
                "dispatcher",
                "the package megablocks brings grouped products and permutations on one GPU, which are "
                "model.expert_backend's part, and no transport between ranks. Set parallel.dispatcher: alltoall",
            )
        if self.dispatcher == "deepep" and (self.overlap != "none" or self.ep == 1):
            axis, value = ("overlap", "none") if self.ep > 1 else ("dispatcher", "alltoall")
            self._refuse(
                axis,
                f"DeepEP's buffers reach over parallel.ep = {self.ep} ranks (at least 2), and nothing runs beside them "
                f"in this version. Set parallel.{axis}: {value}",
            )

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the attention grid's model: pp x cp x tp."""
        return self.pp * self.cp * self.tp

    def derive_dims(self, world_size: int, *, kv_heads: int) -> GridDims:
        """The grids of `world_size` processes for a model of so many key heads; raises LayoutError where the degrees do
        not factor them."""
        if world_size % self.model_ranks:
            axis = max(("pp", "cp", "tp"), key=lambda name: vars(self)[name])
            self._refuse(
                axis,
                f"pp x cp x tp = {self.model_ranks} does not divide the {world_size} processes. Every data-parallel "
                f"rank holds one whole grid. Start a multiple of {self.model_ranks} processes",
            )
        dp = world_size // self.model_ranks
        if self.dp not in (None, dp):
            self._refuse(
                "dp",
                f"{world_size} processes were started, and dp x cp x tp x pp must be their number. "
                f"Start {self.dp * self.model_ranks} processes or leave parallel.dp out",
            )
        stage = dp * self.cp * self.tp
        if stage % (self.ep * self.etp):
            axis = max(("ep", "etp"), key=lambda name: (stage % vars(self)[name] > 0, vars(self)[name]))
            other = self.ep * self.etp // vars(self)[axis]
            whole = stage // other if stage % other == 0 else stage
            self._refuse(
                axis,
                f"ep x etp = {self.ep} x {self.etp} does not divide dp x cp x tp = {stage}, out of which the expert "
                f"grid is made. {_nearest(whole, wanted=vars(self)[axis])}, or change the number of processes",
            )
        copies = self.tp // math.gcd(self.tp, kv_heads)
        return GridDims(dp=dp, cp=self.cp, tp=self.tp, pp=self.pp, ep=self.ep, etp=self.etp, key_copies=copies)

    def check_model(self, model: ModelConfig) -> None:
        """Check that the experts, heads and feed-forwards of `model` can be cut; raises LayoutError."""
        self._check_experts(model)
        self._check_stages(model)
        self._check_rows_of_heads(model)
        if not _shares_heads(model, tp=self.tp):
            work = [degree for degree in range(1, model.query_heads + 1) if _shares_heads(model, tp=degree)]
            near = [*[degree for degree in work if degree < self.tp][-1:], *[d for d in work if d > self.tp][:1]]
            self._refuse(
                "tp",
                f"does not share out model.query_heads = {model.query_heads} and model.kv_heads = {model.kv_heads}. "
                "Each rank must hold as many query heads, and whole key heads with them or, of fewer key heads than "
                f"ranks, one that as many ranks hold. Nearest degrees that work: {', '.join(map(str, near))}",
            )
        if self.context == "ulysses" and (model.query_heads // self.tp) % self.cp:
            heads = model.query_heads // self.tp
            self._refuse(
                "cp",
                f"does not divide the {heads} query heads of a tp rank. Ulysses gives every rank whole heads. "
                f"{_nearest(heads, wanted=self.cp)}, or set parallel.context: ring",
            )

    def check_rows(self, tokens: int, *, ahead: int) -> None:
        """Refuse chunks of rows of so many `tokens` that are shorter than multi-token prediction looks `ahead`: a
        chunk's end goes on with what the next chunk alone holds (`context.ContextLookAhead`)."""
        found = Splitter(self.cp, self.context_chunk).of_row(tokens, has_sinks=False).chunk
        if self.cp == 1 or found >= ahead:
            return
        longest = Splitter(self.cp, tokens).of_row(tokens, has_sinks=False).chunk
        key, way = ("context_chunk", f"Set parallel.context_chunk: {ahead}") if longest >= ahead else (
            "cp", "Lower parallel.cp or model.mtp.depth, or raise data.sequence_tokens"
        )
        self._refuse(
            key,
            f"rows of {tokens} tokens are cut into chunks of {found} for parallel.cp = {self.cp} ranks, and "
            f"multi-token prediction reads {ahead} tokens ahead (model.mtp.depth). A chunk must hold at least as many. "
            f"{way}",
        )

    def check_zero(self, stage: int) -> None:
        """Refuse what DeepSpeed's ZeRO would not run: its stages 2 and 3 hook into one backward pass of a whole model,
        and its stage 0 adds up the gradients of such passes."""
        if self.pp > 1 and stage != 1:
            self._refuse(
                "pp",
                f"engine.zero_stage is {stage}, and beside pipeline stages DeepSpeed partitions optimizer state alone: "
                "a stage runs its backward passes in pieces. Set engine.zero_stage: 1, engine.kind: grid (without "
                "ZeRO), or parallel.pp: 1",
            )

    def _check_experts(self, model: ModelConfig) -> None:
        experts, width = model.moe.num_experts, model.moe.expert_width
        if experts % self.ep:
            self._refuse(
                "ep",
                f"does not divide model.moe.num_experts = {experts}. Each expert-parallel rank must hold the same "
                f"number of experts. {_nearest(experts, wanted=self.ep)}",
            )
        if self.overlap == "shared" and not model.moe.shared_experts:
            self._refuse(
                "overlap",
                "model.moe.shared_experts is 0, so there is no work to run beside the way of the tokens. Set "
                "parallel.overlap: none",
            )
        if width % self.etp:
            self._refuse(
                "etp",
                f"does not divide model.moe.expert_width = {width}. Each rank must hold the same columns of every "
                f"expert. {_nearest(width, wanted=self.etp)}",
            )

    def _check_rows_of_heads(self, model: ModelConfig) -> None:
        """What tp cuts as evenly as it goes must leave every rank something: DeepSpeed has no part of no elements."""
        rows = {
            "model.dense_width": model.dense_width if model.dense_layers or model.mtp.depth else self.tp,
            "model.moe.shared_experts x expert_width": model.moe.shared_experts * model.moe.expert_width or self.tp,
            "model.visual.bits": model.visual.bits if model.has_visual else self.tp,
            "model.audio.codes + 1": model.audio.codes + 1 if model.has_audio else self.tp,
        }
        key = min(rows, key=rows.__getitem__)
        if rows[key] < self.tp:
            self._refuse(
                "tp",
                f"is more than {key} = {rows[key]}, which the tensor-parallel ranks share out. Each must hold at least "
                f"one. Lower parallel.tp to at most {rows[key]}",
            )

    def _check_stages(self, model: ModelConfig) -> None:
        if self.pp * self.vpp > model.layers:
            axis, other = ("pp", "vpp") if self.pp >= self.vpp else ("vpp", "pp")
            degree = vars(self)[other]
            fits = f"{axis} {model.layers // degree} with {other} {degree}"
            if model.layers // degree < (2 if axis == "pp" and self.vpp > 1 else 1):
                fits = f"pp {min(self.pp, model.layers)} with vpp 1"
            self._refuse(
                axis,
                f"pp x vpp = {self.pp} x {self.vpp} cuts the model into {self.pp * self.vpp} sections, and "
                f"model.layers = {model.layers}. Each section holds at least one layer. Nearest degrees that work: "
                f"{fits}",
            )
        if self.stage_layers and sum(self.stage_layers) != model.layers:
            self._refuse(
                "stage_layers",
                f"these are {sum(self.stage_layers)} layers, and model.layers = {model.layers}. Every layer stands in "
                "exactly one section. Change the list, or leave it out to balance by cost",
            )

    def _refuse(self, axis: str, message: str) -> None:
        self.fail(axis, message, error=LayoutError)


def _shares_heads(model: ModelConfig, *, tp: int) -> bool:
    return model.query_heads % tp == 0 and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0)


def _nearest(number: int, *, wanted: int) -> str:
    return "Nearest degrees that work: " + ", ".join(map(str, nearest_divisors(number, wanted=wanted)))
