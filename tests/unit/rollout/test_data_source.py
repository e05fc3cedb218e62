"""Data sources: the order of prompts over epochs, the buffer, resuming, and users' own classes."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from slime.observability import ledger
from slime.rollout import data_source
from slime.rollout.base_types import GroupFates, RolloutFnTrainOutput
from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer, load_data_source
from slime.rollout.ledger import take_ledger_line
from slime.rollout.sample_state import from_state, to_state
from slime.utils.types import Sample
from tests.unit.rollout import plugins
from tests.unit.rollout.fakes import FakeTokenizer

PLUGINS = plugins.__name__


def letters(groups):
    return "".join(group[0].prompt for group in groups)


@pytest.fixture
def args(make_args, prompts):
    return make_args(prompt_data=prompts(*"abcde"))


def test_each_prompt_becomes_a_group_of_copies_with_running_indices(args):
    source = RolloutDataSource(args)
    first, second = source.get_samples(2)
    assert [(s.prompt, s.group_index, s.index) for s in first + second] == [
        ("a", 0, 0),
        ("a", 0, 1),
        ("b", 1, 2),
        ("b", 1, 3),
    ]
    first[0].metadata["x"] = 1
    assert first[1].metadata == {}
    assert len(source) == 5


def test_reading_wraps_at_the_end_as_often_as_needed(args):
    source = RolloutDataSource(args)
    assert letters(source.get_samples(3)) == "abc"
    assert letters(source.get_samples(4)) == "deab"
    assert (source.epoch_id, source.sample_offset) == (1, 2)
    assert letters(source.get_samples(9)) == "cdeabcdea"
    assert source.sample_group_index == 16


def test_every_epoch_is_shuffled_anew_and_the_same_in_every_run(args):
    args.rollout_shuffle = True
    source, again = RolloutDataSource(args), RolloutDataSource(args)
    first, second = letters(source.get_samples(5)), letters(source.get_samples(5))
    assert sorted(first) == sorted(second) == list("abcde")
    assert first != second
    assert letters(again.get_samples(10)) == first + second
    args.rollout_seed += 1
    assert letters(RolloutDataSource(args).get_samples(10)) != first + second


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("taken", [0, 3, 5, 7, 13])
def test_resuming_continues_exactly(args, shuffle, taken):
    args.rollout_shuffle = shuffle
    source = RolloutDataSourceWithBuffer(args)
    source.get_samples(taken)
    source.update_metadata({"note": "kept"})
    source.save(4)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(4)
    expected, got = source.get_samples(6), resumed.get_samples(6)
    assert got == expected
    assert resumed.get_metadata() == {"note": "kept"}


def test_the_buffer_and_its_half_made_samples_come_back(args):
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(2)
    half = groups[0][0]
    half.append_response_tokens(tokens=[1, 2], log_probs=[-0.5, -0.25], text="xy")
    half.status = Sample.Status.ABORTED
    half.metadata["start_rollout_id"] = 3
    half.trace = {"events": [1]}
    half.rollout_top_p_token_ids = torch.tensor([1, 2], dtype=torch.int32)
    source.add_samples(groups)
    source.save(0)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(0)
    (first, _), _ = resumed.buffer
    assert (first.response, first.rollout_log_probs, first.status) == ("xy", [-0.5, -0.25], Sample.Status.ABORTED)
    assert (first.metadata, first.trace) == ({"start_rollout_id": 3}, {"events": [1]})
    assert first.rollout_top_p_token_ids.tolist() == [1, 2]
    assert letters(resumed.get_samples(3)) == "abc"


def test_the_ledger_knows_the_row_of_every_group_through_shuffle_slice_filter_and_resume(args, prompts, monkeypatch):
    monkeypatch.setattr(data_source, "load_tokenizer", lambda path, **kwargs: FakeTokenizer())
    rows = ["aaaaaa", "b", "cc", "", "d", "eeeeee", "f"]
    with open(prompts("x"), "w") as file:
        file.write("".join(f'{{"prompt": "{row}", "label": ""}}\n' if row else "\n" for row in rows))
    args.prompt_data, args.rollout_shuffle, args.rollout_max_prompt_len = f"{file.name}@[1:6]", True, 3
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(6)
    row_of = {"b": 0, "cc": 1, "d": 2, "f": 4}  # of the slice; the empty line is no row, eeeeee is too long
    expected = [(i // 4, row_of[group[0].prompt]) for i, group in enumerate(groups)]
    assert [source.outstanding[i] for i in range(6)] == expected
    assert source.position == (1, 2)

    source.add_samples(groups[4:])
    source.save(0)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(0)
    assert (resumed.outstanding, resumed.position) == (source.outstanding, (1, 2))


def test_a_rollout_takes_its_groups_out_of_what_is_outstanding(args):
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(5)
    source.add_samples(groups[4:])
    fates = GroupFates(trained=(0, 2), dropped=(1,), discarded=(3,))
    line = take_ledger_line(source, 7, RolloutFnTrainOutput([groups[0], groups[2]], fates=fates))
    assert line == {
        "rollout_id": 7,
        "trained": [[0, 0], [0, 2]],
        "dropped": [[0, 1]],
        "discarded": [[0, 3]],
        "outstanding": [[0, 4]],
        "position": [0, 5],
        "rows_per_epoch": 5,
    }
    (again,) = source.get_samples(1)
    line = take_ledger_line(source, 8, RolloutFnTrainOutput([again]))
    assert (line["trained"], line["outstanding"]) == ([[0, 4]], [])


def test_a_rollout_function_that_says_nothing_may_bring_its_groups_later(args):
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(3)
    line = take_ledger_line(source, 0, RolloutFnTrainOutput(samples=groups[:2]))
    assert (line["trained"], line["discarded"], line["outstanding"]) == ([[0, 0], [0, 1]], [], [[0, 2]])
    line = take_ledger_line(source, 1, RolloutFnTrainOutput(samples=groups[2:]))
    assert (line["trained"], line["outstanding"]) == ([[0, 2]], [])


@pytest.mark.parametrize("name", ["GuidePlain", "Complete", "GuideBuffer", "BareInit"])
def test_users_own_classes_are_accounted_for_as_far_as_they_tell(args, name, caplog):
    args.data_source_path = f"{PLUGINS}.{name}"
    source = load_data_source(args)
    groups = source.get_samples(2) or [[Sample(group_index=0)], [Sample(group_index=1)]]
    line = take_ledger_line(source, 0, RolloutFnTrainOutput(samples=groups))
    if name in ("GuidePlain", "Complete"):
        assert (line["trained"], "position" in line) == ([[None, 0], [None, 1]], False)
        assert not check_has_gaps(line)
    else:
        assert (line["trained"], line["position"]) == ([[0, 0], [0, 1]], [0, 2])


def check_has_gaps(line):
    return bool(list(ledger._gaps([line])))


def test_loading_runs_no_code_from_the_file(args, tmp_path):
    class Evil:
        def __reduce__(self):
            return (plugins.calls.append, ("ran",))

    path = tmp_path / "save" / "rollout" / "global_dataset_state_dict_0.pt"
    path.parent.mkdir(parents=True)
    torch.save({"metadata": Evil()}, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        RolloutDataSource(args).load(0)
    assert plugins.calls == []


def test_a_missing_state_is_refused_unless_the_run_starts_where_it_is_told(args):
    source = RolloutDataSource(args)
    source.load(-1)
    source.load(None)
    with pytest.raises(ValueError, match=r"rollout 7 in .* no data source state .*--finetune.*--start-rollout-id 8"):
        source.load(7)
    for flag in ({"start_rollout_id": 8}, {"finetune": True}):
        source = RolloutDataSource(Namespace(**(vars(args) | flag)))
        source.load(7)
        assert letters(source.get_samples(1)) == "a"


def test_a_state_of_a_source_without_buffer_is_accepted(args, tmp_path):
    path = tmp_path / "save" / "rollout" / "global_dataset_state_dict_2.pt"
    path.parent.mkdir(parents=True)
    old = {"sample_offset": 3, "epoch_id": 0, "sample_group_index": 3, "sample_index": 6, "metadata": {}}
    torch.save(old, path)
    source = RolloutDataSourceWithBuffer(args)
    source.load(2)
    assert (letters(source.get_samples(1)), source.sample_index, source.buffer) == ("d", 8, [])


def test_nowhere_to_save_is_an_error(args):
    args.save = None
    with pytest.raises(ValueError, match="--save"):
        RolloutDataSource(args).save(0)


def test_images_and_arrays_survive_saving_and_other_objects_are_refused():
    sample = Sample(multimodal_inputs={"images": [Image.new("RGB", (2, 1), (255, 0, 0))]}, metadata={"t": (1, None)})
    sample.teacher_log_probs = np.array([0.5, 0.25])
    sample.metadata["n"] = np.float64(2.5)
    back = from_state(to_state([[sample]]))[0][0]
    assert back.multimodal_inputs["images"][0].getpixel((1, 0)) == (255, 0, 0)
    assert back.teacher_log_probs.tolist() == [0.5, 0.25]
    assert back.metadata == {"t": (1, None), "n": 2.5}
    with pytest.raises(TypeError, match=r"sample 4\['metadata'\]\['f'\] holds a function"):
        to_state(Sample(index=4, metadata={"f": lambda: 0}))


def test_groups_go_back_only_to_a_source_with_a_buffer(args):
    source = RolloutDataSource(args)
    source.add_samples([])
    with pytest.raises(RuntimeError, match="RolloutDataSourceWithBuffer"):
        source.add_samples(source.get_samples(1))


def test_the_buffer_is_emptied_first_and_takes_whole_groups_only(args):
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(3)
    source.add_samples(groups[1:])
    assert source.get_buffer_length() == 2
    assert letters(source.get_samples(1)) == "b"
    assert letters(source.get_samples(3)) == "cde"
    with pytest.raises(AssertionError, match="1 members; --n-samples-per-prompt is 2"):
        source.add_samples([groups[0][:1]])
    with pytest.raises(AssertionError, match="list of samples"):
        source.add_samples([Sample()])


def test_a_buffer_filter_chooses_what_goes_out(args):
    args.buffer_filter_path = f"{PLUGINS}.newest_first"
    source = RolloutDataSourceWithBuffer(args)
    source.add_samples(source.get_samples(3))
    assert letters(source.get_samples(2)) == "cb"
    assert plugins.calls == [("newest_first", None)]
    assert letters(source.buffer) == "a"


def test_a_filter_that_chooses_too_many_is_an_error(args):
    source = RolloutDataSourceWithBuffer(args)
    source.buffer_filter = lambda args, buffer, num_samples: buffer
    source.add_samples(source.get_samples(3))
    with pytest.raises(ValueError, match="chose 3 groups where 1"):
        source.get_samples(1)


def test_a_subclass_without_arguments_and_without_super_works(args):
    args.data_source_path = f"{PLUGINS}.BareInit"
    source = load_data_source(args)
    assert letters(source.get_samples(2)) == "ab"
    assert letters(source.taken) == "ab"
    source.save(0)
    resumed = load_data_source(args)
    resumed.load(0)
    assert letters(resumed.get_samples(1)) == "c"


def test_the_guides_buffer_gives_its_best_once(args):
    args.data_source_path = f"{PLUGINS}.GuideBuffer"
    source = load_data_source(args)
    groups = source.get_samples(3)
    for group, reward in zip(groups, (0.0, 2.0, 1.0), strict=True):
        group[0].reward = reward
    source.add_samples(groups)
    assert letters(source.get_samples(2)) == "bc"
    assert letters(source.get_samples(2)) == "ad"


def test_the_guides_plain_class_draws_from_the_dataset_and_resumes(args):
    args.data_source_path = f"{PLUGINS}.GuidePlain"
    source = load_data_source(args)
    assert letters(source.get_samples(3)) == "abc"
    assert [sample.index for sample in source.get_samples(1)[0]] == [6, 7]
    assert len(source) == 5
    source.save(1)
    resumed = load_data_source(args)
    resumed.load(1)
    (group,) = resumed.get_samples(1)
    assert (group[0].prompt, group[0].index, len(group)) == ("e", 8, 2)


def test_a_complete_class_is_used_as_it_is(args):
    args.data_source_path = f"{PLUGINS}.Complete"
    assert type(load_data_source(args)) is plugins.Complete
    assert load_data_source(args).args is args


def test_without_a_dataset_samples_are_empty(make_args):
    source = RolloutDataSource(make_args(prompt_data=None))
    (group,) = source.get_samples(1)
    assert [(sample.prompt, sample.index) for sample in group] == [("", 0), ("", 1)]
    assert len(source) == 0


def test_flags_that_nothing_obeys_are_refused(args):
    args.streaming_data = True
    with pytest.raises(ValueError, match="--streaming-data"):
        RolloutDataSource(args)
    args.streaming_data, args.num_data_workers = False, 4
    with pytest.raises(ValueError, match="--num-data-workers 4"):
        RolloutDataSource(args)
