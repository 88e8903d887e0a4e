"""Decodes token ids after prompts, one by one or several at once by speculative decoding.

The prompts are the requests of an engine of their own, all in its batch from the first step on
(where the rotary frequencies depend on the length, one after the other).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rorqual.model import LanguageModel
from rorqual.serve.drafts import AcceptanceStats
from rorqual.serve.engine import Engine, NoIdError
from rorqual.serve.sampling import GREEDY, Sampling


def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    end_id: int | None = None,
    vocab_size: int | None = None,
    acceptance_stats: AcceptanceStats | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new id of every prompt at each step, and None for a sequence that has ended.

    The `end_id` of a sequence is yielded before it ends. `vocab_size`: ids from there on are never
    sampled (a model's table may be longer than its tokenizer). With `acceptance_stats` the model's
    MTP modules draft, and the drafts are counted there: the ids are the same, in fewer forwards.
    Each sequence advances by as many ids as it accepts; an id is yielded once all sequences that go
    on have one. ValueError for logits that no id can be sampled from.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("got an empty prompt, expected at least one token a prompt")
    engine = Engine(
        model,
        max_batch_size=len(prompts),
        context=max(len(prompt) for prompt in prompts) + max_new_tokens,
        prefill_chunk=sum(len(prompt) for prompt in prompts),
        prefix_cache=False,
        drafts=acceptance_stats is not None,
        end_id=end_id,
        vocab_size=vocab_size,
    )
    if acceptance_stats is not None:
        engine.acceptance_stats = acceptance_stats
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    requests = [
        engine.submit(prompt, index=index, **options) for index, prompt in enumerate(prompts)
    ]
    count = 0
    while True:
        while any(len(one.ids) > count for one in requests) and all(
            len(one.ids) > count or one.finish is not None for one in requests
        ):
            yield [one.ids[count] if len(one.ids) > count else None for one in requests]
            count += 1
        if engine.idle:
            return
        engine.step()
        failed = [index for index, request in enumerate(requests) if request.error is not None]
        if failed:
            error = requests[failed[0]].error
            assert error is not None
            if isinstance(error, NoIdError):
                raise ValueError(
                    f"got {error} in sequences {failed}, expected a finite largest logit in each: "
                    "weights that are not finite, or a dtype too narrow for them "
                    "(float32 holds more)"
                )
            raise error


def speculate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    acceptance_stats: AcceptanceStats | None = None,
    **options: Any,
) -> Iterator[list[int | None]]:
    """Decodes with drafts: what `decode` yields, in fewer forwards.

    ValueError for a model without MTP.
    """
    acceptance_stats = AcceptanceStats() if acceptance_stats is None else acceptance_stats
    yield from decode(model, prompts, acceptance_stats=acceptance_stats, **options)
