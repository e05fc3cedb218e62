"""Functions and classes as users write them, named by dotted path in the tests."""

import asyncio

from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState, generate
from slime.utils.types import Sample

calls = []


# ---- rewards ----


async def exact(args, sample, **kwargs):
    """1 for the label, else 0."""
    calls.append(("exact", sample.index))
    return float(sample.response == sample.label)


async def exact_of_all(args, samples, **kwargs):
    calls.append(("exact_of_all", [sample.index for sample in samples]))
    return [float(sample.response == sample.label) for sample in samples]


async def as_dict(args, sample, **kwargs):
    return {"score": float(sample.response == sample.label), "pred": sample.response}


async def fails(args, sample, **kwargs):
    raise KeyError("the reward function broke")


async def fails_for_bad_labels(args, sample, **kwargs):
    if sample.label == "bad":
        raise KeyError("the reward function broke")
    return 1.0


# ---- filters ----


def keep_right_answers(args, samples, **kwargs):
    right = all(sample.reward for sample in samples)
    return DynamicFilterOutput(keep=right, reason="wrong")


def keep_none_with_fallback(args, samples, **kwargs):
    return DynamicFilterOutput(keep=False, reason="never", keep_when_insufficient=True)


def note_all_groups(args, all_groups, data_source):
    calls.append(("all", [group[0].index for group in all_groups], callable(data_source)))


def remove_first(args, groups):
    groups[0][0].remove_sample = True


# ---- generate functions ----


async def custom_generate(args, samples, evaluation=False):
    """As in the guide: a list, text only."""
    calls.append(("list form", len(samples), evaluation))
    for sample in samples:
        sample.response = "ok"
    return samples


async def list_form_in_place(args, samples):
    samples[0].response = "ok"


async def conversation(args, samples, evaluation=False):
    """Multi-turn as in the guide: appends to the prompt's messages."""
    for sample in samples:
        talk = sample.prompt
        talk.append({"role": "assistant", "content": "call"})
        talk.append({"role": "tool", "content": "result"})
        sample.response = "ok"
    return samples


async def per_sample(args, sample, sampling_params, evaluation=False):
    calls.append(("per sample", evaluation))
    sampling_params["temperature"] = 0.25
    return await generate(args, sample, sampling_params)


async def fan_out(args, sample, sampling_params):
    made = []
    for i in range(2):
        child = Sample(index=sample.index, group_index=sample.group_index, label=sample.label, prompt=sample.prompt)
        child.rollout_id = sample.index
        child.tokens = [1]
        word = "ok" if i == 0 else "no"
        child.append_response_tokens(tokens=map(ord, word), log_probs=[-1.0] * 2, text=word)
        child.status = Sample.Status.COMPLETED
        made.append(child)
    return made


async def own_reward(args, sample, sampling_params):
    await generate(args, sample, sampling_params)
    sample.reward = 5.0
    return sample


async def own_prompt(args, sample, sampling_params):
    sample.prompt += str(sample.index)
    return await generate(args, sample, sampling_params)


async def two_turns(args, sample, sampling_params):
    """Calls the engine again although its first call may have been aborted."""
    await generate(args, sample, dict(sampling_params))
    if GenerateState(args).aborted:
        await asyncio.sleep(0)
        sample.status = Sample.Status.ABORTED
        await generate(args, sample, dict(sampling_params))
    return sample


async def returns_nothing(args, sample, sampling_params):
    return None


# ---- sample hooks ----


def shout(args, sample, *, rollout_id=None, evaluation=False):
    calls.append(("shout", sample.index, rollout_id, evaluation))
    sample.metadata["hooks"] = [*sample.metadata.get("hooks", []), "shout"]


async def whisper(args, sample):
    sample.metadata["hooks"] = [*sample.metadata.get("hooks", []), "whisper"]
    return sample


def returns_a_number(args, sample):
    return 3


# ---- data sources ----


class BareInit(RolloutDataSource):
    """`__init__` without arguments and without super, as the guide writes it."""

    def __init__(self):
        self.taken = []

    def get_samples(self, num_samples):
        groups = super().get_samples(num_samples)
        self.taken += groups
        return groups


class GuideBuffer(RolloutDataSourceWithBuffer):
    def __init__(self):
        self.buffer = []

    def add_samples(self, samples):
        self.buffer.extend(samples)

    def buffer_filter(self, args, buffer, num_samples):
        """The best, without removing them."""
        return sorted(buffer, key=lambda group: -group[0].reward)[:num_samples]


class GuidePlain:
    """Nothing but the two methods of the guide."""

    def get_samples(self, num_samples):
        return self.dataset.sample(num_samples)

    def add_samples(self, samples):
        pass


class Complete:
    def __init__(self, args):
        self.args = args

    def get_samples(self, num_samples):
        return []

    def add_samples(self, samples):
        pass

    def save(self, rollout_id):
        pass

    def load(self, rollout_id=None):
        pass

    def __len__(self):
        return 0


def newest_first(args, rollout_id, buffer, num_samples):
    calls.append(("newest_first", rollout_id))
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]
