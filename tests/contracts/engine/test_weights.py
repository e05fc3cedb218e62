"""New weights: loaded whole or refused, visible in digests, versions and answers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.contracts.engine.speaking import Engine, Reference

CHANGED = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def prompt(reference: Reference) -> list[int]:
    return reference.encode("The answer is")


@pytest.fixture(autouse=True)
def weights_put_back(engine: Engine) -> Iterator[None]:
    """The original weights and version label are there again after each test."""
    model_path, version = engine.model_path, engine.weight_version()
    yield
    engine.ok("/update_weights_from_disk", {"model_path": model_path, "weight_version": version})


@pytest.fixture(scope="session")
def other_weights(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with one weight halved."""
    folder = tmp_path_factory.mktemp("weights") / "halved"
    shutil.copytree(engine.model_path, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[CHANGED] = tensors[CHANGED] * 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_weights_from_a_folder_change_the_answers_and_back(engine: Engine, prompt, other_weights, reference):
    before = engine.greedy(prompt, 12)["output_ids"]
    reply = engine.ok("/update_weights_from_disk", {"model_path": str(other_weights), "weight_version": "v5"})
    assert reply["success"] is True
    after = engine.greedy(prompt, 12)
    assert after["output_ids"] != before
    expected, _ = Reference(str(other_weights)).log_probs(prompt, after["output_ids"])
    reported = [log_prob for log_prob, _, _ in after["meta_info"]["output_token_logprobs"]]
    assert reported == pytest.approx(expected.tolist(), abs=engine.log_prob_tolerance)
    engine.ok("/update_weights_from_disk", {"model_path": engine.model_path})
    assert engine.greedy(prompt, 12)["output_ids"] == before


def test_nothing_cached_under_old_weights_is_used_with_new_ones(engine: Engine, reference, other_weights):
    prompt = reference.encode("A wheel turns; the wheel that turns the wheel turns too. " * 3)
    engine.greedy(prompt, 4)
    engine.ok("/update_weights_from_disk", {"model_path": str(other_weights)})
    assert engine.greedy(prompt, 4)["meta_info"]["cached_tokens"] == 0


def test_the_version_of_new_weights_is_in_every_reply(engine: Engine, prompt, other_weights):
    engine.ok("/update_weights_from_disk", {"model_path": str(other_weights), "weight_version": "v6"})
    meta = engine.greedy(prompt, 3, ignore_eos=True)["meta_info"]
    assert meta["weight_version"] == "v6"
    assert engine.weight_version() == "v6"
    engine.needs_newer_sglang_than("0.5.16", "does not tell which tokens a version made")
    assert meta["weight_versions"] == [{"version": "v6", "start": 0, "end": 3}]


def test_the_version_label_alone_can_be_set(engine: Engine, prompt):
    digests = engine.checksums()
    reply = engine.ok("/update_weight_version", {"new_version": "v7", "abort_all_requests": False})
    assert reply["success"] is True and reply["new_version"] == "v7"
    assert engine.greedy(prompt, 1)["meta_info"]["weight_version"] == "v7"
    assert engine.checksums() == digests


def test_a_reply_tells_which_weights_made_which_tokens(engine: Engine, prompt, other_weights):
    """Retracted under one version, finished under the next."""
    engine.needs_newer_sglang_than("0.5.16", "ends its scheduler when weights come from a folder amid requests")
    engine.ok("/update_weight_version", {"new_version": "old", "abort_all_requests": False})
    stream = engine.stream({"input_ids": prompt, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}})
    stream.wait_for_events(3)
    engine.ok("/pause_generation", {"mode": "retract"})
    engine.ok("/update_weights_from_disk", {"model_path": str(other_weights), "weight_version": "new"})
    engine.ok("/continue_generation", {})
    meta = stream.finish()[-1]["meta_info"]
    old, new = meta["weight_versions"]
    assert (old["version"], old["start"]) == ("old", 0)
    assert (new["version"], new["end"]) == ("new", 200)
    assert 3 <= old["end"] == new["start"] < 200
    assert meta["weight_version"] == "new"


def test_digests_are_stable_until_a_weight_changes_and_come_back_with_it(engine: Engine, other_weights):
    before = engine.checksums()
    assert before == engine.checksums()
    engine.ok("/update_weights_from_disk", {"model_path": str(other_weights)})
    after = engine.checksums()
    assert [name for name in before if before[name] != after[name]] == [CHANGED]
    engine.ok("/update_weights_from_disk", {"model_path": engine.model_path})
    assert engine.checksums() == before


def test_digests_can_be_taken_while_the_engine_is_paused(engine: Engine):
    before = engine.checksums()
    engine.ok("/pause_generation", {"mode": "abort"})
    assert engine.checksums() == before


def test_weights_load_while_the_engine_is_paused(engine: Engine, prompt, other_weights):
    before = engine.greedy(prompt, 12)["output_ids"]
    engine.ok("/pause_generation", {"mode": "abort"})
    assert engine.post("/flush_cache", {}).status_code == 200
    engine.ok("/update_weights_from_disk", {"model_path": str(other_weights), "weight_version": "v8"})
    engine.ok("/continue_generation", {})
    after = engine.greedy(prompt, 12)
    assert after["output_ids"] != before and after["meta_info"]["weight_version"] == "v8"


def test_an_unknown_action_of_the_checker_is_refused(engine: Engine):
    reply = engine.post("/weights_checker", {"action": "bogus"})
    assert reply.status_code == 400
    assert reply.json()["success"] is False and "bogus" in reply.json()["message"]


@pytest.mark.parametrize("wrong", ["missing", "empty"])
def test_a_folder_without_weights_changes_nothing(engine: Engine, prompt, tmp_path, wrong):
    folder = tmp_path / wrong
    if wrong == "empty":
        folder.mkdir()
    digests, version = engine.checksums(), engine.weight_version()
    reply = engine.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "never"})
    assert reply.status_code == 400
    assert reply.json()["success"] is False and reply.json()["message"]
    assert (engine.checksums(), engine.weight_version()) == (digests, version)
    assert engine.greedy(prompt, 2)["output_ids"]


def test_loading_needs_a_folder(engine: Engine):
    assert engine.post("/update_weights_from_disk", {}).status_code == 400


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_tensor_can_be_looked_at_by_its_huggingface_name(engine: Engine, reference, name):
    """The second one is a part of a fused tensor in SGLang."""
    if engine.info["dtype"] != "float32":
        engine.needs_newer_sglang_than("0.5.16", "cannot show 16 bits")
    shown = engine.ok("/get_weights_by_name", {"name": name, "truncate_size": 3})
    expected = dict(reference.model.named_parameters())[name][:3]
    assert len(shown) == 3
    if expected.dim() == 2:
        shown, expected = shown[1], expected[1]
    assert shown == pytest.approx(expected.tolist(), abs=1e-2 if engine.info["dtype"] != "float32" else 1e-6)


def test_looking_at_an_unknown_tensor_is_refused(engine: Engine):
    assert engine.post("/get_weights_by_name", {"name": "nothing.weight"}).status_code == 400
