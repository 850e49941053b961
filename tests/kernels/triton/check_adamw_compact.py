"""AdamW with little state against its reference, bit for bit: kinds, odd sizes, what is not finite, far addresses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton.language as tl

from ernie5.optim.build import build_optimizer
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5_kernels.adamw_compact import AdamWStep, CompactTensors, Moment, adamw_compact, count_blocks
from ernie5_kernels.adamw_compact import kernel as compact
from ernie5_kernels.native.library import native_library
from ernie5_kernels.testing import kernel_device, random_tensor

SIZES = ((1,), (0,), (7, 3), (2_305,), (3, 150))
MARGIN = 16  # elements of another value around every tensor: 16 bytes or more, so that addresses stay aligned
KINDS = [
    (parameter, gradient, coded)
    for parameter in (torch.bfloat16, torch.float32)
    for gradient in (torch.bfloat16, torch.float32)
    for coded in (True, False)
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of divisions that a GPU makes in silence


def walled(value: torch.Tensor, *, shift: int) -> torch.Tensor:
    """A copy of `value` amid 77s, `shift` elements off from alignment."""
    memory = torch.full((value.numel() + 2 * MARGIN,), 77, dtype=value.dtype, device=value.device)
    inner = memory[MARGIN - shift:][: value.numel()].view(value.shape)
    return inner.copy_(value)


def assert_walls_stand(one: CompactTensors) -> None:
    """Nothing but the tensors themselves was written."""
    scales = () if one.first.scales is None else (one.first.scales, one.second.scales)
    for part in (*parts_of(one), *scales, one.gradient):
        memory = part.new_empty(0).set_(part.untyped_storage())
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside[part.storage_offset():][: part.numel()] = True
        assert (memory[~inside] == 77).all()


def parts_of(one: CompactTensors) -> list[torch.Tensor]:
    """What a step writes, scales apart."""
    kept = [one.parameter, one.first.values, one.second.values]
    return kept if one.copy is None else [*kept, one.copy]


def moments_of(one: CompactTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 moments, or the scales of codes."""
    return tuple(part.values if part.scales is None else part.scales for part in (one.first, one.second))


def moment(shape: tuple[int, ...], *, coded: bool, shift: int) -> Moment:
    device = kernel_device()
    if not coded:
        return Moment(walled(torch.zeros(shape, device=device), shift=shift))
    scales = torch.zeros(count_blocks(torch.Size(shape).numel()), device=device)
    return Moment(
        walled(torch.zeros(shape, dtype=torch.uint8, device=device), shift=shift), walled(scales, shift=shift)
    )


def tensors_of(
    kind: tuple[torch.dtype, torch.dtype, bool], *, sizes: tuple[tuple[int, ...], ...] = SIZES, shift: int = 0
) -> list[CompactTensors]:
    dtype, gradient, coded = kind
    made = []
    for n, shape in enumerate(sizes):
        value = random_tensor(*shape, seed=n, dtype=dtype)
        made.append(CompactTensors(
            walled(value, shift=shift), walled(torch.zeros_like(value, dtype=gradient), shift=shift),
            *(moment(shape, coded=coded, shift=shift) for _ in range(2)), weight_decay=0.1 * (n % 2), seed=n,
            copy=walled(value.bfloat16(), shift=shift) if dtype == torch.float32 else None,
        ))
    return made


def run(tensors: list[CompactTensors], *, backend: str, number: int) -> None:
    """One step from gradients that differ by 1e8 within a block, with zeros."""
    for n, one in enumerate(tensors):
        count = one.gradient.numel()
        sizes = torch.logspace(-8, 0, 17, device=one.gradient.device).repeat(count)[:count].view(one.gradient.shape)
        one.gradient.copy_(random_tensor(*one.gradient.shape, seed=100 * number + n) * sizes * (sizes > 1e-7))
    scale = torch.tensor(0.5, device=kernel_device()) if number > 1 else None
    adamw_compact(tensors, step=AdamWStep(1e-2, 0.9, 0.95, 1e-12, number), gradient_scale=scale, backend=backend)


def assert_same(ours: list[CompactTensors], truth: list[CompactTensors]) -> None:
    for one, other in zip(ours, truth, strict=True):
        pairs = list(zip(parts_of(one), parts_of(other), strict=True))
        if one.first.scales is not None:
            pairs += [(one.first.scales, other.first.scales), (one.second.scales, other.second.scales)]
        for mine, expected in pairs:
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_reference_bit_for_bit_and_touch_nothing_else(
    kind: tuple[torch.dtype, torch.dtype, bool]
) -> None:
    ours, truth = (tensors_of(kind) for _ in range(2))
    for number in (1, 2):
        run(ours, backend="triton", number=number)
        run(truth, backend="reference", number=number)
    assert_same(ours, truth)
    for one in ours:
        assert_walls_stand(one)


def test_tensors_of_all_kinds_and_alignments_share_a_step() -> None:
    sizes = ((300,),)
    ours, truth = (
        [one for kind in KINDS for shift in (0, 3) for one in tensors_of(kind, sizes=sizes, shift=shift)]
        for _ in range(2)
    )
    run(ours, backend="triton", number=2)
    run(truth, backend="reference", number=2)
    assert_same(ours, truth)
    for one in ours:
        assert_walls_stand(one)


@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float32])
def test_back_ends_take_turns_on_one_state(parameter: torch.dtype) -> None:
    """Triton and the reference in turns give what the reference gives alone; the C++ library's state serves as well."""
    ours, truth = (tensors_of((parameter, torch.bfloat16, True), sizes=((3, 150), (64,))) for _ in range(2))
    for number, backend in enumerate(("reference", "triton", "reference", "triton"), 1):
        run(ours, backend=backend, number=number)
        run(truth, backend="reference", number=number)
    assert_same(ours, truth)
    if kernel_device().type == "cpu" and native_library() is not None:
        for one in (ours, truth):
            run(one, backend="native", number=5)
        run(ours, backend="triton", number=6)
        run(truth, backend="reference", number=6)
        assert_same(ours, truth)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_block_as_in_the_reference(bad: float) -> None:
    for kind in (KINDS[0], KINDS[-1]):
        ours, truth = (tensors_of(kind, sizes=((700,),)) for _ in range(2))
        for tensors, backend in ((ours, "triton"), (truth, "reference")):
            run(tensors, backend=backend, number=1)
            tensors[0].gradient[300] = bad
            tensors[0].gradient[301] = 1e30  # its square is infinite
            step = AdamWStep(1e-2, 0.9, 0.95, 1e-12, 2)
            adamw_compact(tensors, step=step, backend=backend)
            adamw_compact(tensors, step=AdamWStep(1e-2, 0.9, 0.95, 1e-12, 3), backend=backend)
        found, expected = ours[0].parameter, truth[0].parameter
        assert torch.equal(found.isnan(), expected.isnan()) and found[300].isnan()
        assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
        broken = slice(256, 512) if kind[2] else slice(300, 301)
        hurt = torch.zeros(700, dtype=torch.bool, device=found.device)
        hurt[broken] = True
        assert torch.equal(found.isnan(), hurt) or bad == torch.inf
        for mine, other in zip(moments_of(ours[0]), moments_of(truth[0]), strict=True):
            assert torch.equal(mine.isnan(), other.isnan()) and torch.equal(mine.nan_to_num(), other.nan_to_num())
        assert not found[~hurt].isnan().any()


def test_a_nan_of_any_bits_stays_one() -> None:
    """A GPU's NaN is 0x7fffffff, to which random bits must not be added."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32, device=kernel_device()).repeat(100)
    for backend in ("triton", "reference"):
        one = tensors_of((torch.bfloat16, torch.float32, True), sizes=((300,),))[0]
        one.gradient.copy_(bits.view(torch.float32))
        adamw_compact([one], step=AdamWStep(1e-2, 0.9, 0.95, 1e-12, 1), backend=backend)
        assert one.parameter.isnan().all()


def test_the_optimizer_steps_all_its_tensors_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and vectors, which decay or not, in bf16 with codes; the reference steps the same by itself."""
    weights = [torch.nn.Parameter(random_tensor(*shape, seed=n, dtype=torch.bfloat16))
               for n, shape in enumerate(((5, 70), (3, 100), (11,)))]
    groups = [ParameterGroup(name, names, tuple(parameters), decay, is_matrix=False) for name, names, parameters, decay
              in (("decay", ("a", "b"), weights[:2], 0.1), ("plain", ("c",), weights[2:], 0.0))]
    config = OptimConfig(moments="8bit", stochastic_rounding=True, learning_rate=1e-2)
    optimizer = build_optimizer(groups, config=config)
    truth = tensors_of(KINDS[0], sizes=((5, 70), (3, 100), (11,)))
    truth = [dataclasses.replace(one, weight_decay=decay) for one, decay in zip(truth, (0.1, 0.1, 0.0), strict=True)]
    launched, launch = [], compact._launch
    monkeypatch.setattr(compact, "_launch", lambda *given, **named: (launched.append(1), launch(*given, **named)))
    scale = torch.tensor(0.5, device=kernel_device())
    for number in (1, 2):
        for n, (weight, one) in enumerate(zip(weights, truth, strict=True)):
            one.gradient.copy_(random_tensor(*weight.shape, seed=10 * number + n))
            weight.grad = one.gradient.clone()
        optimizer.step(gradient_scale=scale)
        adamw_compact(truth, step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, number), gradient_scale=scale, backend="reference")
    assert len(launched) == 2
    for weight, one in zip(weights, truth, strict=True):
        assert torch.equal(weight, one.parameter)
        assert torch.equal(optimizer.state[weight]["exp_avg_sq_codes"], one.second.values)


def test_the_default_device_of_the_program_changes_nothing() -> None:
    ours, truth = (tensors_of(KINDS[0], sizes=((300,),)) for _ in range(2))
    for one in (*ours, *truth):
        one.gradient.copy_(random_tensor(300, seed=5))
    step = AdamWStep(1e-2, 0.9, 0.95, 1e-12, 1)
    with torch.device("meta"):
        adamw_compact(ours, step=step, backend="triton")
    adamw_compact(truth, step=step, backend="triton")
    assert_same(ours, truth)


def launch_one(row: list[int], *, start: int) -> None:
    """The chunk at `start` of the tensor of a row, all of it bf16 with codes."""
    device = kernel_device()
    keeps = torch.ones(1, device=device)
    compact.adamw_compact_kernel[(1,)](
        torch.tensor([row], device=device), keeps, torch.zeros(1, dtype=torch.int32, device=device),
        torch.tensor([start], device=device), keeps, 1e-2, 0.1, 0.95, 0.05, 1e-12, 1.0,
        False, True, False, tl.bfloat16, tl.bfloat16, compact.VECTOR_BYTES, compact.CHUNK, **compact.OPTIONS,
    )


def test_chunks_beyond_2_31_elements_are_where_they_should_be() -> None:
    """A table whose tensor begins 6 billion elements before the memory that its last chunk has; its random numbers are
    those of a tensor with shifted seeds."""
    start = (6 << 30) + compact.CHUNK
    near, far = (tensors_of((torch.bfloat16, torch.bfloat16, True), sizes=((1_300,),))[0] for _ in range(2))
    for one in (near, far):
        one.gradient.copy_(random_tensor(1_300, seed=5))
    row = list(compact.table_row(far, number=1))
    for column, bytes_each in ((1, 2), (2, 2), (3, 1), (4, 1)):
        row[column] -= start * bytes_each
    for column in (5, 6):
        row[column] -= start // 256 * 4
    row[0] += start
    launch_one(row, start=start)
    shifted = [(seed + start) & 0xFFFFFFFF for seed in near.seeds(1)]
    launch_one([*compact.table_row(near, number=1)[:-2], *shifted], start=0)
    assert_same([far], [near])
    assert far.first.values.any() and not torch.equal(far.parameter, random_tensor(1_300, dtype=torch.bfloat16))


def test_the_table_of_chunks_counts_beyond_2_31() -> None:
    owners, starts = compact.chunk_table([5, (1 << 33) + 1, 3], chunk=1 << 30)
    assert owners.tolist() == [0, *[1] * 9, 2] and starts.tolist() == [0, *(n << 30 for n in range(9)), 0]
