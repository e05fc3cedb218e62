"""A run's args, a prompt file and an engine for the rollout's tests."""

import json
from argparse import Namespace

import pytest

from slime.rollout import sglang_rollout
from slime.rollout.sample_hooks import set_current_rollout_id
from slime.utils import http_utils
from slime.utils.misc import SingletonMeta
from tests.unit.rollout import fakes, plugins

PLUGINS = plugins.__name__


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    """Singletons and records do not pass from test to test."""
    monkeypatch.setattr(SingletonMeta, "_instances", {})
    monkeypatch.setattr(sglang_rollout, "EVAL_PROMPT_DATASET", {})
    plugins.calls.clear()
    yield
    set_current_rollout_id(None)


@pytest.fixture
def prompts(tmp_path):
    """Writes prompts to a file and returns its path; labels are `ok` unless a prompt is a (prompt, label) pair."""

    def write(*items, name="train.jsonl"):
        rows = [item if isinstance(item, tuple) else (item, "ok") for item in items]
        file = tmp_path / name
        file.write_text("".join(json.dumps({"prompt": prompt, "label": label}) + "\n" for prompt, label in rows))
        return str(file)

    return write


@pytest.fixture
def make_args(tmp_path):
    def make(**changes):
        args = Namespace(
            # engine
            hf_checkpoint=str(tmp_path),
            sglang_router_ip=fakes.HOST,
            sglang_router_port=fakes.PORT,
            sglang_server_concurrency=64,
            rollout_num_engines=1,
            sglang_router_request_timeout_secs=20,
            # sampling
            rollout_temperature=1.0,
            rollout_top_p=1.0,
            rollout_top_k=-1,
            rollout_max_response_len=8,
            rollout_stop=None,
            rollout_stop_token_ids=None,
            rollout_skip_special_tokens=False,
            rollout_seed=42,
            # data
            prompt_data=None,
            rollout_global_dataset=True,
            rollout_shuffle=False,
            rollout_max_prompt_len=None,
            input_key="prompt",
            label_key="label",
            tool_key="tools",
            metadata_key="metadata",
            multimodal_keys=None,
            apply_chat_template=False,
            apply_chat_template_kwargs={},
            data_source_path="slime.rollout.data_source.RolloutDataSourceWithBuffer",
            save=str(tmp_path / "save"),
            load=str(tmp_path / "save"),
            # batch
            rollout_batch_size=2,
            over_sampling_batch_size=2,
            n_samples_per_prompt=2,
            partial_rollout=False,
            group_rm=False,
            custom_rm_path=f"{PLUGINS}.exact",
            rm_type=None,
            reward_key=None,
            # evaluation
            eval_datasets=[],
            n_samples_per_eval_prompt=1,
            eval_max_prompt_len=None,
        )
        vars(args).update(changes)
        return args

    return make


@pytest.fixture
def engine(monkeypatch):
    """The router and engine that all requests of the test reach."""
    fake = fakes.FakeEngine()
    monkeypatch.setattr(http_utils, "_http_client", fake.client())
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(sglang_rollout, "_ABORT_POLL_S", 0.02)
    monkeypatch.setattr(sglang_rollout, "load_tokenizer", lambda path, **kwargs: fakes.FakeTokenizer())
    return fake
