"""Decodes one prompt with a forward a token: what an engine gives must be the same."""

import torch

from rorqual.serve.sampling import GREEDY, SequenceSampler, sample_batch


@torch.inference_mode()
def alone(
    model, prompt, *, max_new_tokens, sampling=GREEDY, end_id=None, vocab_size=None, matcher=None
):
    """Returns the new ids of a prompt, the only sequence of its cache."""
    ends = {end_id, *sampling.stop_token_ids} - {None}
    sampler = SequenceSampler(
        prompt,
        sampling,
        sampling.generator(),
        vocab_size=model.config.vocab_size,
        end_ids=ends,
        matcher=matcher,
    )
    cache = model.new_cache(1)
    new = list(prompt)
    ids = []
    while len(ids) < max_new_tokens:
        hidden = model.hidden(torch.tensor([new]), cache=cache, last=True)[0]
        drawn = sample_batch(model.logits(hidden)[:, 0, :vocab_size], [sampler])
        if drawn.errors:
            break
        ids.append(drawn.ids[0])
        if sampler.accept(ids[-1]):
            break
        new = ids[-1:]
    return ids
