"""Configuration of an exported ernie5 model; stands beside its weights and needs transformers alone."""

from transformers import PreTrainedConfig


class Ernie5Config(PreTrainedConfig):
    """model: the model section of the training config; media_tensors: name -> shape of the tensors that text alone
    does not use (embeddings and heads of pictures, clips and sound), which are carried along."""

    model_type = "ernie5"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, model=None, media_tensors=None, **options):
        self.model = model or {}
        self.media_tensors = media_tensors or {}
        super().__init__(**options)
