"""Makes a LanguageModel available to transformers' Auto classes.

import rorqual.hub.auto                     registers "rorqual" with AutoConfig and
                                            AutoModelForCausalLM
RorqualForCausalLM.of(model)                wraps the model and computes nothing itself
AutoModelForCausalLM.from_pretrained(...)   needs this import first in another process; a checkpoint
                                            contains no code
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache as HubCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from rorqual import config as configs
from rorqual.data.tokenizer import Tokenizer
from rorqual.hub.padding import Columns, Packing, packing
from rorqual.layers.cache import Cache
from rorqual.model import IGNORED, LanguageModel
from rorqual.model_config import ModelConfig
from rorqual.tables import Table


class RorqualConfig(PreTrainedConfig):
    """The transformers config of a model; `shape` is ModelConfig as plain JSON.

    The other fields are those of any transformers config. The config.json of a run folder has the
    fields of `shape` at its top level.
    """

    model_type = "rorqual"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        shape: dict[str, Any] | None = None,
        *,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **fields: Any,
    ) -> None:
        config_fields = {field.name for field in dataclasses.fields(ModelConfig)} & fields.keys()
        of_run = {name: fields.pop(name) for name in config_fields}
        self.shape = of_run if shape is None and of_run else shape
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings or bool((self.shape or {}).get("tied"))
        super().__init__(**fields)

    @property
    def model(self) -> ModelConfig:
        """The model's config, made of `shape`; ValueError for fields or values that it refuses."""
        return configs.from_dict(ModelConfig, self.shape or {})

    @property
    def vocab_size(self) -> int:
        """Number of token ids, where transformers looks for it."""
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, where transformers looks for it."""
        return self.model.dim

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks, without those of MTP, where transformers looks for it."""
        return self.model.layers

    @classmethod
    def of(cls, config: ModelConfig, **fields: Any) -> "RorqualConfig":
        """Makes the transformers config of a model's config; `fields` are any others of it."""
        return cls(shape=configs.to_dict(config), tie_word_embeddings=config.tied, **fields)


class RorqualCache(HubCache):
    """Gives a model.Cache the interface of transformers' caches, as `generate` uses it."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=[])
        self.cache, self.columns = cache, Columns()

    def __repr__(self) -> str:
        return f"RorqualCache({self.batch_size} sequences, {self.columns.count} tokens)"

    def __len__(self) -> int:
        return len(self.cache.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of cached columns, padding included, the same for every layer."""
        return self.columns.count

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1, by which transformers says that the length has no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the columns that a mask covers, cached and new ones, and their offset, 0."""
        return self.columns.count + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences `beam_idx`, in that order, as beam search does after a step."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order."""
        self.cache.select(indices)
        self.columns.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, one after another."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens; transformers passes a negative number: crop(-3) removes three."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: got {tokens_to_remove}, expected minus the number of tokens to remove"
            )
        if -tokens_to_remove > self.columns.count:
            raise ValueError(
                f"crop: got {-tokens_to_remove}, expected at most the {self.columns.count} cached"
            )
        self.cache.crop(self.columns.tokens(-tokens_to_remove, self.batch_size))
        self.columns.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Removes all tokens and frees their memory."""
        self.cache.reset()
        self.columns.reset()

    @property
    def batch_size(self) -> int:
        """Number of sequences that are cached."""
        return self.cache.past.batch

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile forward around this cache."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: nothing has to be prepared before the first token."""
        return True

    @property
    def is_croppable(self) -> bool:
        """True: the last tokens can be removed, as many as `Cache.crop` allows."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: no column of a mask is dropped, whatever a window forgets."""
        return [False] * len(self)


class RorqualForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a LanguageModel, `.model`; forward translates transformers' arguments into its own."""

    config_class = RorqualConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    # The loss is a mean over one batch, whatever number of tokens a Trainer passes.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ("e_score_correction_bias", "image_bias")
    _no_split_modules = ("Block",)

    def __init__(self, config: RorqualConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        shape = config.model
        self.model = LanguageModel(shape, seed=None) if model is None else model
        if shape.tied:
            self._tied_weights_keys = {"model.head.weight": "model.embed.weight"}
        if model is None:
            self.post_init()
        else:
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys()

    @classmethod
    def of(cls, model: LanguageModel, tokenizer: Tokenizer | None = None) -> "RorqualForCausalLM":
        """Wraps this very model: its parameters are shared, not copied."""
        names = {}
        if tokenizer is not None:
            names = {
                "bos_token_id": tokenizer.begin_id,
                "eos_token_id": tokenizer.end_id,
                "pad_token_id": tokenizer.pad_id,
            }
        config = RorqualConfig.of(model.config, dtype=model.embed.weight.dtype, **names)
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Loads a model as transformers does, from safetensors only, and checks Engram's addresses.

        They are derived from the checkpoint's canonical map. ValueError where the checkpoint's
        multipliers, primes or map are not those of its config, and where a tensor is missing
        (Engram's rows that were trained on a disk are in files that transformers does not know).
        """
        options |= {"use_safetensors": True}
        wants_info = options.pop("output_loading_info", False)
        wrapper, info = super().from_pretrained(*args, **options, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            got = f"got no {missing[0].removeprefix('model.')!r} ({len(missing)} missing)"
            raise ValueError(
                f"{args[0] if args else 'model'}: {got}, "
                "expected all weights: open a run with rq.load"
            )
        addresses = wrapper.model.addresses
        if addresses is not None:
            addresses.load_state_dict(addresses.state_dict())
            addresses.to(wrapper.model.embed.weight.device)
        return (wrapper, info) if wants_info else wrapper

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Returns False, so that `generate` passes no cache: forward makes one of its own kind."""
        return False  # forward makes a cache of its own kind

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing: values come from LanguageModel's init or from a checkpoint."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the embedding, which transformers and PEFT look up by this name."""
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Raises ValueError, since resizing the vocabulary is not supported."""
        raise ValueError(
            "resizing the vocabulary is not supported: "
            "train a model with --model.vocab-size instead"
        )

    def get_output_embeddings(self) -> torch.nn.Module:
        """Returns the head, which transformers and PEFT look up by this name."""
        return self.model.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HubCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits, and with `labels` (unshifted, -100 ignored) the loss.

        The loss of a model in training mode is LanguageModel.loss's total, balance and MTP
        included; otherwise the next token's alone. Positions follow from the mask, so position_ids
        are not read. ValueError for inputs_embeds (memory is addressed by ids) and for a cache of
        another kind.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(
                "rorqual: got inputs_embeds, expected input_ids "
                "(experts and memory may be chosen by id)"
            )
        if unused.get("output_attentions") or unused.get("output_hidden_states"):
            raise ValueError(
                "rorqual: attentions and hidden states are not returned; "
                "read them with rorqual.analyze.taps"
            )
        if past_key_values is not None and not isinstance(past_key_values, RorqualCache):
            raise ValueError(
                f"past_key_values: got {type(past_key_values).__name__}, "
                "expected a RorqualCache or None"
            )
        packed = packing(_valid(attention_mask, input_ids))
        lengths = None if packed is None else packed.lengths
        ids = input_ids if packed is None else packed.pack(input_ids)
        loss = None
        if labels is not None:
            loss = self._loss(ids, labels, packed)
        if (
            past_key_values is None
            and (self.config.use_cache if use_cache is None else use_cache)
            and labels is None
        ):
            past_key_values = RorqualCache(self.model.new_cache(len(input_ids)))
        cache = None if past_key_values is None else past_key_values.cache
        hidden = self.model.hidden(ids, lengths=lengths, cache=cache)[0]
        if past_key_values is not None:
            past_key_values.columns.append(ids.shape[0], ids.shape[1], packed)
        hidden = hidden if packed is None else packed.unpack(hidden)
        logits_slice = (
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=self.model.logits(hidden[:, logits_slice]),
            past_key_values=past_key_values,
        )

    def _loss(self, ids: Tensor, labels: Tensor, packed: Packing | None) -> Tensor:
        """Returns the loss of packed ids and of labels as they were given."""
        if self.training and torch.is_grad_enabled() and self.model.embed.weight.requires_grad:
            self._check_tables()
        lengths = None
        if packed is not None:
            lengths = packed.lengths
            labels = packed.pack(labels.masked_fill(~packed.valid, IGNORED))
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = labels[:, 1:]
        loss = self.model.loss(ids, following, lengths=lengths)
        return loss.total if self.training else loss.next_token

    def _check_tables(self) -> None:
        """Raises ValueError where a step would not train Engram's rows, or would fail after it."""
        placed = {table.placement for table in self.model.tables if isinstance(table, Table)}
        elsewhere = ", ".join(sorted(placed - {"device"}))
        if elsewhere:
            raise ValueError(
                f"tables: got rows on {elsewhere}, which no optimizer of transformers trains, "
                "expected them on the device: rq.load(folder, placement='device'). "
                "`rorqual train --placement host` or `disk` trains rows that lie elsewhere; "
                "a model whose own weights are frozen (LoRA) keeps its tables anywhere"
            )


def _valid(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Returns which of the new tokens are valid; None without a mask."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] < ids.shape[1]:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected [batch, cached + new tokens]"
        )
    return mask[:, -ids.shape[1] :].bool()


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Converts the tokenizer to transformers' class, with its chat template if it has one.

    A text that it encodes begins with `begin_id`, as in training.
    """
    backend = tokenizer.templated()
    begin_token, end, pad = (
        backend.id_to_token(i) for i in (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin_token,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        chat_template=tokenizer.settings.get("chat_template"),
    )


AutoConfig.register("rorqual", RorqualConfig, exist_ok=True)
AutoModelForCausalLM.register(RorqualConfig, RorqualForCausalLM, exist_ok=True)
