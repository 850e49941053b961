"""The whole model: who may know what, packing, gradients for every parameter, sub-networks, poisoned memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.records import AudioFrames, Batch, ModelOutput, SubNetwork, TextTargets
from ernie5_kernels.testing import poisoned_memory


def final_hidden(model, batch: Batch) -> torch.Tensor:
    """Hidden states [B*T, D] after the last layer, known audio codes included."""
    inputs = model.layer_inputs(batch.positions, intervals=batch.intervals, kinds=batch.kinds)
    hidden = model._layers(
        model.embed(batch), inputs=inputs, audio=batch.audio_targets, layers=tuple(range(model.config.layers))
    )[0]
    return hidden.flatten(0, 1)


def changed_rows(model, before: Batch, after: Batch) -> set[int]:
    difference = (final_hidden(model, before) - final_hidden(model, after)).abs().amax(-1)
    return set(torch.nonzero(difference > 1e-13).flatten().tolist())


def visible_rows(batch: Batch, column: int) -> set[int]:
    """Rows of the flat batch that see flat position `column`, by the definition of the intervals."""
    tokens = batch.token_ids.shape[1]
    start, place = column // tokens * tokens, column % tokens
    first, _, _, until = batch.intervals[column // tokens, place].tolist()
    return {start + row for row in range(first, until)}


def test_a_changed_token_reaches_exactly_the_rows_that_may_see_it(model, batch) -> None:
    for column in (2, 20, 95, 97, 100, 120):
        ids = batch.token_ids.clone()
        ids.view(-1)[column] = 45
        reached = changed_rows(model, batch, dataclasses.replace(batch, token_ids=ids))
        block = visible_rows(batch, column)
        assert column in reached
        assert reached <= block | {column}


def test_visual_blocks_see_themselves_wholly_and_nothing_leaves_the_document(model, batch) -> None:
    row = batch.visual_cells.rows.tolist()
    finest = [i for i, scale in zip(row, batch.visual_cells.scales.tolist(), strict=True) if scale == 3]
    latents = batch.visual_cells.latents.clone()
    latents[row.index(finest[-1])] += 1.0
    cells = dataclasses.replace(batch.visual_cells, latents=latents)
    reached = changed_rows(model, batch, dataclasses.replace(batch, visual_cells=cells))
    assert set(finest) <= reached
    assert min(reached) == finest[0]
    assert reached <= visible_rows(batch, finest[-1])


def test_understanding_patches_reach_their_own_document_alone(model, batch) -> None:
    pixels = batch.image_patches.pixels.clone()
    pixels[-1] += 1.0
    patches = dataclasses.replace(batch.image_patches, pixels=pixels)
    reached = changed_rows(model, batch, dataclasses.replace(batch, image_patches=patches))
    rows = set(batch.image_patches.rows.tolist())
    assert rows <= reached
    assert reached <= visible_rows(batch, min(rows))


def test_mtp_logits_do_not_depend_on_the_token_they_predict_but_on_the_one_before(model, batch) -> None:
    for depth, targets in enumerate(batch.mtp_targets):
        for index in range(0, targets.rows.numel(), 8):
            row = int(targets.rows[index])
            base = model(batch).mtp_hidden[depth][index]
            outputs = []
            for ahead in (depth + 2, depth + 1):
                ids = batch.token_ids.clone()
                ids.view(-1)[row + ahead] = 45
                outputs.append(model(dataclasses.replace(batch, token_ids=ids)).mtp_hidden[depth][index])
            assert torch.allclose(outputs[0], base, atol=1e-12)
            assert not torch.allclose(outputs[1], base)


def test_audio_levels_depend_on_lower_target_levels_alone(model, batch) -> None:
    base = model(batch).audio_logits
    for level in range(3):
        codes = batch.audio_targets.codes.clone()
        codes[:, level] = (codes[:, level] + 1) % 11
        changed = dataclasses.replace(batch, audio_targets=AudioFrames(batch.audio_targets.rows, codes))
        logits = model(changed).audio_logits
        assert torch.allclose(logits[:, : level + 1], base[:, : level + 1], atol=1e-12)
        for later in range(level + 1, 3):
            assert not torch.allclose(logits[:, later], base[:, later])


def test_a_document_alone_equals_the_same_document_packed_with_others(model, batches) -> None:
    names = ("speech", "image_generation", "video_understanding")
    packed = batches(names, tokens=97)
    for order in range(len(names)):
        alone = _cut(packed, document=order)
        whole, single = final_hidden(model, packed), final_hidden(model, alone)
        rows = torch.nonzero(packed.document_ids[0] == order).flatten()
        assert torch.allclose(whole[rows], single[: rows.numel()], atol=1e-12)


def _cut(batch: Batch, *, document: int) -> Batch:
    """The batch of one document of a one-row batch, moved to the start."""
    rows = torch.nonzero(batch.document_ids[0] == document).flatten()
    first, last = int(rows[0]), int(rows[-1])

    def shift(record):
        keep = (record.rows >= first) & (record.rows <= last)
        kept = record.map_tensors(lambda tensor: tensor[keep])
        return dataclasses.replace(kept, rows=kept.rows - first)

    records = {
        field.name: shift(getattr(batch, field.name))
        for field in dataclasses.fields(batch)
        if hasattr(getattr(batch, field.name), "rows")
    }
    span = slice(first, last + 1)
    intervals = batch.intervals[:, span].clone()
    intervals[..., [0, 3]] -= first
    return dataclasses.replace(
        batch, token_ids=batch.token_ids[:, span], kinds=batch.kinds[:, span], positions=batch.positions[:, span],
        document_ids=batch.document_ids[:, span], intervals=intervals,
        mtp_targets=tuple(shift(t) for t in batch.mtp_targets), **records,
    )


def total(output: ModelOutput) -> torch.Tensor:
    parts = (output.text_hidden, *output.mtp_hidden, output.bit_logits, output.audio_logits, output.text_weight)
    losses = output.routing.switch_loss + output.routing.sequence_loss + output.routing.z_loss
    return sum(part.square().sum() for part in parts) + losses + output.touched


LAYOUTS = (
    (("text", "image_understanding", "speech", "image_generation"), ("video_understanding", "speech", "text")),
    (("text",),),
    (("image_understanding",),),
    (("video_understanding",), ("text",)),
    (("speech",),),
    (("image_generation",),),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_gets_a_finite_gradient_from_every_batch(model, batches, layout) -> None:
    with poisoned_memory():
        total(model(batches(*layout))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_sub_network_runs_its_layers_and_experts_alone_and_every_parameter_keeps_a_gradient(model, batch) -> None:
    subnetwork = SubNetwork(layers=(0, 2, 3, 4), experts=(0, 2, 3, 6), top_k=2)
    output = model(batch, subnetwork=subnetwork)
    tokens = int((batch.kinds != 0).sum())
    assert output.routing.loads.sum(1).tolist() == [2 * tokens, 0, 2 * tokens, 2 * tokens, 2 * tokens]
    assert output.routing.loads[:, [1, 4, 5]].sum() == 0
    total(output).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.layers[1].moe.experts.down.grad.abs().sum() == 0
    assert model.layers[0].moe.experts.down.grad[1].abs().sum() == 0


def test_gradients_equal_those_of_the_reference_kernels(configs, batch) -> None:
    from ernie5.model.backbone import build_model

    gradients = []
    for attention, experts in (("reference", "reference"), ("torch", "torch"), ("sdpa", "torch")):
        built = build_model(configs(attention_backend=attention, expert_backend=experts), seed=3).double()
        total(built(batch)).backward()
        gradients.append({name: p.grad for name, p in built.named_parameters()})
    for found in gradients[1:]:
        for name, gradient in found.items():
            assert torch.allclose(gradient, gradients[0][name], rtol=1e-9, atol=1e-11), name


def test_padding_content_changes_nothing_that_counts(model, batch) -> None:
    ids = batch.token_ids.clone()
    ids[batch.kinds == 0] = 33
    one, other = model(batch), model(dataclasses.replace(batch, token_ids=ids))
    assert torch.allclose(one.text_hidden, other.text_hidden, atol=1e-12)
    assert torch.equal(one.routing.loads, other.routing.loads)
    assert torch.allclose(one.routing.switch_loss, other.routing.switch_loss)


def test_loads_by_kind_add_up_to_the_tokens_of_each_kind(model, batch) -> None:
    loads = model(batch).routing.group_loads
    for kind in range(1, 7):
        assert (loads[:, kind - 1].sum(-1) == 3 * int((batch.kinds == kind).sum())).all()


def test_a_model_without_media_trains_on_text_and_has_no_media_parameters(configs, batches) -> None:
    from ernie5.model.backbone import build_model

    model = build_model(configs(modalities=("text",)), seed=0)
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "audio" in name or "bit" in name]
    output = model(batches(("text", "text")))
    (output.text_hidden.sum() + sum(h.sum() for h in output.mtp_hidden) + output.touched).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_stays_near_fp64_where_routing_agrees(configs, batches) -> None:
    from ernie5.model.backbone import build_model

    batch = batches(("text", "text"))
    config = configs(moe=dataclasses.replace(configs().moe, num_experts=3, top_k=3))
    wide = build_model(config, seed=1).double()(batch).text_hidden
    narrow = build_model(config, seed=1).bfloat16()(batch).text_hidden
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - wide).abs().max() < 0.15  # 8 bits of mantissa through 5 layers of unit-rms outputs


def test_the_model_can_learn_a_fixed_batch(configs, batch) -> None:
    from ernie5.model.backbone import build_model
    from ernie5_kernels.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    model = build_model(configs(), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        out = model(batch)
        text: TextTargets = batch.text_targets
        loss = linear_cross_entropy(out.text_hidden, weight=out.text_weight, targets=text.ids) / text.ids.numel()
        audio = torch.nn.functional.cross_entropy(out.audio_logits.flatten(0, 1), batch.audio_targets.codes.flatten())
        bits = torch.nn.functional.binary_cross_entropy_with_logits(out.bit_logits, batch.bit_targets.bits)
        whole = loss + audio + bits + out.touched
        optimizer.zero_grad()
        whole.backward()
        optimizer.step()
        losses.append((loss.item(), audio.item(), bits.item()))
    assert all(last < 0.7 * first for first, last in zip(losses[0], losses[-1], strict=True))
