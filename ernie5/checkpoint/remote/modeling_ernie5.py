"""The text path of an exported ernie5 model in plain PyTorch, for `AutoModelForCausalLM(..., trust_remote_code=True)`.

The same function as ernie5's own model, written for reading: RMSNorm before attention and experts, grouped-query
attention with rotary positions on interleaved pairs (optionally RMSNorm on queries and keys), SwiGLU, and a router that
chooses by biased and weighs by unbiased scores. Embeddings and heads of other modalities are carried under their names.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_ernie5 import Ernie5Config


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def rotation_of(positions, head_width, base):
    """Unit complex numbers [B, T, C/2] of positions [B, T, 3] (t, h, w).

    Of the C/2 frequencies base^(-2i/C) the slowest turn with t, the others alternate h (even i) and w (odd i).
    """
    count = head_width // 2
    candidates = range(count % 2, count + 1, 2)
    slow = min(candidates, key=lambda n: (abs(64 * n - 20 * count), -n))
    axes = [2 if i % 2 else 1 for i in range(count - slow)] + [0] * slow
    exponents = torch.arange(count, dtype=torch.float64, device=positions.device) / count
    inverse = torch.pow(torch.tensor(base, dtype=torch.float64, device=positions.device), -exponents).float()
    angles = positions.float().index_select(-1, torch.tensor(axes, device=positions.device)) * inverse
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, rotation):
    """Turn the pairs (0, 1), (2, 3), ... of x [B, T, H, C]."""
    pairs = torch.view_as_complex(x.to(_wide(x.dtype)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(-2).to(x.dtype)


class Ernie5RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """[..., D] -> [..., D]."""
        wide = x.to(_wide(x.dtype))
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


class Ernie5Attention(nn.Module):
    """Grouped-query attention; position_ids decide the rotation, the mask who sees whom."""

    def __init__(self, model, layer):
        super().__init__()
        width, self.head_width, self.layer = model["width"], model["head_width"], layer
        query, key = model["query_heads"] * self.head_width, model["kv_heads"] * self.head_width
        self.query = nn.Linear(width, query, bias=False)
        self.key = nn.Linear(width, key, bias=False)
        self.value = nn.Linear(width, key, bias=False)
        self.output = nn.Linear(query, width, bias=False)
        with_norm = model["qk_norm"]
        self.query_norm = Ernie5RMSNorm(self.head_width, model["norm_eps"]) if with_norm else nn.Identity()
        self.key_norm = Ernie5RMSNorm(self.head_width, model["norm_eps"]) if with_norm else nn.Identity()

    def forward(self, hidden, rotation, mask, cache):
        """[B, T, D] -> [B, T, D]; mask [B, 1, T, S] bool."""
        query = rotate(self.query_norm(self.query(hidden).unflatten(-1, (-1, self.head_width))), rotation)
        key = rotate(self.key_norm(self.key(hidden).unflatten(-1, (-1, self.head_width))), rotation)
        value = self.value(hidden).unflatten(-1, (-1, self.head_width))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(out.transpose(1, 2).flatten(2))


class Ernie5SwiGLU(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, gate first."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Ernie5Router(nn.Module):
    """Scores of all experts, the chosen ones by score + bias, their weights by score alone, renormalised."""

    def __init__(self, model):
        super().__init__()
        moe = model["moe"]
        self.weight = nn.Parameter(torch.zeros(moe["num_experts"], model["width"]))
        self.balance_bias = nn.Parameter(torch.zeros(moe["num_experts"], dtype=torch.float32), requires_grad=False)
        self.top_k, self.scale, self.uses_sigmoid = moe["top_k"], moe["scale"], moe["score"] == "sigmoid"
        self.num_groups, self.top_groups = moe.get("num_groups", 1), moe.get("top_groups", 1)

    def forward(self, x):
        """x [N, D] -> choices [N, K], weights [N, K] fp32."""
        logits = functional.linear(x.to(_wide(x.dtype)), self.weight.to(_wide(x.dtype)))
        scores = torch.sigmoid(logits) if self.uses_sigmoid else torch.softmax(logits, dim=-1)
        preference = scores + self.balance_bias
        if self.top_groups < self.num_groups:  # node-limited routing: the best groups alone, arXiv:2412.19437 2.1.2
            groups = preference.unflatten(1, (self.num_groups, -1))
            score = groups.topk(self.top_k // self.top_groups, dim=-1).values.sum(-1)
            best = score.topk(self.top_groups, dim=-1).indices
            left = torch.ones(groups.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, False)
            preference = groups.masked_fill(left.unsqueeze(-1), float("-inf")).flatten(1)
        choices = preference.topk(self.top_k, dim=-1, sorted=False).indices
        chosen = scores.gather(1, choices)
        return choices, chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-12) * self.scale


class Ernie5Experts(nn.Module):
    """E SwiGLU experts as two stacked weights."""

    def __init__(self, model):
        super().__init__()
        width, moe = model["width"], model["moe"]
        self.gate_up = nn.Parameter(torch.zeros(moe["num_experts"], 2 * moe["expert_width"], width))
        self.down = nn.Parameter(torch.zeros(moe["num_experts"], width, moe["expert_width"]))

    def forward(self, x, choices, weights):
        """x [N, D], choices and weights [N, K] -> [N, D]."""
        out = torch.zeros_like(x)
        for expert in choices.unique().tolist():
            token, slot = torch.where(choices == expert)
            gate, up = functional.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
            hidden = functional.silu(gate) * up * weights[token, slot].to(x.dtype).unsqueeze(-1)
            out.index_add_(0, token, functional.linear(hidden, self.down[expert]))
        return out


class Ernie5MoE(nn.Module):
    """Routed experts and, where there are any, shared ones."""

    def __init__(self, model):
        super().__init__()
        moe = model["moe"]
        self.router, self.experts = Ernie5Router(model), Ernie5Experts(model)
        shared = moe["shared_experts"] * moe["expert_width"]
        self.shared = Ernie5SwiGLU(model["width"], shared) if shared else None

    def forward(self, hidden):
        """[B, T, D] -> [B, T, D]."""
        flat = hidden.flatten(0, 1)
        out = self.experts(flat, *self.router(flat)).view_as(hidden)
        return out if self.shared is None else out + self.shared(hidden)


class Ernie5Block(nn.Module):
    """Attention, then experts or a dense feed-forward, each behind a norm and added."""

    def __init__(self, model, layer, sparse):
        super().__init__()
        self.attention_norm = Ernie5RMSNorm(model["width"], model["norm_eps"])
        self.attention = Ernie5Attention(model, layer)
        self.mlp_norm = Ernie5RMSNorm(model["width"], model["norm_eps"])
        if sparse:
            self.moe = Ernie5MoE(model)
        else:
            self.mlp = Ernie5SwiGLU(model["width"], model["dense_width"])
        self.sparse = sparse

    def forward(self, hidden, rotation, mask, cache):
        """[B, T, D] -> [B, T, D]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, mask, cache)
        feed_forward = self.moe if self.sparse else self.mlp
        return hidden + feed_forward(self.mlp_norm(hidden))


class Ernie5MTP(nn.Module):
    """Multi-token prediction; its weights are carried, `forward` of the model does not use them."""

    def __init__(self, model, layer):
        super().__init__()
        self.embedding_norm = Ernie5RMSNorm(model["width"], model["norm_eps"])
        self.hidden_norm = Ernie5RMSNorm(model["width"], model["norm_eps"])
        self.project = nn.Linear(2 * model["width"], model["width"], bias=False)
        self.block = Ernie5Block(model, layer, sparse=False)


class Ernie5Embedding(nn.Module):
    """The text embedding; embeddings of other modalities are added to it by name."""

    def __init__(self, model):
        super().__init__()
        self.text = nn.Embedding(model["vocab_size"], model["width"])


class Ernie5ForCausalLM(PreTrainedModel, GenerationMixin):
    """Text in, text logits out. position_ids may be [B, T] or [B, T, 3]; attention_mask marks padding or is a whole
    [B, 1, T, S] mask of booleans."""

    config_class = Ernie5Config
    main_input_name = "input_ids"
    _no_split_modules = ["Ernie5Block"]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        model = config.model
        dense, layers = model["dense_layers"], model["layers"]
        self.embedding = Ernie5Embedding(model)
        self.layers = nn.ModuleList([Ernie5Block(model, i, sparse=i >= dense) for i in range(layers)])
        self.final_norm = Ernie5RMSNorm(model["width"], model["norm_eps"])
        tied = model["tie_embeddings"]
        self.text_head = None if tied else nn.Linear(model["width"], model["vocab_size"], bias=False)
        self.mtp = nn.ModuleList([Ernie5MTP(model, layers + d) for d in range(model["mtp"]["depth"])])
        for name, shape in config.media_tensors.items():
            self._carry(name, shape)
        self.post_init()

    def _carry(self, name, shape):
        """Hold a tensor of another modality under its own dotted name."""
        *folders, last = name.split(".")
        module = self
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module._modules[folder]
        module.register_parameter(last, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def get_input_embeddings(self):
        """The text embedding."""
        return self.embedding.text

    def set_input_embeddings(self, value):
        """Replace the text embedding."""
        self.embedding.text = value

    def get_output_embeddings(self):
        """The text head, None where it is the embedding."""
        return self.text_head

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, logits_to_keep=0, return_dict=None, output_hidden_states=None,
        output_attentions=None,
    ):
        """input_ids [B, T] (or inputs_embeds [B, T, D]) -> logits [B, T, V], fp32."""
        hidden = self.embedding.text(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        rows, tokens = hidden.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=hidden.device).expand(rows, -1)
        if position_ids.dim() == 2:
            position_ids = position_ids.unsqueeze(-1).expand(-1, -1, 3)
        model = self.config.model
        rotation = rotation_of(position_ids, model["head_width"], model["rope_base"])
        mask = self._mask(attention_mask, past, tokens, hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, rotation, mask, past_key_values)
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        weight = self.embedding.text.weight if self.text_head is None else self.text_head.weight
        logits = functional.linear(self.final_norm(kept), weight).float()
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _mask(self, attention_mask, past, tokens, device):
        """[B or 1, 1, T, S] bool, True where a query sees a key; every query sees itself, or padding would be NaN."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask.bool()
        query, key = torch.arange(past, past + tokens, device=device), torch.arange(past + tokens, device=device)
        mask = (key[None] <= query[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool() | (key[None] == query[:, None])
        return mask
